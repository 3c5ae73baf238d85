"""Hyper-parameters, each declared once: its type, default, bounds and help.

::

    class RigL(Rewiring):
        fraction: Share | Schedule = parameter(default=0.3, help="share to replace")

A method is a dataclass, and `parameter` makes a field that carries a `Declaration`. The
constructor, its checks and error texts, the registry, ``--set``, the settings in a saved state,
``rewire methods NAME`` and the documentation all come from these fields. (They are standard
dataclass fields, so `dataclasses.fields` lists them and type checkers know the constructor.)
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from typing_extensions import dataclass_transform

from rewire.schedules import Schedule, at, checked

__all__ = [
    "Count",
    "Declaration",
    "Declared",
    "Epochs",
    "NonNegative",
    "Parameter",
    "Patterns",
    "PerLayer",
    "Share",
    "Steps",
    "check",
    "data_field",
    "fits",
    "fraction_field",
    "kinds_of",
    "moments_field",
    "parameter",
    "per_layer",
    "service",
    "setting",
]

#: One number (or schedule) for all layers, a list of them in the model's order, or a dict from glob
#: pattern to them.
PerLayer: TypeAlias = float | Schedule | Sequence[float | Schedule] | Mapping[str, float | Schedule]
#: Glob patterns over names of layers (``"encoder.*"``) or weights (``"lstm.weight_hh_l0"``), one or
#: several.
Patterns: TypeAlias = str | Sequence[str]

_KEY = "rewire"


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What is declared of a constructor argument besides its name, type and default.

    low, high: bounds of a number (of every number of a schedule), which are allowed themselves.
    above, below: bounds that are not. unit: what a whole number counts ("steps", "epochs").
    saved: loading a state refuses another value. kind: "parameter" for a hyper-parameter; "budget"
    for the final budget, "service" for what the training loop provides, which ``--set`` does not
    take. check: further checks of a value that is not None; it raises ValueError.
    """

    help: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    unit: str = ""
    saved: bool = False
    kind: Literal["parameter", "budget", "service"] = "parameter"
    check: Callable[[str, Any], object] | None = None

    def limits(self) -> str:
        """The bounds in words, or ""."""
        low = f"at least {self.low:g}" if self.low > -math.inf else ""
        low = f"above {self.above:g}" if self.above > -math.inf else low
        high = f"at most {self.high:g}" if self.high < math.inf else ""
        high = f"below {self.below:g}" if self.below < math.inf else high
        if low.startswith("at least") and high.startswith("at most"):
            return f"between {self.low:g} and {self.high:g}"
        return " and ".join(part for part in (low, high) if part)

    def holds(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        inside = self.low <= number <= self.high and self.above < number < self.below
        return inside and number not in (math.inf, -math.inf)


#: Kinds of numbers that many arguments take. What `parameter` is given besides goes before.
Count: TypeAlias = Annotated[int, Declaration(low=1)]
Steps: TypeAlias = Annotated[int, Declaration(low=1, unit="steps")]
Epochs: TypeAlias = Annotated[int, Declaration(low=1, unit="epochs")]
Share: TypeAlias = Annotated[float, Declaration(low=0, high=1)]
NonNegative: TypeAlias = Annotated[float, Declaration(low=0)]


def parameter(*, default: Any = dataclasses.MISSING, help: str, **declared: Any) -> Any:
    """A hyper-parameter: a keyword-only dataclass field; ``declared``: see `Declaration`."""
    metadata = {_KEY: {"help": help, **declared}}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def setting(*, default: Any = dataclasses.MISSING, help: str, **declared: Any) -> Any:
    """A hyper-parameter that a saved state must agree with."""
    return parameter(default=default, help=help, saved=True, **declared)


def service(*, default: Any, help: str, **declared: Any) -> Any:
    """An argument that the training loop provides, such as ``data=``: no hyper-parameter."""
    return parameter(default=default, help=help, kind="service", **declared)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A declared argument of a method, as the registry, the command line and the docs see it."""

    name: str
    annotation: Any
    default: Any
    declared: Declaration

    @property
    def help(self) -> str:
        """What it is, in a sentence or two."""
        return self.declared.help

    def allowed(self) -> str:
        """What it takes, in words: "a number between 0 and 1, or a schedule of such numbers"."""
        return _allowed(self.annotation, self.declared)

    def check(self, value: Any) -> None:
        """Raise ValueError saying what is allowed if ``value`` is not."""
        if not _accepts(value, self.annotation, self.declared):
            raise ValueError(f"{self.name} must be {self.allowed()}, not {value!r}")
        if value is not None and self.declared.check is not None:
            self.declared.check(self.name, value)


def check(name: str, value: Any, annotation: Any, **declared: Any) -> None:
    """Check an argument that is no hyper-parameter of a method as `parameter` would."""
    Parameter(name, annotation, None, Declaration("", **declared)).check(value)


@dataclass_transform(
    kw_only_default=True,
    eq_default=False,
    field_specifiers=(dataclasses.field, parameter, setting, service),
)
class Declared:
    """A class that declares its hyper-parameters as dataclass fields; subclasses inherit them."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        _keep_declarations(cls)
        dataclasses.dataclass(eq=False, repr=False)(cls)

    @classmethod
    def declared(cls) -> dict[str, Parameter]:
        """The declared arguments of the constructor by name, in order of declaration."""
        return dict(_declared(cls))

    @classmethod
    def words(cls) -> Mapping[str, object]:
        """What stands for ``{name}`` in help texts: numbers that differ between subclasses."""
        return {}

    def check_parameters(self) -> None:
        """Check the type and bounds of every declared argument; ValueError names the first bad."""
        for found in _declared(type(self)).values():
            value = getattr(self, found.name)
            service = found.declared.kind != "parameter"
            if not (service and (value is None or found.declared.kind == "budget")):
                found.check(value)


def _keep_declarations(cls: Any) -> None:
    """Make a plain value over an inherited declaration, ``fraction = 0.5``, its new default."""
    inherited = getattr(cls, "__dataclass_fields__", {})
    for name, value in list(vars(cls).items()):
        field = inherited.get(name)
        if field is None or _KEY not in field.metadata or isinstance(value, dataclasses.Field):
            continue
        own = inspect.get_annotations(cls)
        owner = next(
            base for base in cls.__mro__[1:] if name in vars(base).get("__annotations__", {})
        )
        kind = get_type_hints(owner, include_extras=True)[name]
        cls.__annotations__ = {name: kind, **own}
        # the kind's bounds hold for an annotation of the subclass's own as well
        declared = {**vars(_declared_of(kind)), **field.metadata[_KEY]}
        again = dataclasses.field(default=value, kw_only=True, metadata={_KEY: declared})
        setattr(cls, name, again)


_KNOWN: weakref.WeakKeyDictionary[type, dict[str, Parameter]] = weakref.WeakKeyDictionary()


def _declared(cls: Any) -> dict[str, Parameter]:
    if cls in _KNOWN:
        return _KNOWN[cls]
    hints: dict[str, Any] = get_type_hints(cls)
    kinds: dict[str, Any] = get_type_hints(cls, include_extras=True)
    found: dict[str, Parameter] = {}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    # those of the class itself first, then what it inherits
    names = dict.fromkeys(n for base in cls.__mro__ for n in vars(base).get("__annotations__", ()))
    for field in (fields[name] for name in names if name in fields):
        given = field.metadata.get(_KEY)
        if given is not None:
            help = given["help"]
            for word, shown in cls.words().items():
                help = help.replace(f"{{{word}}}", str(shown))
            declared = dataclasses.replace(
                _declared_of(kinds[field.name]), **{**given, "help": help}
            )
            found[field.name] = Parameter(field.name, hints[field.name], field.default, declared)
    _KNOWN[cls] = found
    return found


def _declared_of(annotation: Any) -> Declaration:
    """What the kind of number in an annotation declares."""
    for kind in kinds_of(annotation):
        if get_origin(kind) is Annotated:
            return next(part for part in get_args(kind) if isinstance(part, Declaration))
    return Declaration()


def kinds_of(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, flat; of ``Literal`` each with all its values."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in kinds_of(part)]
    return [annotation]


def _words(kinds: Sequence[Any]) -> list[str]:
    return [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def _takes_patterns(kinds: Sequence[Any]) -> bool:
    return str in kinds and Sequence[str] in kinds


def _accepts(value: Any, annotation: Any, declared: Declaration) -> bool:
    kinds = kinds_of(annotation)
    if value is None:
        return types.NoneType in kinds
    if isinstance(value, str):
        return value in _words(kinds) or str in kinds
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and (int in kinds or float in kinds):
        return (float in kinds or isinstance(value, int)) and declared.holds(value)
    origins = [get_origin(kind) for kind in kinds]
    if callable(value) and Callable in origins:
        if float not in kinds:
            return True
        first = value(0)
        return isinstance(first, int | float) and declared.holds(first)
    if _takes_patterns(kinds):
        return isinstance(value, Sequence) and all(isinstance(part, str) for part in value)
    if isinstance(value, bytes):
        return False
    wanted = [
        list if origin is tuple else origin or kind
        for kind, origin in zip(kinds, origins, strict=True)
    ]
    simple = (bool, int, float, types.NoneType, Callable, Literal)
    classes = [kind for kind in wanted if isinstance(kind, type) and kind not in simple]
    return isinstance(value, (*classes, tuple) if list in classes else tuple(classes))


def _allowed(annotation: Any, declared: Declaration) -> str:
    kinds, limits = kinds_of(annotation), declared.limits()
    origins = [get_origin(kind) for kind in kinds]
    words = [repr(word) for word in _words(kinds)]
    found = []
    if bool in kinds:
        found.append("True or False")
    if float in kinds:
        found.append(" ".join(["a finite number", limits]).strip())
        if Callable in origins:
            found.append("a schedule of such numbers")
    elif Callable in origins:
        found.append("a function")
    elif int in kinds:
        unit = f" of {declared.unit}" if declared.unit else ""
        found.append(f"a whole number{unit}{' of ' if limits.startswith('at') else ' '}{limits}")
    if words:
        found.append(f"{'one of ' if len(words) > 1 else ''}{', '.join(words)}")
    if tuple in origins:
        found.append(f"{len(get_args(kinds[origins.index(tuple)]))} whole numbers")
    if Mapping in origins:
        found.append("a list of them in the model's order, a dict from glob pattern to them")
    if _takes_patterns(kinds):
        found.append("a glob pattern over names, several of them in a list")
    if types.NoneType in kinds:
        found.append("None")
    return ", or ".join(found).strip() or getattr(annotation, "__name__", str(annotation))


# --- layers by name -------------------------------------------------------------------------------


def fits(names: Sequence[str], patterns: Patterns) -> bool:
    """Whether one of ``names`` matches ``patterns``."""
    several = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for name in names for pattern in several)


def both_names(weight: str) -> tuple[str, ...]:
    """What patterns may match of a weight: its name ("fc1.weight") and its layer's ("fc1")."""
    layer = weight.rpartition(".")[0]
    return (weight, layer) if layer else (weight,)


def first_match(weights: Sequence[str], patterns: Sequence[str], what: str) -> list[str]:
    """For each weight the first of ``patterns`` that matches it or its layer.

    Raises ValueError for a pattern that matches no weight and for a weight that no pattern matches.
    """
    for pattern in patterns:
        if not any(fits(both_names(weight), pattern) for weight in weights):
            raise ValueError(
                f"{what}: no sparse weight fits {pattern!r}; there are {', '.join(weights)}"
            )
    found = []
    for weight in weights:
        matching = [pattern for pattern in patterns if fits(both_names(weight), pattern)]
        if not matching:
            raise ValueError(f"{what} says nothing of {weight}: add it, or '*' as the last pattern")
        found.append(matching[0])
    return found


def per_layer(
    name: str, given: PerLayer, weights: Sequence[str], low: float, high: float = math.inf
) -> list[float | Schedule]:
    """``given`` for each of ``weights``, every number (a schedule's first) within [low, high].

    Raises ValueError for a list of another length, patterns that match nothing, layers left out,
    and numbers out of range.
    """
    if isinstance(given, Mapping):
        given = [given[pattern] for pattern in first_match(weights, list(given), name)]
    elif not isinstance(given, Sequence):
        return [checked(name, given, low, high)] * len(weights)
    if len(given) != len(weights):
        raise ValueError(
            f"{name} is a list of {len(given)} for {len(weights)} sparse weights: give one number "
            f"for all, or one for each, in the model's order ({', '.join(weights)})"
        )
    pairs = zip(weights, given, strict=True)
    return [checked(f"{name} of {weight}", number, low, high) for weight, number in pairs]


def current(name: str, value: float | Schedule, step: int, declared: Declaration) -> float:
    """The number at ``step``; ValueError if a schedule leaves the bounds."""
    number = at(value, step)
    if not declared.holds(number):
        raise ValueError(
            f"{name} must be a finite number {declared.limits()}, not {number} (at {step})"
        )
    return number


def moments_field() -> Any:
    """The declaration of ``moments``, for methods that grow connections."""
    return parameter(
        default="auto",
        help='what a grown connection starts from in Adam and its like: "aged" (bias correction of '
        'its own age), "cleared" (of the optimizer\'s step), "auto" (aged where the optimizer is '
        "known); see rewire.nn.follow_optimizer",
    )


def data_field() -> Any:
    """The declaration of ``data``, for methods that look at activations."""
    return service(default=None, help="batches of training inputs, see `Data`")


def fraction_field(default: float, help: str) -> Any:
    """The declaration of ``fraction``, a share between 0 and 1, or a schedule of shares."""
    return parameter(default=default, low=0, high=1, help=help)
