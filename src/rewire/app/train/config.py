"""Everything that decides a training run, checked before anything is loaded or built."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewire import methods
from rewire.app import run_files
from rewire.app.train.errors import TrainError
from rewire.nn.layers.initial import Init
from rewire.storage import reading

#: Each optimizer, and its learning rate where neither the user nor the method names one.
RATES = {"sgd": 0.5, "adam": 0.01, "adamw": 0.01, "rmsprop": 0.002}
OPTIMIZERS = tuple(RATES)

# What may differ when a run is resumed: where the data lie and how often to save decide no number.
# The number of threads decides none either, but a run keeps it.
FREE_ON_RESUME = frozenset(run_files.FREE) - {"threads"}

MethodOption = bool | int | float | str | list[int | float] | dict[str, int | float] | None
# beyond that torch cannot count the elements of a weight
Size = Annotated[int, Field(gt=0, lt=2**40)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TrainConfig(BaseModel):
    """The options of `rewire train`; written to `config.json` and read back by `--resume`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = "digits"
    data_dir: str | None = None
    mirror: str | None = None
    hidden: tuple[Size, ...] = (300, 100)
    bias: bool = True
    method: str = "deep-r"
    method_options: dict[str, MethodOption] = Field(default_factory=dict)
    density: tuple[Share, ...] | None = None
    connections: Size | None = None
    distribution: str | None = None
    start_density: Share | None = None
    fan_in: Size | None = None
    fan_out: Size | None = None
    block: tuple[Size, Size, Size] | None = None
    init: Init = "auto"
    optimizer: str = "adam"
    lr: Positive | None = None
    lr_decay: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    batch_size: Size = 16
    epochs: Size = 20
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    validation: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.1
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    checkpoint_every: Annotated[int, Field(ge=0)] = 0

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps(self.model_dump(), indent=2) + "\n"

    def sha256(self) -> str:
        """Checksum over all that decides the numbers of the run."""
        return run_files.config_sum(self.model_dump())


def option_name(field: str) -> str:
    """How the command line calls a field."""
    special = {"bias": "--no-bias", "method_options": "--set"}
    return special.get(field, "--" + field.replace("_", "-"))


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A hint for a mistyped name, or nothing."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_name(option: str, given: str, allowed: Iterable[str]) -> None:
    """Refuse a name that is not in the list."""
    names = list(allowed)
    if given not in names:
        raise TrainError(
            f"{option}: unknown name {given!r}{did_you_mean(given, names)}; allowed are "
            f"{', '.join(names)}"
        )


def _explain(error: ValidationError) -> str:
    """The first complaint of pydantic as one line: option, what was given, what is allowed."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "config"
    if first["type"] == "extra_forbidden":
        return (
            "unknown "
            "option "
            f"{reading.brief(repr(field))}{did_you_mean(field, TrainConfig.model_fields)}"
        )
    context: Mapping[str, Any] = first.get("ctx", {})
    words = {"gt": "greater than", "ge": "at least", "le": "at most", "lt": "less than"}
    if field == "density":
        allowed = "a number greater than 0 and at most 1"
    elif field == "block":
        allowed = "three whole numbers greater than 0: outputs, inputs, connections"
    elif limits := [f"{words[key]} {context[key]}" for key in words if key in context]:
        allowed = "a number " + " and ".join(limits)
    else:
        allowed = first["msg"].removeprefix("Input should be ")
    return f"{option_name(field)}: given {reading.brief(first['input'])}, allowed is {allowed}"


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Check options and the way they fit together; names of methods and data sets are in their
    registries.
    """
    try:
        config = TrainConfig(**values)
    except ValidationError as error:
        raise TrainError(_explain(error)) from None
    config = suited(config, named="optimizer" in values)
    check_name("--optimizer", config.optimizer, OPTIMIZERS)
    layers = len(config.hidden) + 1
    if starts_dense(config.method):
        return _with_rate(_dense_budget(config))
    densities = config.density
    if densities is not None and config.connections is not None:
        raise TrainError(
            "--density and --connections both say how many connections: give one of them"
        )
    if densities is None and config.connections is None:
        config = config.model_copy(update={"density": (0.1,)})
    if densities is not None and len(densities) not in (1, layers):
        raise TrainError(
            f"--density: given {len(densities)} numbers for {layers} layers "
            f"(--hidden has {len(config.hidden)}); "
            f"allowed is one number for the whole network or {layers}, one per layer"
        )
    if densities is not None and len(densities) > 1:
        if config.distribution is not None:
            raise TrainError(
                "--distribution spreads one --density or --connections over the layers; "
                "with one density per layer leave it out"
            )
    elif config.distribution is None:
        config = config.model_copy(update={"distribution": "erk"})
    return _with_rate(config)


