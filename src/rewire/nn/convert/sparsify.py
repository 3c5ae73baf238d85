"""Convert models between dense and sparse layers, in place, and walk over their sparse weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import budget
from rewire.budget import Limits
from rewire.nn.convert import attached
from rewire.nn.convert.densify import Target, moves_to_dense, refuse_followed
from rewire.nn.convert.kinds import KINDS, Kind, join, kind_of, sparse_kind_of
from rewire.nn.layers.initial import Init, check_init
from rewire.nn.optimizers.wrappers import listed
from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight
from rewire.topology import limits as limited

__all__ = ["densify", "param_groups", "sparse_weights", "sparsify"]

Patterns = str | Sequence[str]


def sparsify(
    model: nn.Module,
    *,
    density: float | Mapping[str, float] | None = None,
    connections: int | Mapping[str, int] | None = None,
    distribution: str = "erk",
    only: Patterns | None = None,
    exclude: Patterns | None = None,
    select: Literal["random", "magnitude"] = "random",
    limits: Limits | Mapping[str, Limits] | None = None,
    generator: torch.Generator | None = None,
    init: Init = "auto",
) -> nn.Module:
    """Replace dense layers by sparse ones that keep within a budget, in place; returns the model.

    Args:
        density: share of the chosen layers' potential connections to have in total, spread by
            ``distribution``; or a dict from glob pattern to the density of each layer
            (``"encoder.lstm"``) or single weight (``"encoder.lstm.weight_hh_l0"``) it matches. The
            first match counts, layers without one stay dense. Where a layer of several weights is
            matched by its own name, ``distribution`` spreads its budget over them.
        connections: the same as a number of connections.
        distribution: a name in `rewire.budget.DISTRIBUTIONS` ("erk", "er", "uniform").
        only, exclude: glob patterns over layer names (``"encoder.*"``), one or several.
        select: "random" draws a random topology with fresh values, for training from scratch;
            "magnitude" keeps the largest weights and their values, for a trained model. Biases are
            kept in both.
        limits: on fan-in, fan-out and blocks of each weight (`rewire.budget.Limits`), or a dict
            from glob pattern to the limits of the layers or weights it matches. With
            select="random" only.
        generator: for the random draws.
        init: how large fresh values are: "auto" keeps the variance that outputs have in the dense
            layer, "dense" draws as that does, "sparse" goes by the mean fan-in; see
            `rewire.nn.layers.initial.draw_values`. With select="random" only.

    A weight with a mask of `torch.nn.utils.prune` gets the mask for its topology and the masked
    weights for its values, whatever ``select`` says, and is pruned no more. Without ``density`` and
    ``connections`` only layers with such masks are converted (their other weights stay complete). A
    budget beside masks must agree with them: other layers get what the masks leave of it. To choose
    anew, make the masks permanent first (`torch.nn.utils.prune.remove`).

    What else belongs to a layer stays with it: biases (the same parameters), hooks, mode, whatever
    was set on it. A layer whose weight is computed (parametrizations, weight norm, spectral norm),
    has a hook on its gradient, or has a forward of its own is refused by name.

    Layers converted: `torch.nn.Linear`, `Conv1d`, `Conv2d`, `Conv3d`, `RNN`, `LSTM`, `GRU` and
    `MultiheadAttention` themselves (not subclasses, whose forward may differ). Make the optimizer
    afterwards: the old parameters are gone. Transformer encoders stop using nested tensors, which
    their fused kernels for dense weights need. Raises ValueError if nothing matches, the budget
    cannot be met or a parameter to be replaced is shared with another layer; the model is then
    unchanged.
    """
    if density is not None and connections is not None:
        raise ValueError("give exactly one of density= and connections=")
    if select not in ("random", "magnitude"):
        raise ValueError(f"select must be 'random' or 'magnitude', not {select!r}")
    if limits is not None and select != "random":
        raise ValueError("limits= are for select='random': the largest weights need not fit them")
    check_init(init)
    if init != "auto" and select != "random":
        raise ValueError(
            f"init={init!r} is for select='random': the largest weights keep their values"
        )
    found = {
        name: (module, kind)
        for name, module, kind in layers_of(model, kind_of)
        if (only is None or _matches(name, only))
        and not (exclude is not None and _matches(name, exclude))
    }
    _refuse_disguised(model, only, exclude, density if density is not None else connections)
    masks = {name: attached.prune_masks(module, kind) for name, (module, kind) in found.items()}
    if density is None and connections is None:
        found = {name: layer for name, layer in found.items() if masks[name]}
        if not found:
            raise ValueError(
                "give exactly one of density= and connections=: no layer has a prune "
                "mask to take instead"
            )
    weights = {name: kind.weights(module) for name, (module, kind) in found.items()}
    for name, path, weight in ((n, p, w) for n, parts in weights.items() for p, w in parts.items()):
        if not weight.numel():
            raise ValueError(
                f"{join(name, path)} has the shape {tuple(weight.shape)}, with nothing to "
                "connect: exclude it"
            )
    if density is None and connections is None:
        counts = {
            name: {p: _kept(masks[name].get(p), w) for p, w in parts.items()}
            for name, parts in weights.items()
        }
    else:
        counts = _counts(weights, density, connections, distribution, masks)
    if not counts:
        kinds = ", ".join(kind.dense.__name__ for kind in KINDS)
        raise ValueError(
            f"no layer to convert: sparsify converts layers of torch.nn ({kinds}), and only=, "
            "exclude= or the patterns "
            "of the budget leave none of them"
        )
    refuse_shared(model, {name: found[name][0] for name in counts})
    for name in counts:
        attached.check_dense(name, *found[name])
        meta = next((p for p, w in weights[name].items() if w.device.type == "meta"), None)
        if meta is not None and select == "magnitude":
            raise ValueError(
                f"{join(name, meta)} is on the meta device, where no value is the "
                "largest: load it first"
            )
    if isinstance(limits, Mapping):
        names = {
            name
            for layer in counts
            for path in weights[layer]
            for name in (layer, join(layer, path))
        }
        for pattern in limits:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"pattern {pattern!r} of limits= matches no layer; there are "
                    f"{', '.join(counts)}"
                )

    def sparse(name: str) -> nn.Module:
        layer, kind = found[name]
        made = kind.to_sparse(
            layer, {path: max(count, 1) for path, count in counts[name].items()}, generator
        )
        drawn = [path for path in weights[name] if path not in masks[name]]
        _restrict(made, name, drawn, limits, generator, {})
        # made with the default; or other rows have more connections by now
        if init != "auto" or limits is not None:
            redrawn: Any = made
            redrawn.reset_weights(generator, init=init)
        for path, dense in weights[name].items():
            parent, _, leaf = path.rpartition(".")
            pool = None
            if path in masks[name]:
                pool = _masked(
                    kind.part(layer, path, attached.parameter(layer, kind, path)), masks[name][path]
                )
            elif select == "magnitude" or density is connections is None:
                pool = SparseWeight.from_dense(dense, connections=counts[name][path])
            if pool is not None:
                setattr(made.get_submodule(parent), leaf, pool)
        _restrict(made, name, masks[name], limits, generator, masks[name])
        for path in weights[name]:
            trained = attached.parameter(layer, kind, path).requires_grad
            made.get_parameter(f"{path}.values").requires_grad_(trained)
        attached.move(made, layer, kind.plain(), set(kind.places(layer).values()))
        return made

    places = {name: set(found[name][1].places(found[name][0]).values()) for name in counts}
    model = swap(
        model,
        counts,
        sparse,
        lambda name, made: attached.settle(made, found[name][0], places[name]),
    )
    for module in model.modules():
        # An encoder asks its first layer alone whether nested tensors will do, and they do for
        # dense layers only.
        if isinstance(module, nn.TransformerEncoder) and any(True for _ in sparse_weights(module)):
            module.use_nested_tensor = False
    return model


def densify(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer] = ()) -> nn.Module:
    """Replace sparse layers by dense ones with zeros where no connection is, in place; returns the
    model.

    Biases, hooks, modes and what else belongs to a layer stay with it. A model that is itself a
    sparse layer is not replaced in place: use the returned module.

    Args:
        optimizers: those that train the model and go on doing so. The dense parameter takes the
            place of the pool's values in its parameter group, with their gradient and state, and
            the state of positions without a connection is what it starts at.

    Raises ValueError, and changes nothing, while a method or an optimizer not given still follows a
    pool, where an optimizer keeps what cannot be made dense, and for a layer with a
    parametrization, a hook on the gradient of its values, or a forward of its own.
    """
    optimizers = listed(optimizers)
    found = {name: (layer, kind) for name, layer, kind in layers_of(model, sparse_kind_of)}
    for name, (layer, _) in found.items():
        attached.check_sparse(name, layer)
    refuse_followed(dict(sparse_weights(model)), optimizers)
    parameters: dict[int, nn.Parameter] = {}
    targets: dict[int, Target] = {}

    def dense(name: str) -> nn.Module:
        layer, kind = found[name]
        made = kind.to_dense(layer)
        for path, weight in kind.weights(made).items():
            pool = layer.get_submodule(path)
            trained = layer.get_parameter(f"{path}.values").requires_grad
            if isinstance(weight, nn.Parameter):  # a pool that layers share stays shared
                parent, _, leaf = path.rpartition(".")
                weight.requires_grad_(trained)
                setattr(made.get_submodule(parent), leaf, parameters.setdefault(id(pool), weight))
            elif weight._base is not None:  # attention stacks its projections
                weight._base.requires_grad_(trained)
        attached.move(made, layer, kind.plain_sparse(), set())
        if optimizers:
            _hand_over(name, made, layer, kind, targets)
        return made

    made = {name: dense(name) for name in found}
    moves = moves_to_dense(optimizers, targets)
    model = swap(
        model, made, made.__getitem__, lambda name, new: attached.settle(new, found[name][0], set())
    )
    for move in moves:
        move.make()
    return model


@torch.no_grad()
def _hand_over(
    name: str, made: nn.Module, layer: nn.Module, kind: Kind, targets: dict[int, Target]
) -> None:
    """Let a dense layer have the gradients of the sparse one's pools; note what goes where.

    ``targets``: by the ``id`` of a pool's values.
    """
    names = {id(parameter): path for path, parameter in made.named_parameters()}
    for path, weight in kind.weights(made).items():
        pool = layer.get_submodule(path)
        assert isinstance(pool, SparseWeight)
        owner = weight if isinstance(weight, nn.Parameter) else weight._base
        assert isinstance(owner, nn.Parameter)
        first = 0 if owner is weight else int(weight.storage_offset() - owner.storage_offset())
        target = Target(join(name, names[id(owner)]), pool, owner, first)
        if id(pool.values) not in targets and pool.values.grad is not None:
            owner.grad = torch.zeros_like(owner) if owner.grad is None else owner.grad
            target.scatter(pool.values.grad, owner.grad)
        targets.setdefault(id(pool.values), target)


def param_groups(
    model: nn.Module, weight_decay: float, *, decay_sparse: bool = True
) -> list[dict[str, Any]]:
    """Two optimizer groups: sparse values and tensors of two or more dimensions with
    ``weight_decay``, others without.

    A pool's values are 1-D, so the usual rule "no decay for 1-D parameters" would leave them out.
    With ``decay_sparse=False`` they are left out: for methods that forbid decay of sparse values,
    such as DEEP R.
    """
    pools = {id(weight.values) for _, weight in sparse_weights(model)}
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (
                decayed
                if parameter.dim() >= 2 or (decay_sparse and id(parameter) in pools)
                else plain
            ).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _restrict(
    made: nn.Module,
    layer: str,
    paths: Iterable[str],
    limits: Limits | Mapping[str, Limits] | None,
    generator: torch.Generator | None,
    masks: Mapping[str, Tensor],
) -> None:
    """Give the pools of a layer that was just made the limits that are meant for them."""
    for path in paths:
        both = layer, join(layer, path)
        if isinstance(limits, Mapping):
            own = next(
                (
                    w
                    for pattern, w in limits.items()
                    if any(fnmatchcase(name, pattern) for name in both)
                ),
                None,
            )
        else:
            own = limits
        pool = made.get_submodule(path)
        if own is not None and isinstance(pool, SparseWeight):
            broken = (
                limited.violation(pool.index, *pool.matrix_shape, own) if path in masks else None
            )
            if broken:
                raise ValueError(f"the prune mask of {both[1]} does not keep the limits: {broken}")
            try:
                pool.restrict(own, generator)
            except ValueError as error:
                raise ValueError(f"{both[1]}: {error}") from None


def _refuse_disguised(
    model: nn.Module, only: Patterns | None, exclude: Patterns | None, given: Any
) -> None:
    """A layer that is meant but has become of another type must not stay dense in silence."""
    for name, module in model.named_modules():
        what = attached.disguised(module)
        meant = what is not None and (only is None or _matches(name, only))
        if isinstance(given, Mapping):
            meant = meant and any(
                fnmatchcase(n, p) for n in (name, join(name, "weight")) for p in given
            )
        if meant and given is not None and not (exclude is not None and _matches(name, exclude)):
            raise ValueError(f"{name or 'the model'} {what}")


def _kept(mask: Tensor | None, weight: Tensor) -> int:
    return weight.numel() if mask is None else int(mask.sum().item())


def _masked(weight: Tensor, mask: Tensor) -> SparseWeight:
    """A pool of the entries of ``weight`` where ``mask`` is true; of one empty slot if it is
    nowhere.
    """
    kept = mask.reshape(-1).nonzero().flatten()
    columns = weight.shape[1:].numel()
    values = weight.detach().reshape(-1)[kept]
    return SparseWeight.from_coo(
        weight.shape, kept // columns, kept % columns, values, capacity=max(kept.numel(), 1)
    )


def _matches(name: str, patterns: Patterns) -> bool:
    return any(
        fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns)
    )


def layers_of(
    model: nn.Module, kind: Callable[[nn.Module], Kind | None]
) -> Iterator[tuple[str, nn.Module, Kind]]:
    """Modules that are of some kind, each once, without what is inside of them."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inner and (found := kind(module)) is not None:
            inner |= {id(part) for part in module.modules()}
            yield name, module, found


