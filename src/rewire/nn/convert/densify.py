"""Make the sparse layers of a model dense, in place; optimizers follow. The mirror image of
`rewire.nn.convert.cut`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.nn.convert import attached
from rewire.nn.convert.kinds import Kind, join, sparse_kind_of
from rewire.nn.convert.replacing import layers_of, swap
from rewire.nn.layers.adapted import refuse_adapted
from rewire.nn.optimizers.ages import KEY as AGE
from rewire.nn.optimizers.followers import check_optimizer, following, initial_of
from rewire.nn.optimizers.membership import split_state
from rewire.nn.optimizers.wrappers import inner_optimizers, kept_beside, listed
from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight

__all__ = ["densify", "refuse_rewired"]


def densify(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer] = ()) -> nn.Module:
    """Replace sparse layers by dense ones, with zeros where there is no connection, in place;
    returns the model.

    Biases, hooks, modes and anything else set on a layer stay with it. If the model is a sparse
    layer itself, use the module returned.

    Args:
        optimizers: those that train the model and will go on. The dense parameter takes the place
            of the sparse weight's values in its group, with gradient and state; the state of
            positions without a connection gets its initial value.

    Raises ValueError, and changes nothing, while a method or an optimizer that was not given still
    follows a sparse weight, if an optimizer keeps state that cannot be made dense, and for a layer
    with a parametrization, a hook on the gradient of its values, or an assigned forward.
    """
    optimizers = listed(optimizers)
    refuse_adapted(model)
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
            if isinstance(weight, nn.Parameter):  # what layers share stays shared
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
    model = swap(model, made, made.__getitem__)
    for move in moves:
        move.make()
    return model


@torch.no_grad()
def _hand_over(
    name: str, made: nn.Module, layer: nn.Module, kind: Kind, targets: dict[int, Target]
) -> None:
    """Give a dense layer the gradients of the sparse one, and note in ``targets``, by the ``id`` of
    the values, where each weight goes.
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


@dataclass(frozen=True)
class Target:
    """The dense parameter for a sparse weight, its name, and the place of the weight's first entry
    in it (attention stacks three weights in one parameter).
    """

    name: str
    pool: SparseWeight
    parameter: nn.Parameter
    first: int

    def scatter(self, per_slot: Tensor, into: Tensor) -> None:
        """Write the numbers of slots to the positions of their connections."""
        slots = self.pool.active()
        columns = self.pool.matrix_shape[1]
        places = self.pool.rows[slots].long() * columns + self.pool.cols[slots].long() + self.first
        into.view(-1)[places] = per_slot.detach()[slots].to(into)


@dataclass(frozen=True)
class Move:
    """Sparse weights in a group of an optimizer that become one dense parameter, and their state:
    tensors with a number per slot, and the rest.
    """

    optimizer: Optimizer
    group: dict[str, Any]
    targets: list[Target]
    per_slot: dict[str, list[Tensor]]
    rest: dict[str, Any]

    @torch.no_grad()
    def make(self) -> None:
        """Put the dense parameter in the place of the values (of the first, if there are
        several).
        """
        parameter = self.targets[0].parameter
        gone = {id(target.pool.values) for target in self.targets}
        members: list[Tensor] = self.group["params"]
        places = [i for i, member in enumerate(members) if id(member) in gone]
        if places:  # else it was done for another optimizer that shares the group
            members[places[0]] = parameter
            names: list[str] | None = self.group.get("param_names")
            if names is not None:
                names[places[0]] = self.targets[0].name
            for place in reversed(places[1:]):
                del members[place]
                if names is not None:
                    del names[place]
        state: dict[Any, Any] = self.optimizer.state
        if not any(target.pool.values in state for target in self.targets):
            return
        made = dict(self.rest)
        for key, parts in self.per_slot.items():
            initial = initial_of(self.optimizer, key, self.group)
            dense = torch.empty(parameter.shape, dtype=parts[0].dtype, device=parts[0].device)
            if initial is None:
                dense.copy_(parameter)
            else:
                dense.fill_(initial)
            for target, part in zip(self.targets, parts, strict=True):
                target.scatter(part, dense)
            made[key] = dense
        if _factored(self.optimizer) and "variance" in made and parameter.dim() > 1:
            variance = made.pop("variance")
            made["row_var"] = variance.mean(-1, keepdim=True)
            made["col_var"] = variance.mean(-2, keepdim=True)
        for target in self.targets:
            state.pop(target.pool.values, None)
        state[parameter] = made


