"""Convert models between dense and sparse layers, in place, and walk over their sparse weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewire import budget
from rewire.nn.linear import SparseLinear
from rewire.nn.weight import SparseWeight

__all__ = ["densify", "param_groups", "sparse_weights", "sparsify"]

Patterns = str | Sequence[str]


def sparse_weights(model: nn.Module) -> Iterator[tuple[str, SparseWeight]]:
    """Every pool of ``model`` once, with its name (``"0.weight"``), in module order; shared ones by first name."""
    for name, module in model.named_modules():
        if isinstance(module, SparseWeight):
            yield name, module


def sparsify(
    model: nn.Module,
    *,
    density: float | Mapping[str, float] | None = None,
    connections: int | Mapping[str, int] | None = None,
    distribution: str = "erk",
    only: Patterns | None = None,
    exclude: Patterns | None = None,
    select: Literal["random", "magnitude"] = "random",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace dense layers by sparse ones that keep within a budget, in place; returns the model.

    Args:
        density: share of the chosen layers' potential connections to have in total, spread by ``distribution``; or a
            dict from glob pattern to the density of each layer it matches (the first match counts, layers without one
            stay dense).
        connections: the same as a number of connections.
        distribution: a name in `rewire.budget.DISTRIBUTIONS` ("erk", "er", "uniform").
        only, exclude: glob patterns over layer names (``"encoder.*"``), one or several.
        select: "random" draws a random topology with fresh values, for training from scratch; "magnitude" keeps the
            largest weights and their values, for a trained model. Biases are kept in both.
        generator: for the random draws.

    Layers converted: `torch.nn.Linear` itself (not subclasses, whose forward may differ). Make the optimizer
    afterwards: the old parameters are gone. Raises ValueError if nothing matches or the budget cannot be met;
    the model is then unchanged.
    """
    if (density is None) == (connections is None):
        raise ValueError("give exactly one of density= and connections=")
    if select not in ("random", "magnitude"):
        raise ValueError(f"select must be 'random' or 'magnitude', not {select!r}")
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (only is None or _matches(name, only))
        and not (exclude is not None and _matches(name, exclude))
    }
    counts = _counts(found, density, connections, distribution)
    if not counts:
        raise ValueError(
            "no layer to convert: sparsify converts torch.nn.Linear layers, and only=, exclude= or the patterns of "
            "the budget leave none of them"
        )
    _refuse_shared(model, found, counts)
    model = _swap(model, counts, lambda name: _sparse(found[name], counts[name], select, generator))
    _leave_fused_paths(model)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace sparse layers by dense ones with zeros where no connection is, in place; returns the model.

    A model that is itself a sparse layer is not replaced in place: use the returned module.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    layers = dict(model.named_modules())
    weights: dict[int, nn.Parameter] = {}

    def dense(name: str) -> nn.Module:
        layer = layers[name]
        assert isinstance(layer, SparseLinear)
        twin = nn.utils.skip_init(
            nn.Linear,
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        with torch.no_grad():
            twin.weight.copy_(layer.weight.to_dense())
            if layer.bias is not None:
                twin.bias.copy_(layer.bias)
        twin.weight.requires_grad_(layer.weight.values.requires_grad)
        if layer.bias is not None:
            twin.bias.requires_grad_(layer.bias.requires_grad)
        twin.weight = weights.setdefault(id(layer.weight), twin.weight)  # a pool that layers share stays shared
        mode: nn.Module = twin.train(layer.training)
        return mode

    return _swap(model, names, dense)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: sparse values and tensors of two or more dimensions with ``weight_decay``, others without.

    A pool's values are 1-D, so the usual rule "no decay for 1-D parameters" would leave them out.
    """
    pools = {id(weight.values) for _, weight in sparse_weights(model)}
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 or id(parameter) in pools else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _matches(name: str, patterns: Patterns) -> bool:
    return any(fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))


def _counts(
    found: Mapping[str, nn.Linear],
    density: float | Mapping[str, float] | None,
    connections: int | Mapping[str, int] | None,
    distribution: str,
) -> dict[str, int]:
    """Connections of each layer to convert."""
    given = density if density is not None else connections
    if isinstance(given, Mapping):
        unused = [p for p in given if not any(fnmatchcase(name, p) for name in found)]
        if unused:
            raise ValueError(f"pattern {unused[0]!r} matches no layer; there are {', '.join(found) or 'none'}")
        chosen = {name: next(p for p in given if fnmatchcase(name, p)) for name in found if _matches(name, list(given))}
        return {
            name: budget.connections_of(given[p], found[name].weight.numel())
            if density is not None
            else _within(name, given[p], found[name].weight.numel())
            for name, p in chosen.items()
        }
    if not found:
        return {}
    sizes = sum(layer.weight.numel() for layer in found.values())
    total = budget.connections_of(given, sizes) if density is not None else _within("the model", given, sizes)  # type: ignore[arg-type]
    shapes = [tuple(layer.weight.shape) for layer in found.values()]
    return dict(zip(found, budget.distribute(distribution, shapes, total), strict=True))


def _within(name: str, connections: float | None, size: int) -> int:
    if connections is None or not 1 <= connections <= size or int(connections) != connections:
        raise ValueError(f"{name} can have between 1 and {size} connections, not {connections}")
    return int(connections)


def _refuse_shared(model: nn.Module, found: Mapping[str, nn.Linear], counts: Mapping[str, int]) -> None:
    """A parameter that another module uses as well (a tied embedding, say) would silently become two."""
    homes: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            homes.setdefault(id(parameter), []).append(name)
    for name in counts:
        for kind, parameter in found[name].named_parameters(recurse=False):
            others = [home for home in homes[id(parameter)] if home != name]
            if others:
                raise ValueError(f"{name} shares its {kind} with {others[0]}: exclude {name}, or untie them first")


def _sparse(layer: nn.Linear, connections: int, select: str, generator: torch.Generator | None) -> SparseLinear:
    if select == "magnitude":
        weight = SparseWeight.from_dense(layer.weight, connections=connections)
        sparse = SparseLinear.from_weight(weight, layer.bias)
    else:
        sparse = SparseLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.weight.device,
            layer.weight.dtype,
            connections=connections,
            generator=generator,
        )
        if layer.bias is not None:
            with torch.no_grad():
                sparse.bias.copy_(layer.bias)
    sparse.weight.values.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        sparse.bias.requires_grad_(layer.bias.requires_grad)
    return sparse.train(layer.training)


def _swap(model: nn.Module, names: Sequence[str] | Mapping[str, Any], make: Callable[[str], nn.Module]) -> nn.Module:
    """Make all replacements first, then put them in, under every name a module has: on an error nothing has changed."""
    made = {name: make(name) for name in names}
    old = {id(model.get_submodule(name)): module for name, module in made.items()}
    if id(model) in old:
        return old[id(model)]
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and id(module) in old:
                setattr(parent, child, old[id(module)])
    return model


def _leave_fused_paths(model: nn.Module) -> None:
    """Transformer encoders in evaluation hand weights to a fused kernel, past the layers: make them call the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(sparse_weights(module)):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(sparse_weights(module)):
            module.use_nested_tensor = False