def _counts(
    weights: Mapping[str, Mapping[str, Tensor]],
    density: float | Mapping[str, float] | None,
    connections: int | Mapping[str, int] | None,
    distribution: str,
    masks: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, dict[str, int]]:
    """Connections of each weight of each layer to convert; ``weights`` has the candidates, layer by
    layer.

    A weight with a prune mask has those of the mask; the others of its group share what is left of
    the budget.
    """
    given = density if density is not None else connections
    every = {
        (layer, name): tensor
        for layer, tensors in weights.items()
        for name, tensor in tensors.items()
    }
    if not every:
        return {}
    counts: dict[tuple[str, str], int] = {}
    for (title, budgeted), members in _groups(given, every).items():
        size = sum(every[key].numel() for key in members)
        total = (
            budget.connections_of(budgeted, size)
            if density is not None
            else _within(title, budgeted, size)
        )
        pruned = {
            key: _kept(masks[key[0]][key[1]], every[key])
            for key in members
            if key[1] in masks[key[0]]
        }
        members = [key for key in members if key not in pruned]
        total -= sum(pruned.values())
        # Pruning a share of a weight rounds for each weight, a density once.
        slack = len(pruned) if density is not None else 0
        if pruned and (total < len(members) if members else abs(total) > slack):
            kept, names = sum(pruned.values()), ", ".join(join(*key) for key in pruned)
            raise ValueError(
                f"the prune masks of {names} keep {kept} connections, which does not agree with "
                f"{kept + total}, what "
                f"{title} may have{' together with other weights' if members else ''}: leave "
                "density= and connections= "
                "out to take the masks as they are, or call torch.nn.utils.prune.remove(layer, "
                "name) to choose anew"
            )
        counts |= pruned
        shapes = [tuple(every[key].shape) for key in members]
        if members:
            counts |= zip(members, budget.distribute(distribution, shapes, total), strict=True)
    chosen = {layer for layer, _ in counts}
    for layer, name in every:
        if layer in chosen and (layer, name) not in counts:
            raise ValueError(
                f"a layer is sparse as a whole, but no pattern matches {join(layer, name)}"
            )
    return {
        layer: {name: counts[layer, name] for name in weights[layer]}
        for layer in weights
        if layer in chosen
    }


