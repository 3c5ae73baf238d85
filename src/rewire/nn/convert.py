"""Convert models between dense and sparse layers, in place, and walk over their sparse weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewire import budget
from rewire.nn.conv import SparseConv1d, SparseConv2d, SparseConv3d
from rewire.nn.layer import SparseLayer
from rewire.nn.linear import SparseLinear
from rewire.nn.weight import SparseWeight

__all__ = ["densify", "param_groups", "sparse_weights", "sparsify"]

Patterns = str | Sequence[str]


@dataclass(frozen=True)
class _Twins:
    """A dense layer type, its sparse twin, and which arguments both have besides weight, bias, device and dtype.

    sizes: positional arguments of the dense class; settings: keyword arguments of both, kept as attributes.
    """

    dense: type[nn.Module]
    sparse: type[SparseLayer]
    sizes: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def to_sparse(self, layer: Any, weight: SparseWeight, bias: Tensor | None) -> SparseLayer:
        make: Any = self.sparse
        made: SparseLayer = make.from_weight(weight, bias, **self._settings(layer))
        return made

    def to_dense(self, layer: SparseLayer) -> Any:
        """With the values of ``layer``; nothing is drawn."""
        twin: Any = nn.utils.skip_init(
            self.dense,
            *(getattr(layer, name) for name in self.sizes),
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
            **self._settings(layer),
        )
        with torch.no_grad():
            twin.weight.copy_(layer.weight.to_dense())
            if layer.bias is not None:
                twin.bias.copy_(layer.bias)
        twin.weight.requires_grad_(layer.weight.values.requires_grad)
        if layer.bias is not None:
            twin.bias.requires_grad_(layer.bias.requires_grad)
        return twin.train(layer.training)

    def _settings(self, layer: nn.Module) -> dict[str, Any]:
        return {name: getattr(layer, name) for name in self.settings}


_CONV = ("in_channels", "out_channels", "kernel_size"), ("stride", "padding", "dilation", "groups", "padding_mode")
#: The layer types that are converted; another one is another entry.
_TWINS = (
    _Twins(nn.Linear, SparseLinear, ("in_features", "out_features")),
    _Twins(nn.Conv1d, SparseConv1d, *_CONV),
    _Twins(nn.Conv2d, SparseConv2d, *_CONV),
    _Twins(nn.Conv3d, SparseConv3d, *_CONV),
)
_TO_SPARSE = {twins.dense: twins for twins in _TWINS}


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

    Layers converted: `torch.nn.Linear`, `Conv1d`, `Conv2d` and `Conv3d` themselves (not subclasses, whose forward may
    differ). Make the optimizer afterwards: the old parameters are gone. Raises ValueError if nothing matches or the
    budget cannot be met; the model is then unchanged.
    """
    if (density is None) == (connections is None):
        raise ValueError("give exactly one of density= and connections=")
    if select not in ("random", "magnitude"):
        raise ValueError(f"select must be 'random' or 'magnitude', not {select!r}")
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in _TO_SPARSE
        and (only is None or _matches(name, only))
        and not (exclude is not None and _matches(name, exclude))
    }
    counts = _counts(found, density, connections, distribution)
    if not counts:
        kinds = ", ".join(twins.dense.__name__ for twins in _TWINS)
        raise ValueError(
            f"no layer to convert: sparsify converts torch.nn's {kinds}, and only=, exclude= or the patterns of "
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
    found = {
        name: (twins, module)
        for name, module in model.named_modules()
        for twins in _TWINS
        if isinstance(module, twins.sparse)
    }
    weights: dict[int, nn.Parameter] = {}

    def dense(name: str) -> nn.Module:
        twins, layer = found[name]
        twin = twins.to_dense(layer)
        twin.weight = weights.setdefault(id(layer.weight), twin.weight)  # a pool that layers share stays shared
        module: nn.Module = twin
        return module

    return _swap(model, found, dense)


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
    found: Mapping[str, Any],
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


def _refuse_shared(model: nn.Module, found: Mapping[str, Any], counts: Mapping[str, int]) -> None:
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


def _sparse(layer: Any, connections: int, select: str, generator: torch.Generator | None) -> nn.Module:
    twins = _TO_SPARSE[type(layer)]
    dense: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if select == "magnitude":
        sparse = twins.to_sparse(layer, SparseWeight.from_dense(dense, connections=connections), bias)
    else:
        weight = SparseWeight(dense.shape, connections, generator=generator, device=dense.device, dtype=dense.dtype)
        sparse = twins.to_sparse(layer, weight, bias)
        sparse.reset_parameters(generator)
        if bias is not None:
            with torch.no_grad():
                sparse.bias.copy_(bias)
    sparse.weight.values.requires_grad_(dense.requires_grad)
    if bias is not None:
        sparse.bias.requires_grad_(bias.requires_grad)
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
