"""The units of a network, what is coupled to them, and their removal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rewire.nn.layers.adapted import refuse_adapted
from rewire.nn.optimizers.wrappers import listed
from rewire.nn.surgery.resize import Keep, apply_cuts, check_state
from rewire.nn.surgery.sides import Side, axes, depthwise, holds_units, reads_units, why_not
from rewire.nn.surgery.trace import Trace
from rewire.nn.surgery.trial import Different, try_cut

__all__ = ["Group", "Site", "UnitGraph", "remove_units"]

Units = Iterable[int] | Tensor


@dataclass(frozen=True)
class Site:
    """Units at one side of a layer: position ``positions[i]`` along it belongs to unit ``units[i]``
    (int64, numbered as traced).
    """

    name: str
    module: nn.Module
    side: Side
    positions: Tensor
    units: Tensor


@dataclass
class Group:
    """Everything that must be cut together for the units of a layer.

    producers: layers that compute the units; several if their outputs are added.
    followers: layers that treat each unit by itself (BatchNorm, depthwise convolutions).
    consumers: layers that mix the units, with a column of their weights for each.
    alive: the units that are left, numbered as traced.
    """

    name: str
    size: int
    producers: list[Site] = field(default_factory=list)
    followers: list[Site] = field(default_factory=list)
    consumers: list[Site] = field(default_factory=list)
    alive: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def least(self) -> int:
        """How many units must stay: a depthwise convolution needs two, to be recognized as such."""
        return 2 if any(depthwise(site.module) for site in self.followers) else 1

    @property
    def sites(self) -> list[Site]:
        """Everything that is cut with the group's units: producers, followers, consumers."""
        return [*self.producers, *self.followers, *self.consumers]


