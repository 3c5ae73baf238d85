"""Which components of a model the user's patterns name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from rewire.methods.differentiable.targets import last_affine, parametrization
from rewire.nn.convert.replacing import ties

__all__ = ["chosen"]


def chosen(
    model: nn.Module, names: Mapping[str, Sequence[str] | None], gate: str
) -> dict[str, list[str]]:
    """The layers that the patterns of each target choose, checked; ValueError says which do not
    fit.
    """
    modules = dict(model.named_modules())
    tied = ties(model)

    def unfit(kind: str, name: str) -> str | None:
        return _fits(kind, modules[name], gate, tied)

    if all(patterns is None for patterns in names.values()):
        linear = [name for name, module in modules.items() if type(module) is nn.Linear][:-1]
        units = [name for name in linear if unfit("units", name) is None]
        if not units:
            looked = ", ".join(f"{n} {unfit('units', n)}" for n in linear) or "there is none"
            raise ValueError(
                "the model has no Linear layer but the last whose units could be gated "
                f"({looked}): say what to gate, with units=, weights=, heads= or branches="
            )
        return {"units": units, "weights": [], "heads": [], "branches": []}
    found: dict[str, list[str]] = {}
    for kind, patterns in names.items():
        found[kind] = []
        for pattern in patterns or ():
            matches = [name for name in modules if name and fnmatchcase(name, pattern)]
            if kind == "branches":  # "bodies.*" means the bodies, not also the layers in them
                matches = [
                    name
                    for name in matches
                    if not any(name.startswith(f"{other}.") for other in matches)
                ]
            else:
                fitting = [name for name in matches if unfit(kind, name) is None]
                if matches and not fitting:
                    raise ValueError(f"{kind}={pattern!r}: {matches[0]} {unfit(kind, matches[0])}")
                matches = fitting if any(c in pattern for c in "*?[") else matches
            if not matches:
                raise ValueError(f"{kind}={pattern!r} matches no module of the model")
            found[kind] += [name for name in matches if name not in found[kind]]
        for name in found[kind]:
            if (reason := unfit(kind, name)) is not None:
                raise ValueError(f"{kind}: {name} {reason}")
    twice = set(found["units"]) & set(found["weights"])
    if twice:
        raise ValueError(
            f"{', '.join(sorted(twice))} would have gates on units and on weights: choose one"
        )
    nested = [(a, b) for a in found["branches"] for b in found["branches"] if b.startswith(a + ".")]
    if nested:
        raise ValueError(f"branches: {nested[0][1]} lies within {nested[0][0]}: choose one of them")
    return found


def _fits(
    kind: str, module: nn.Module, gate: str, tied: Mapping[int, tuple[str, str]]
) -> str | None:
    """Why the module cannot be such a target; None if it can. ``tied``: see
    `rewire.nn.convert.replacing.ties`.
    """
    if parametrize.is_parametrized(module) and not (kind == "weights" and parametrization(module)):
        return "is parametrized already"
    own = type(module) if not parametrize.is_parametrized(module) else type(module).__bases__[0]
    scaled = module if kind != "branches" else last_affine(module) or module
    for part in scaled.modules():
        if id(part) in tied:  # baking the gate into one layer would scale the other as well
            return f"shares its {tied[id(part)][1]}: untie them first, or leave it out"
    what = own.__name__
    if kind == "heads":
        return (
            None
            if type(module) is nn.MultiheadAttention
            else (f"is a {what}, and only MultiheadAttention has heads")
        )
    if kind == "branches":
        if last_affine(module) is not None:
            return None
        return (
            f"({what}) does not end in a Linear, Conv or BatchNorm layer with weights, which could "
            "take its factor"
        )
    allowed = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if kind == "units" and gate != "group" and isinstance(module, _BatchNorm):
        return None if module.affine else "has no affine parameters to take the gate (affine=False)"
    if own in allowed:
        return None
    more = "" if kind == "weights" or gate == "group" else ", BatchNorm"
    return f"is a {what}: allowed are Linear, Conv1d, Conv2d, Conv3d{more}"
