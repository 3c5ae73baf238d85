"""The registry: every method described as data beside its class. Command line, docs and tests are
made from it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from textwrap import fill
from types import ModuleType
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from rewire.methods.core.base import Memory, Method
from rewire.methods.core.parameters import Parameter

__all__ = ["MethodInfo", "Parameter", "available", "create", "info", "register"]


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method.

    keeps_budget: how K is kept: "every step" (exactly, after every step), "every update", "at most"
        (never more, perhaps fewer), or "no".
    memory: "O(K)" (truly sparse) or "O(M)" (needs dense state).
    needs: "" or what the method must be given ("gradients", "activations", a trained model, ...).
        "activations" means that its constructor takes ``data=`` (`rewire.methods.core.base.Data`).
    """

    name: str
    cls: type[Method]
    paper: str
    summary: str
    keeps_budget: str
    memory: Memory
    guarantees: tuple[str, ...]
    needs: str = ""

    def _of_kind(self, kind: str) -> dict[str, Parameter]:
        found = self.cls.declared().items()
        return {name: parameter for name, parameter in found if parameter.declared.kind == kind}

    def parameters(self) -> dict[str, Parameter]:
        """The method's hyper-parameters by name, as its class declares them."""
        return self._of_kind("parameter")

    @property
    def takes_data(self) -> bool:
        """Whether the constructor takes ``data=``: batches to compute activations from."""
        return "data" in self.services

    @property
    def services(self) -> tuple[str, ...]:
        """Keyword arguments of the constructor that are no hyper-parameters: what the training loop
        provides ("seed", "data", "total_steps", ...), and the final budget ("connections", ...).
        """
        hidden = {"weights_named"}
        return tuple({**self._of_kind("service"), **self._of_kind("budget")}.keys() - hidden)

    @property
    def start_density(self) -> float | None:
        """The density that pools are to be built with, for methods that come down to their budget;
        None: at it.
        """
        return self.cls.start_density

    @property
    def limits(self) -> tuple[str, ...]:
        """The kinds of `rewire.budget.Limits` that the method keeps at every step: "fan-in",
        "fan-out", "block".
        """
        return self.cls.keeps_limits

    @property
    def prior(self) -> bool:
        """Whether the method keeps allowed positions and frozen connections
        (`rewire.topology.Prior`).
        """
        return self.cls.keeps_prior

    @property
    def takes_budget(self) -> bool:
        """Whether the constructor takes the final budget (``connections=``; see
        `rewire.methods.pruning.shrink`).
        """
        return "connections" in self.services


_METHODS: dict[str, MethodInfo] = {}
_M = TypeVar("_M", bound=type[Method])


def register(
    *,
    name: str,
    paper: str,
    summary: str,
    guarantees: Iterable[str] | None = None,
    keeps_budget: str | None = None,
    memory: Memory | None = None,
    needs: str = "",
) -> Callable[[_M], _M]:
    """Class decorator that enters a method into the registry under ``name`` (what the command line
    calls it).

    ``keeps_budget`` and ``memory`` are those that its class or family declares
    (`Method.keeps_budget`, `Method.memory`) unless they are given here, and ``guarantees`` those of
    the method that it is a variant of.
    """

    def enter(cls: _M) -> _M:
        if name in _METHODS:
            raise ValueError(
                f"a method called {name!r} is registered already "
                f"({_METHODS[name].cls.__qualname__})"
            )
        _document(cls)
        _METHODS[name] = MethodInfo(
            name,
            cls,
            paper,
            summary,
            keeps_budget or cls.keeps_budget,
            memory or cls.memory,
            _inherited(cls) if guarantees is None else tuple(guarantees),
            needs,
        )
        return cls

    return enter


def _inherited(cls: type[Method]) -> tuple[str, ...]:
    """The guarantees of the nearest base class that is registered; of none, nothing."""
    known = {entry.cls: entry.guarantees for entry in _METHODS.values()}
    return next((known[base] for base in cls.__mro__[1:] if base in known), ())


def load_package(package: ModuleType) -> None:
    """Import all modules below ``package``, so that the methods in them are registered."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


#: Packages offer methods of their own in this group of entry points, by the name they are
#: registered under.
ENTRY_POINTS = "rewire.methods"
_LOADED: set[str] = set()


def _load_entry_points() -> None:
    """Import what other packages offer, once. One that fails is left out, with a warning that names
    it.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.value in _LOADED:
            continue
        _LOADED.add(entry.value)
        try:
            cls = entry.load()
            if entry.name not in _METHODS or _METHODS[entry.name].cls is not cls:
                raise ValueError(
                    f"it is not registered as {entry.name!r}: put @rewire.methods.register on it"
                )
        except Exception as error:  # another package's code: it must not take ours down
            package = entry.dist.name if entry.dist else "a package"
            warnings.warn(
                f"the method {entry.name!r} of {package} ({entry.value}) cannot be used: {error}",
                stacklevel=3,
            )


def available() -> list[str]:
    """Names of all methods, sorted; also of those that other packages offer by entry points."""
    _load_entry_points()
    return sorted(_METHODS)


def info(name: str) -> MethodInfo:
    """The registry's entry for ``name``; ValueError with the names there are, and the nearest,
    otherwise.
    """
    if name not in _METHODS:
        _load_entry_points()
    if name in _METHODS:
        return _METHODS[name]
    near = get_close_matches(name, _METHODS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown method {name!r}: choose one of {', '.join(available())}{hint}")


def create(
    name: str, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], **parameters: Any
) -> Method:
    """Make the method called ``name`` with its hyper-parameters; ValueError names a parameter it
    does not have.
    """
    entry = info(name)
    allowed = entry.parameters()
    for given in parameters:
        if given not in allowed and given not in entry.services:
            near = get_close_matches(given, allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            names = ", ".join(allowed) or "none"
            raise ValueError(f"{name} has no parameter {given!r}: it has {names}{hint}")
    for needed in entry.cls.declared().values():
        if needed.default is MISSING and needed.name not in parameters:
            raise ValueError(f"{name} needs {needed.name}=: {needed.help}")
    return entry.cls(model, optimizer, **parameters)


def _document(cls: type[Method]) -> None:
    """Add the declared arguments to the class's docstring, for ``help(cls)``."""
    lines = []
    for found in cls.declared().values():
        if found.name != "weights_named":
            what = f"{found.name}: {found.help}"
            if found.declared.kind == "parameter":
                allowed = found.allowed()
                what += f". {allowed[:1].upper()}{allowed[1:]}; default {found.default!r}"
            lines.append(fill(what, 92, initial_indent=" " * 4, subsequent_indent=" " * 8) + ".")
    cls.__doc__ = f"{inspect.getdoc(cls) or ''}\n\nArgs:\n" + "\n".join(lines)