class UnitGraph:
    """The units of ``model`` (neurons, channels, states of a recurrent layer), and their removal.

    torch-pruning's dependency graph finds coupled layers in training and in eval mode, so layers
    that only one mode uses (such as an auxiliary head) are cut as well. Every group is then tried
    on a copy with random weights, in both modes, in the model's dtype and, if the network runs in
    it, in float64: the cut copy must compute what it computes with the consumers' columns at 0. If
    it does not, the units of that layer cannot be cut. The graph stays valid after its own cuts.

    Args:
        model: a network in ordinary PyTorch.
        inputs: an example batch: a tensor, a tuple of arguments, a dict of keyword arguments, or
            both (`Arguments`).
        tried: layers whose groups an earlier graph of the model has tried already (see `tried`).

    Raises ValueError if the network does not run with the example in both modes, or torch-pruning
    cannot follow it. Cost: two copies of the model and two forward passes of the example; for each
    group two more copies and eight forward passes.
    """

    def __init__(self, model: nn.Module, inputs: Any, tried: Iterable[str] = ()) -> None:
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "DistributedDataParallel has buckets of a fixed size: cut units before wrapping "
                "the model"
            )
        refuse_adapted(model)
        self.model, self.inputs = model, inputs
        self._trace = Trace(model, inputs)
        self._known = frozenset(tried)
        self._groups: dict[str, Group | str] = {}
        fit = [(n, m) for n, m in model.named_modules() if why_not(m) is None]
        sides: tuple[Side, Side] = ("out", "in")
        self._lengths = {(n, side): _length(m, side) for n, m in fit for side in sides}
        self._sizes = {n: self._lengths[n, "out"] for n, m in fit if holds_units(m)}
        self._alive: dict[tuple[str, Side], Tensor] = {}
        #: Layers with their own units, in the order in which they are called.
        self.names = [
            name
            for name in dict.fromkeys(self._trace.order)
            if name and holds_units(model.get_submodule(name))
        ]
        #: The last layer that reads units, among those that both modes call.
        self.last = next(
            (n for n in reversed(self._trace.shared) if reads_units(model.get_submodule(n))), None
        )

    # --- questions --------------------------------------------------------------------------------

    def count(self, name: str) -> int:
        """How many units the layer has now."""
        module = self.model.get_submodule(name)
        axis = next(axes(module, "out"), None)
        if axis is None:
            raise ValueError(f"{name} is a {type(module).__name__}, which has no units of its own")
        tensor: Tensor = getattr(module, axis.name)
        return tensor.shape[axis.dim] // axis.blocks

    def parameters(self, group: Group) -> int:
        """How many parameters one unit of the group has now."""
        names = {id(p) for p in self.model.parameters()}
        total = 0
        for site in group.sites:
            length = _length(site.module, site.side)
            places = site.positions.numel() // group.size
            for axis in axes(site.module, site.side):
                tensor = getattr(site.module, axis.name)
                if tensor is not None and id(tensor) in names:
                    total += tensor.numel() // length * places
        return max(total, 1)

    def group(self, name: str) -> Group:
        """Everything coupled to the units of layer ``name``.

        Raises ValueError, with the layer that is the reason, if they cannot be cut.
        """
        if name not in self._groups:
            if name not in dict(self.model.named_modules()):
                raise ValueError(f"the model has no layer {name!r}: it has {', '.join(self.names)}")
            try:
                self._groups[name] = self._find(name)
            except ValueError as error:
                self._groups[name] = str(error)
        found = self._groups[name]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    @property
    def tried(self) -> frozenset[str]:
        """The layers whose groups have been tried and can be cut."""
        return frozenset(name for name, group in self._groups.items() if isinstance(group, Group))

    def refusal(self, name: str) -> str | None:
        """Why the units of layer ``name`` cannot be cut; None if they can."""
        try:
            self.group(name)
        except ValueError as error:
            return str(error)
        return None

    def norm_after(self, name: str) -> nn.modules.batchnorm._BatchNorm | None:
        """The BatchNorm that is the only direct reader of layer ``name``'s output, if it is one."""
        found = self._trace.norm_after(name)
        norm = None if found is None else self.model.get_submodule(found)
        return norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None

    def positions(self, site: Site, units: Tensor) -> Tensor:
        """The positions of ``units`` (numbered as traced) along the site now: int64, (number of
        units, positions of each).
        """
        alive = self._alive.get((site.name, site.side))
        # All units have the same number of positions, see `_find`.
        order = torch.argsort(site.units, stable=True)
        rows = site.positions[order].view(int(site.units.max()) + 1, -1)[units]
        return rows if alive is None else torch.searchsorted(alive, rows.contiguous())

    # --- the cut ----------------------------------------------------------------------------------

    def remove(
        self, cuts: Mapping[str, Units], optimizers: Optimizer | Iterable[Optimizer] = ()
    ) -> None:
        """Remove units, given by layer and present number, with gradients and optimizer state.

        Parameters stay the same objects. The contribution of the units to their consumers is lost;
        call `fold` first to keep it. Raises ValueError, before anything changes, if a layer cannot
        be cut, a unit does not exist, no unit would be left, or an optimizer has state that cannot
        be cut.
        """
        given = listed(optimizers)
        dead = {name: self._traced(self.group(name), units) for name, units in cuts.items()}
        groups = [(self.group(name), units) for name, units in dead.items()]
        alive, gone, tensors = self._plan(groups)
        names = dict(self.model.named_parameters())
        for optimizer in given:
            for name, keep in tensors.items():
                if name in names:
                    check_state(optimizer, name, names[name], keep)
        self._apply(self.model, alive, tensors, given)
        self._alive.update(alive)
        for group in self._groups.values():
            if isinstance(group, Group):
                for site in group.producers:
                    lost = gone.get((site.name, site.side))
                    if lost is not None:
                        units = site.units[torch.isin(site.positions, lost)]
                        group.alive = group.alive[~torch.isin(group.alive, units)]

    def _traced(self, group: Group, units: Units) -> Tensor:
        """The numbers as traced of units given by their present numbers."""
        given = units if isinstance(units, Tensor) else list(units)
        index = torch.as_tensor(given, dtype=torch.int64)
        n = group.alive.numel()
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= n):
            raise ValueError(f"{group.name} has units 0 to {n - 1}, not {index.tolist()}")
        index = index.unique()
        least = group.least
        if n - index.numel() < least:
            raise ValueError(
                f"{group.name} has {n} units and cannot lose {index.numel()}: at least {least} "
                "must stay"
            )
        return group.alive[index]

    def _apply(
        self,
        model: nn.Module,
        alive: Mapping[tuple[str, Side], Tensor],
        tensors: Mapping[str, Keep],
        optimizers: Iterable[Optimizer],
    ) -> None:
        apply_cuts(model, tensors, [model.get_submodule(name) for name, _ in alive], optimizers)
        for (name, _), left in alive.items():
            module = model.get_submodule(name)
            if hasattr(module, "num_features"):  # also norms without parameters
                setattr(module, "num_features", left.numel())  # noqa: B010

    def _plan(
        self, dead: Iterable[tuple[Group, Tensor]]
    ) -> tuple[dict[tuple[str, Side], Tensor], dict[tuple[str, Side], Tensor], dict[str, Keep]]:
        """The positions that stay and go along each side, and the entries that each tensor
        keeps.
        """
        gone: dict[tuple[str, Side], Tensor] = {}
        modules: dict[str, nn.Module] = {}
        for group, units in dead:
            for site in group.sites:
                lost = site.positions[torch.isin(site.units, units)]
                key = site.name, site.side
                gone[key] = torch.cat([gone[key], lost]).unique() if key in gone else lost.unique()
                modules[site.name] = site.module
        alive: dict[tuple[str, Side], Tensor] = {}
        tensors: dict[str, Keep] = {}
        for key, lost in gone.items():
            module = modules[key[0]]
            before = self._alive.get(key)
            if before is None:
                before = torch.arange(self._lengths[key])
            stays = ~torch.isin(before, lost)
            if not bool(stays.any()):
                raise ValueError(f"{key[0]} would have no unit left")
            alive[key] = before[stays]
            index = stays.nonzero().flatten()
            for axis in axes(module, key[1]):
                if getattr(module, axis.name) is None:
                    continue
                n = before.numel()
                blocks = torch.cat([index + block * n for block in range(axis.blocks)])
                keep: dict[int, Tensor] = dict(tensors.get(_path(key[0], axis.name), {}))
                keep[axis.dim] = blocks
                tensors[_path(key[0], axis.name)] = keep
        return alive, gone, tensors

    # --- finding and trying groups ----------------------------------------------------------------

    def _find(self, name: str) -> Group:
        module = self.model.get_submodule(name)
        if (reason := why_not(module)) is not None:
            raise ValueError(f"{name} {reason}")
        if name not in self._sizes:
            raise ValueError(f"{name} is a {type(module).__name__}, which has no units of its own")
        group = Group(name, self._sizes[name])
        alive = self._alive.get((name, "out"))
        group.alive = torch.arange(group.size) if alive is None else alive.clone()
        for reached in self._trace.reach(name, group.size):
            there = self.model.get_submodule(reached.module)
            what = f"the units of {name} cannot be cut: {reached.module}"
            if (reason := why_not(there)) is not None:
                raise ValueError(f"{what} {reason}")
            each = torch.bincount(reached.units, minlength=group.size)
            counted = isinstance(there, nn.PReLU) and there.num_parameters == 1
            length = self._lengths.get((reached.module, reached.side), 0)
            places = int(reached.positions.max()) + 1
            if not counted and places > length:
                raise ValueError(f"{what} would need {places} places for them, and has {length}")
            if int(each.min()) != int(each.max()):
                raise ValueError(f"{what} takes different numbers of values from different units")
            site = Site(reached.module, there, reached.side, reached.positions, reached.units)
            if counted:  # one number for all units
                continue
            if not holds_units(there):
                group.followers.append(site)
            elif reached.side == "out":
                group.producers.append(site)
            else:
                group.consumers.append(site)
        self._refuse_shared(group)
        if name not in self._known:
            self._try(group)
        return group

    def _refuse_shared(self, group: Group) -> None:
        """Raise ValueError if a tensor belongs to two modules, because it would be cut in both."""
        homes: dict[int, set[str]] = {}
        for name, module in self.model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    homes.setdefault(id(parameter), set()).add(_path(name, key))
        for site in group.sites:
            for axis in axes(site.module, site.side):
                names = homes.get(id(getattr(site.module, axis.name)), set())
                if len(names) > 1:
                    raise ValueError(
                        f"the units of {group.name} cannot be cut: {site.name}.{axis.name} is "
                        f"shared ({', '.join(sorted(names))} are one parameter)"
                    )

    def _try(self, group: Group) -> None:
        """Cut every second unit of a copy with random weights, and compare with zeroed columns."""
        least = group.least
        lost = group.alive[1::2] if group.alive.numel() > 2 * least else group.alive[least:]
        if not lost.numel():
            return  # there are too few units to remove any
        alive, _, tensors = self._plan([(group, lost)])

        def silence(twin: nn.Module) -> None:
            for site in (*group.consumers, *group.producers):
                positions = self.positions(site, lost).flatten()
                _zero_columns(twin.get_submodule(site.name), site.side, positions)

        def cut(twin: nn.Module) -> None:
            self._apply(twin, alive, tensors, ())

        readers = ", ".join(site.name for site in group.consumers)
        try:
            try_cut(self.model, self._trace.inputs, cut, silence, readers)
        except Different as error:
            names = sorted({site.name for site in group.sites})
            twice = [name for name in names if self._trace.twice(name)]
            more = f"; {', '.join(twice)}: called more than once" if twice else ""
            raise ValueError(f"the units of {group.name} cannot be cut: {error}{more}") from None


