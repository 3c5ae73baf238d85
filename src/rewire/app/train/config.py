"""The options of `rewire train`: each is declared once, as a field of `TrainConfig`.

The command line, the checks, `config.json` and the report are made from these fields.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

import rewire  # its parts load torch, which the command line does without until a run begins
from rewire.app import run_files
from rewire.app.errors import TrainError
from rewire.storage import reading

#: Each optimizer, and its learning rate where neither the user nor the method names one.
RATES = {"sgd": 0.5, "adam": 0.01, "adamw": 0.01, "rmsprop": 0.002}

# What may differ when a run is resumed: where the data lie and how often to save decide no number.
# The number of threads decides none either, but a run keeps it.
FREE_ON_RESUME = frozenset(run_files.FREE) - {"threads"}


@dataclass(frozen=True)
class Option:
    """How the command line shows a field of `TrainConfig`.

    Attributes:
        panel: the heading that it stands under in ``--help``.
        metavar: a word for its value in ``--help``; "" for a flag.
        help: one sentence.
        names: what the user types; by default the name of the field.
        shown: the default in words, where the field's own does not say it.
        allowed: the values in words, where the field's bounds do not say them.
    """

    panel: str
    metavar: str
    help: str
    names: tuple[str, ...] = ()
    shown: str = ""
    allowed: str = ""


def _field(default: Any, panel: str, metavar: str, help: str, *names: str, **more: str) -> Any:
    """A field of the configuration that is an `Option`."""
    option = Option(panel, metavar, help, names, **more)
    return Field(default, json_schema_extra={"option": cast(Any, option)})


def _parts(value: object) -> object:
    """ "300,100", as the command line has it, in parts; "none" has no part."""
    if not isinstance(value, str):
        return value
    return [] if value.strip().lower() == "none" else value.split(",")


DATA, NETWORK, METHOD, TRAINING, RUN = "Data", "Network and budget", "Method", "Training", "Run"

MethodOption = bool | int | float | str | list[int | float] | dict[str, int | float] | None
# torch cannot count the elements of a weight with more units
Size = Annotated[int, Field(gt=0, lt=2**40)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Folder = Annotated[Path, AfterValidator(Path.absolute), PlainSerializer(str)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_parts)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1), BeforeValidator(_parts)]
Block = Annotated[tuple[Size, Size, Size], BeforeValidator(_parts)]


class TrainConfig(BaseModel):
    """The options of `rewire train`; written to `config.json` and read back by `--resume`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = _field(
        "digits", DATA, "NAME", "digits (part of the package), mnist or fashion-mnist."
    )
    data_dir: Folder | None = _field(
        None, DATA, "FOLDER", "Has the four *-ubyte.gz files, or a subfolder named as the data set."
    )
    mirror: str | None = _field(
        None, DATA, "URL", "The folder to download from, where --data-dir is not given."
    )
    validation: BelowOne = _field(
        0.1, DATA, "SHARE", "Share of the training samples that is held out to report on."
    )

    hidden: Sizes = _field(
        (300, 100),
        NETWORK,
        "SIZES",
        "Units of the hidden layers; none makes a linear model.",
        allowed="sizes from 1 to 2^40 - 1 such as 300,100, or none",
    )
    bias: bool = _field(True, NETWORK, "", "Layers with biases.", "--bias/--no-bias")
    density: Shares | None = _field(
        None,
        NETWORK,
        "SHARES",
        "Share of the possible connections that is allowed: one number, or one for each layer.",
        shown="0.1",
        allowed="a number greater than 0 and at most 1, or one for each layer: 0.01,0.03,0.3",
    )
    connections: Size | None = _field(
        None, NETWORK, "NUMBER", "Allowed connections of the network, instead of --density."
    )
    distribution: str | None = _field(
        None, NETWORK, "NAME", "How layers share one budget: erk, er or uniform.", shown="erk"
    )
    start_density: Share | None = _field(
        None,
        NETWORK,
        "SHARE",
        "Density at the start, for methods that begin above their budget.",
        shown="1 for most of them",
    )
    fan_in: Size | None = _field(
        None, NETWORK, "NUMBER", "Most connections of one output of a layer."
    )
    fan_out: Size | None = _field(
        None, NETWORK, "NUMBER", "Most connections of one input of a layer."
    )
    block: Block | None = _field(
        None,
        NETWORK,
        "NUMBERS",
        "64,32,99: at most 99 connections in each block of 64 outputs x 32 inputs.",
        allowed="three whole numbers greater than 0 (outputs, inputs, connections): 64,32,99",
    )
    init: Literal["auto", "dense", "sparse"] = _field(
        "auto",
        NETWORK,
        "RULE",
        "First values: auto keeps the strength of a dense network's signals; or dense, sparse.",
    )

    method: str = _field("deep-r", METHOD, "NAME", "One of those that 'rewire methods' lists.")
    method_options: dict[str, MethodOption] = _field(
        {}, METHOD, "NAME=VALUE", "A parameter of the method; may be repeated.", "--set"
    )

    epochs: Size = _field(20, TRAINING, "NUMBER", "Passes over the training data.")
    batch_size: Size = _field(16, TRAINING, "NUMBER", "Samples in a step.")
    optimizer: str = _field(
        "adam",
        TRAINING,
        "NAME",
        f"One of {', '.join(RATES)}.",
        shown="the one that suits the method, mostly adam",
    )
    lr: Positive | None = _field(
        None,
        TRAINING,
        "NUMBER",
        "Learning rate.",
        shown="what suits method and optimizer, mostly 0.01",
    )
    lr_decay: Positive | None = _field(
        None,
        TRAINING,
        "FACTOR",
        "Multiplies the learning rate after every epoch.",
        shown="half a cosine down to 0",
    )
    momentum: BelowOne = _field(0.0, TRAINING, "NUMBER", "Of sgd and rmsprop.")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _field(
        0.0, TRAINING, "NUMBER", "Some methods refuse it."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = _field(
        0, TRAINING, "NUMBER", "Decides all random numbers."
    )

    checkpoint_every: Annotated[int, Field(ge=0)] = _field(
        0, RUN, "STEPS", "Save within epochs too; 0 saves only at their ends."
    )
    threads: Annotated[int, Field(gt=0, le=1024)] | None = _field(
        None, RUN, "NUMBER", "CPU threads.", shown="one for small networks, else all cores"
    )

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps(self.model_dump(), indent=2) + "\n"

    def sha256(self) -> str:
        """Checksum over all that decides the numbers of the run."""
        return run_files.config_sum(self.model_dump())


def options() -> dict[str, Option]:
    """The options by field."""
    fields = TrainConfig.model_fields
    return {name: cast(Any, fields[name].json_schema_extra)["option"] for name in fields}


def option_name(field: str) -> str:
    """What the command line calls a field; of a flag the form that changes the default."""
    option = options().get(field)
    names = option.names if option is not None else ()
    return names[0].split("/")[-1] if names else "--" + field.replace("_", "-")


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A hint for a mistyped name, or nothing."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_name(option: str, given: str, allowed: Iterable[str]) -> None:
    """Refuse a name that is not in the list."""
    names = list(allowed)
    if given not in names:
        raise TrainError(
            f"{option}: unknown name {given!r}{did_you_mean(given, names)}; "
            f"allowed are {', '.join(names)}"
        )


#: How an error of pydantic begins, and what is allowed then.
_KINDS = {"int_parsing": "a whole number", "float_parsing": "a number"}
_BOUNDS = {"gt": "greater than", "ge": "at least", "le": "at most", "lt": "less than"}


def _explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    """The first complaint of pydantic as one line: option, what was given, what is allowed."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "config"
    hint = did_you_mean(field, TrainConfig.model_fields)
    if first["type"] == "extra_forbidden":
        return f"unknown option {reading.brief(repr(field))}{hint}"
    context: Mapping[str, Any] = first.get("ctx", {})
    kind = next((words for key, words in _KINDS.items() if first["type"].startswith(key)), None)
    limits = [f"{words} {context[key]}" for key, words in _BOUNDS.items() if key in context]
    given = first["input"]
    if kind is not None or first["type"] in (
        "missing",
        "too_long",
    ):  # one part of a list: show all of it
        given = values[field]
    allowed = (
        options()[field].allowed
        or kind
        or (limits and "a number " + " and ".join(limits))
        or first["msg"].removeprefix("Input should be ")
    )
    shown = repr(given) if kind is not None else given
    return f"{option_name(field)}: given {reading.brief(shown)}, allowed is {allowed}"


def read_options(values: Mapping[str, Any]) -> TrainConfig:
    """Options as typed or as in `config.json`, each checked alone. Raises `TrainError`."""
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise TrainError(_explain(error, values)) from None


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Options, checked together; those that are not given get what suits the others.

    The names of methods and data sets are checked elsewhere. Raises `TrainError`.
    """
    config = suited(read_options(values))
    check_name("--optimizer", config.optimizer, RATES)
    if starts_dense(config.method):
        return _with_rate(_dense_budget(config))
    densities, layers = config.density, len(config.hidden) + 1
    if densities is not None and config.connections is not None:
        raise TrainError(
            "--density and --connections both say how many connections: give one of them"
        )
    change: dict[str, Any] = {}
    if densities is None and config.connections is None:
        change["density"] = (0.1,)
    if densities is not None and len(densities) not in (1, layers):
        raise TrainError(
            f"--density: given {len(densities)} numbers for {layers} layers "
            f"(--hidden has {len(config.hidden)}); "
            f"allowed is one number for the whole network or {layers}, one per layer"
        )
    if densities is None or len(densities) == 1:
        change["distribution"] = config.distribution or "erk"
    elif config.distribution is not None:
        raise TrainError(
            "--distribution spreads one --density or --connections over the layers; "
            "with one density per layer leave it out"
        )
    return _with_rate(config.model_copy(update=change))


def suited(config: TrainConfig) -> TrainConfig:
    """The options, with the optimizer, learning rate and hyper-parameters that suit the method
    where they were not given.

    Momentum without an optimizer means sgd.
    """
    if config.method not in rewire.methods.available():
        return config
    cls = rewire.methods.info(config.method).cls
    if "optimizer" in config.model_fields_set:
        optimizer = config.optimizer
    else:
        optimizer = "sgd" if config.momentum else cls.run_optimizer
    given = config.method_options
    lr = cls.run_lr if config.lr is None and optimizer == cls.run_optimizer else config.lr
    return config.model_copy(
        update={
            "method_options": cls.run_options(config.epochs, given, optimizer) | given,
            "optimizer": optimizer,
            "lr": lr,
        }
    )


def starts_dense(method: str) -> bool:
    """Whether the method begins with a dense network; False for an unknown name."""
    return method in rewire.methods.available() and rewire.methods.info(method).cls.starts_dense


def _dense_budget(config: TrainConfig) -> TrainConfig:
    """The options of a method that starts dense, checked.

    It finds out how much is left, or has a parameter ``density``, which --density sets.
    """
    takes_density = "density" in rewire.methods.info(config.method).parameters()
    is_set = "density" in config.method_options
    if takes_density and config.density is not None:
        if is_set:
            raise TrainError(
                "--density and --set density both say how many connections: give one of them"
            )
        if len(config.density) > 1:
            raise TrainError(
                f"--density: given {len(config.density)} numbers, allowed is one: "
                f"{config.method} spreads its budget over the layers by itself"
            )
    useless = ("connections", "distribution", "start_density", "fan_in", "fan_out", "block", "init")
    for field in useless if takes_density else ("density", *useless):
        if getattr(config, field) != TrainConfig.model_fields[field].default:
            instead = takes_density and field == "connections"
            raise TrainError(
                f"{option_name(field)}: {config.method} starts from a dense network and has no "
                f"such budget; {'use --density' if instead else 'leave it out'}"
            )
    if takes_density and config.density is None and not is_set:
        # as for the other methods, so that they compare
        config = config.model_copy(update={"density": (0.1,)})
    return config


def _with_rate(config: TrainConfig) -> TrainConfig:
    """The options with a learning rate; momentum is checked."""
    if config.momentum and config.optimizer not in ("sgd", "rmsprop"):
        raise TrainError(f"--momentum: {config.optimizer} has none; it is for sgd and rmsprop")
    if config.lr is None:
        # Momentum m makes a step 1 / (1 - m) times as long.
        lr = RATES[config.optimizer] * (1 - config.momentum)
        config = config.model_copy(update={"lr": round(lr, 9)})
    return config


def parse_config(text: str | bytes, where: str) -> TrainConfig:
    """Read `config.json` back; ``where`` is its path. Raises `TrainError`."""
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
    """The first option of ``given`` that would change the run of ``old``, as one line."""
    new = read_options(given)
    for field in given:
        before, after = getattr(old, field), getattr(new, field)
        if field not in FREE_ON_RESUME and before != after:
            return f"{option_name(field)}: the run has {shown(before)}, given {shown(after)}"
    return None


def shown(value: object) -> str:
    """A value as the user types it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return str(value)