def _groups(
    given: Any, every: Mapping[tuple[str, str], Tensor]
) -> dict[tuple[str, Any], list[tuple[str, str]]]:
    """The weights that share a budget: (what to call them, their budget) -> (layer, weight) of
    each.
    """
    if not isinstance(given, Mapping):
        return {("the model", given): list(every)}
    names = {key: (key[0], join(*key)) for key in every}
    for pattern in given:
        if not any(fnmatchcase(name, pattern) for both in names.values() for name in both):
            raise ValueError(
                f"pattern {pattern!r} matches no layer; there are "
                f"{', '.join(dict.fromkeys(k[0] for k in every))}"
            )
    groups: dict[tuple[str, Any], list[tuple[str, str]]] = {}
    for key, both in names.items():
        pattern = next((p for p in given if any(fnmatchcase(name, p) for name in both)), None)
        if pattern is not None:
            title = both[0] if fnmatchcase(both[0], pattern) else both[1]
            groups.setdefault((title, given[pattern]), []).append(key)
    return groups


def _within(name: str, connections: float | None, size: int) -> int:
    if connections is None or not 1 <= connections <= size or int(connections) != connections:
        raise ValueError(f"{name} can have between 1 and {size} connections, not {connections}")
    return int(connections)


def refuse_shared(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Replacing one of two layers that share a parameter would quietly untie them."""
    tied = ties(model)
    for layer in chosen.values():
        for module in layer.modules():
            if id(module) in tied:
                path, what = tied[id(module)]
                raise ValueError(f"{path} shares its {what}: exclude both, or untie them first")


def ties(model: nn.Module) -> dict[int, tuple[str, str]]:
    """The modules (by ``id``) that share a parameter: their name, and "weight with other.weight" in
    words.
    """
    owners: dict[int, list[tuple[int, str, str]]] = {}
    for path, owner in model.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((id(owner), path, name))
    found: dict[int, tuple[str, str]] = {}
    for several in owners.values():
        if len(several) > 1:
            for i, (module, path, name) in enumerate(several):
                _, other, leaf = several[1 if i == 0 else 0]
                found.setdefault(module, (path, f"{name} with {join(other, leaf)}"))
    return found


def swap(
    model: nn.Module,
    names: Sequence[str] | Mapping[str, Any],
    make: Callable[[str], nn.Module],
    settle: Callable[[str, nn.Module], None],
) -> nn.Module:
    """Make all replacements first, then put them in, under every name a module has: on an error
    nothing has changed.

    ``settle`` does what must not be done before, with the name and what was made.
    """
    made = {name: make(name) for name in names}
    old = {id(model.get_submodule(name)): module for name, module in made.items()}
    for name in made:
        settle(name, made[name])
    if id(model) in old:
        return old[id(model)]
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and id(module) in old:
                setattr(parent, child, old[id(module)])
    return model