def _factored(optimizer: Optimizer) -> bool:
    return any(c.__name__ == "Adafactor" for c in type(optimizer).__mro__)


def moves_to_dense(optimizers: Iterable[Optimizer], targets: Mapping[int, Target]) -> list[Move]:
    """What to do to the optimizers; ``targets`` by the ``id`` of the values.

    Raises ValueError if the parts of a weight are in several groups, or if an optimizer keeps
    tensors that do not have one number for each connection.
    """
    found = []
    for optimizer in optimizers:
        for member in inner_optimizers(optimizer):
            for group in member.param_groups:
                mine = [targets[id(p)] for p in group["params"] if id(p) in targets]
                together: dict[int, list[Target]] = {}
                for target in mine:
                    together.setdefault(id(target.parameter), []).append(target)
                for parts in together.values():
                    whole = [t for t in targets.values() if t.parameter is parts[0].parameter]
                    if len(parts) != len(whole):
                        raise ValueError(
                            f"{parts[0].name} is made of {len(whole)} pools, and "
                            f"{type(optimizer).__name__} has {len(parts)} of them in one parameter "
                            "group: put them into the same group, or make a new optimizer after "
                            "densify()"
                        )
                    found.append(_move(member, group, parts))
        check_optimizer(optimizer)
    return found


def _move(optimizer: Optimizer, group: dict[str, Any], targets: list[Target]) -> Move:
    values = {id(target.pool.values): target for target in targets}
    title = type(optimizer).__name__
    for kept in kept_beside(optimizer):
        if kept.parameter is not None and id(kept.parameter) in values:
            raise ValueError(
                f"{title} keeps {kept.name} of {targets[0].name} beside optimizer.state, where it "
                "cannot be made dense: make a new optimizer after densify(), or keep it in "
                "optimizer.state[parameter]"
            )
    states = [dict(optimizer.state.get(target.pool.values, {})) for target in targets]
    for state in states:
        state.pop(AGE, None)  # a dense parameter has one age, its optimizer's step
    if len({frozenset(state) for state in states}) > 1:
        raise ValueError(
            f"{title} has trained only some of the pools that {targets[0].name} is made of"
        )
    capacities = [(target.pool.capacity,) for target in targets]
    first, rest = split_state(
        optimizer,
        states[0],
        lambda key, value: [getattr(s[key], "shape", None) for s in states] == capacities,
        f"the {targets[0].pool.capacity} slots of {targets[0].name}",
        ("made dense", "densify()"),
    )
    per_slot = {key: [state[key] for state in states] for key in first}
    return Move(optimizer, group, targets, per_slot, rest)


def refuse_rewired(pools: Mapping[str, SparseWeight], call: str) -> None:
    """Raise ValueError if a method still rewires one of the weights; ``call``: what it has to do
    before.
    """
    for name, pool in pools.items():
        if getattr(pool.owner(), "attached", False):
            raise ValueError(
                f"a method still rewires {name}: call its finalize() before {call}, or take a "
                "copy.deepcopy of the model"
            )


def refuse_followed(pools: Mapping[str, SparseWeight], optimizers: Iterable[Optimizer]) -> None:
    """Raise ValueError if a method, or an optimizer not among ``optimizers``, still follows one of
    the weights.
    """
    refuse_rewired(pools, "densify()")
    given = {id(member) for optimizer in optimizers for member in inner_optimizers(optimizer)}
    for name, pool in pools.items():
        for optimizer in following(pool):
            if id(optimizer) not in given:
                raise ValueError(
                    f"{type(optimizer).__name__} trains {name} and would train nothing afterwards: "
                    "give it to densify(model, optimizers), which carries its state over, or "
                    "densify a copy.deepcopy of the model"
                )