def suited(config: TrainConfig, *, named: bool) -> TrainConfig:
    """The optimizer, its rate and the hyper-parameters that suit the method, where the user
    ``named`` or gave none.

    Momentum names an optimizer as well: sgd, where no other is named.
    """
    if config.method not in methods.available():
        return config
    cls = methods.info(config.method).cls
    optimizer = config.optimizer if named else "sgd" if config.momentum else cls.run_optimizer
    options = (
        cls.run_options(config.epochs, config.method_options, optimizer) | config.method_options
    )
    lr = cls.run_lr if config.lr is None and optimizer == cls.run_optimizer else config.lr
    return config.model_copy(update={"method_options": options, "optimizer": optimizer, "lr": lr})


def starts_dense(method: str) -> bool:
    """Whether the method begins with an ordinary dense network; unknown names are refused
    elsewhere.
    """
    return method in methods.available() and methods.info(method).cls.starts_dense


def _dense_budget(config: TrainConfig) -> TrainConfig:
    """Methods that start dense find out how much is left, or have a parameter ``density``, which
    --density sets.
    """
    takes_density = "density" in methods.info(config.method).parameters()
    if takes_density and config.density is not None:
        if "density" in config.method_options:
            raise TrainError(
                "--density and --set density both say how many connections: give one of them"
            )
        if len(config.density) > 1:
            raise TrainError(
                f"--density: given {len(config.density)} numbers, allowed is one: {config.method} "
                "spreads its budget "
                "over the layers by itself"
            )
    given = {
        "--density": config.density is not None and not takes_density,
        "--connections": config.connections is not None,
        "--distribution": config.distribution is not None,
        "--start-density": config.start_density is not None,
        "--fan-in": config.fan_in is not None,
        "--fan-out": config.fan_out is not None,
        "--block": config.block is not None,
        "--init": config.init != "auto",
    }
    for option, is_given in given.items():
        if is_given:
            advice = (
                ("use --density") if takes_density and option == "--connections" else "leave it out"
            )
            raise TrainError(
                f"{option}: {config.method} starts from a dense network and has no "
                f"such budget; {advice}"
            )
    if takes_density and config.density is None and "density" not in config.method_options:
        # as for the other methods, so that they compare
        config = config.model_copy(update={"density": (0.1,)})
    return config


def _with_rate(config: TrainConfig) -> TrainConfig:
    """Momentum checked and the learning rate filled in."""
    if config.momentum and config.optimizer not in ("sgd", "rmsprop"):
        raise TrainError(f"--momentum: {config.optimizer} has none; it is for sgd and rmsprop")
    if config.lr is None:
        # Momentum m makes a step 1 / (1 - m) times as long.
        lr = RATES[config.optimizer] * (1 - config.momentum)
        config = config.model_copy(update={"lr": round(lr, 9)})
    return config


def parse_config(text: str | bytes, where: str) -> TrainConfig:
    """Read `config.json` back."""
    try:
        values = reading.parse_json(text.encode() if isinstance(text, str) else text, where)
    except reading.FileError as error:
        raise TrainError(f"{error}; the run cannot be resumed") from None
    if not isinstance(values, dict):
        raise TrainError(f"{where} does not hold options; the run cannot be resumed")
    try:
        return make_config(values)
    except TrainError as error:
        raise TrainError(f"{where}: {error}") from None


def difference(old: TrainConfig, given: Mapping[str, Any]) -> str | None:
    """The first option of `given` that would change a run made with `old`, as one line; None if
    none would.
    """
    for field, value in given.items():
        if field in FREE_ON_RESUME:
            continue
        before = getattr(old, field)
        if isinstance(value, list):
            value = tuple(value)
        if value != before:
            return f"{option_name(field)}: the run has {_shown(before)}, given {_shown(value)}"
    return None


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return str(value)


def read_number(option: str, text: str | None, kind: type[int] | type[float]) -> Any:
    """Read the number of an option; not given stays None."""
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise TrainError(f"{option}: given {text!r}, allowed is {what}") from None


def read_numbers(
    option: str, text: str | None, kind: type[int] | type[float], what: str
) -> list[Any] | None:
    """Read "300,100"; the word none is an empty list of layers."""
    if text is None:
        return None
    if kind is int and text.strip().lower() == "none":
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise TrainError(f"{option}: given {text!r}, allowed is {what}") from None