def _path(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _length(module: nn.Module, side: Side) -> int:
    """The number of positions along one side of a layer; 0 if nothing of it counts them."""
    for axis in axes(module, side):
        tensor = getattr(module, axis.name)
        if tensor is not None:
            return int(tensor.shape[axis.dim]) // axis.blocks
    return int(getattr(module, "num_features", 0) or getattr(module, "num_parameters", 0))


def _zero_columns(module: nn.Module, side: Side, positions: Tensor) -> None:
    """Set the columns that read these units to 0: of a consumer, or the recurrent ones of a
    producer.
    """
    if side == "in":
        for axis in axes(module, "in"):
            getattr(module, axis.name).index_fill_(axis.dim, positions, 0)
    elif isinstance(module, nn.RNN | nn.LSTM | nn.GRU):
        module.get_parameter("weight_hh_l0").index_fill_(1, positions, 0)


def remove_units(
    model: nn.Module,
    cuts: Mapping[str, Units],
    inputs: Any,
    optimizers: Optimizer | Iterable[Optimizer] = (),
) -> None:
    """Remove units of several layers at once: ``remove_units(model, {"conv1": [3, 5]}, batch,
    optimizer)``.

    See `UnitGraph` (keep one for several cuts) and `UnitGraph.remove`.
    """
    graph = UnitGraph(model, inputs)
    graph.remove(cuts, optimizers)
