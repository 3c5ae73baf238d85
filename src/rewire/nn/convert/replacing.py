"""Which layers a conversion replaces, and putting others in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from rewire.nn.convert.kinds import Kind, join

__all__ = ["layers_of", "refuse_shared", "swap", "ties"]


def layers_of(
    model: nn.Module, kind: Callable[[nn.Module], Kind | None]
) -> Iterator[tuple[str, nn.Module, Kind]]:
    """Modules that are of some kind, each once, without what is inside of them."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inner and (found := kind(module)) is not None:
            inner |= {id(part) for part in module.modules()}
            yield name, module, found


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
