"""Finds the layers that a conversion replaces, and puts others in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from torch import nn

from rewire.nn.convert import attached
from rewire.nn.convert.kinds import Kind, join
from rewire.nn.weight.listing import sparse_weights

__all__ = ["layers_of", "refuse_shared", "swap", "ties"]


def layers_of(
    model: nn.Module, kind: Callable[[nn.Module], Kind | None]
) -> Iterator[tuple[str, nn.Module, Kind]]:
    """Modules for which ``kind`` gives a kind, each once, without the modules inside of them."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inner and (found := kind(module)) is not None:
            inner |= {id(part) for part in module.modules()}
            yield name, module, found


def refuse_shared(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a chosen layer shares a parameter, which replacing it would untie."""
    tied = ties(model)
    for layer in chosen.values():
        for module in layer.modules():
            if id(module) in tied:
                path, what = tied[id(module)]
                raise ValueError(f"{path} shares its {what}: exclude both, or untie them first")


def ties(model: nn.Module) -> dict[int, tuple[str, str]]:
    """The modules (by ``id``) that share a parameter: their name, and words such as "weight with
    other.weight".
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
    names: Iterable[str],
    make: Callable[[str], nn.Module],
    replaced: Mapping[str, set[tuple[nn.Module, str]]] = MappingProxyType({}),
) -> nn.Module:
    """Replace the layers of these names, under every name that a module has; returns the model.

    All replacements are made before the first is put in its place, so nothing has changed on an
    error. ``replaced``: see `rewire.nn.convert.attached.move`.
    """
    layers = {name: model.get_submodule(name) for name in names}
    made = {name: make(name) for name in layers}
    for name, layer in layers.items():
        attached.settle(made[name], layer, replaced.get(name, set()))
    new = {id(layer): made[name] for name, layer in layers.items()}
    if id(model) in new:
        return new[id(model)]
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and id(module) in new:
                setattr(parent, child, new[id(module)])
    for parent in model.modules():
        # An encoder asks only its first layer whether it supports nested tensors, which no encoder
        # with sparse layers does.
        if isinstance(parent, nn.TransformerEncoder) and any(sparse_weights(parent)):
            parent.use_nested_tensor = False
    return model
