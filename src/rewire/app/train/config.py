"""The options of a run, checked one by one and together, and completed by what suits them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from rewire.app import run_files
from rewire.app.errors import TrainError
from rewire.app.train.fields import MethodOption, TrainConfig
from rewire.app.train.option import Option, Share, check_name, did_you_mean
from rewire.schedules import RATES
from rewire.storage import reading

if TYPE_CHECKING:
    from rewire.methods import MethodInfo

__all__ = [
    "FREE_ON_RESUME",
    "MethodOption",
    "Option",
    "Share",
    "TrainConfig",
    "check_name",
    "did_you_mean",
    "difference",
    "make_config",
    "method_options",
    "option_name",
    "options",
    "parse_config",
    "read_options",
    "shown",
    "starts_dense",
    "suited",
]

# What may differ when a run is resumed: where the data lie and how often to save decide no number.
# The number of threads decides none either, but a run keeps it.
FREE_ON_RESUME = frozenset(run_files.FREE) - {"threads"}


def options() -> dict[str, Option]:
    """The options by field."""
    fields = TrainConfig.model_fields
    return {name: cast(Any, fields[name].json_schema_extra)["option"] for name in fields}


def option_name(field: str) -> str:
    """What the command line calls a field; of a flag the form that changes the default."""
    option = options().get(field)
    names = option.names if option is not None else ()
    return names[0].split("/")[-1] if names else "--" + field.replace("_", "-")


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
    values = _with_sizes(values)
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise TrainError(_explain(error, values)) from None


def _with_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """ "mlp:300,100" in its two parts, ``model`` and ``hidden``."""
    name, colon, sizes = str(values.get("model", "")).partition(":")
    if name != "mlp" or not colon:
        return dict(values)
    hidden = values.get("hidden", sizes)
    if isinstance(hidden, list | tuple):
        hidden = ",".join(map(str, hidden))
    if hidden != sizes:
        raise TrainError(f"--model: given mlp:{sizes} and --hidden {hidden}: give the sizes once")
    return {**values, "model": "mlp", "hidden": sizes}


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Options, checked together; those that are not given get what suits the others.

    The names of methods and data sets are checked elsewhere. Raises `TrainError`.
    """
    config = _scheduled(_modelled(suited(read_options(values))))
    check_name("--optimizer", config.optimizer, RATES)
    if starts_dense(config.method):
        return _with_rate(_dense_budget(config))
    densities = config.density
    # how many weights other networks have is known when they are made
    layers = len(config.hidden) + 1 if config.model == "mlp" else None
    if densities is not None and config.connections is not None:
        raise TrainError(
            "--density and --connections both say how many connections: give one of them"
        )
    change: dict[str, Any] = {}
    if densities is None and config.connections is None:
        change["density"] = (0.1,)
    if densities is not None and layers is not None and len(densities) not in (1, layers):
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


def _modelled(config: TrainConfig) -> TrainConfig:
    """The options, after those that the network does not have are refused."""
    if config.model != "mlp":
        for field in ("hidden", "bias"):
            if getattr(config, field) != TrainConfig.model_fields[field].default:
                raise TrainError(
                    f"{option_name(field)}: this is for mlp, and --model is {config.model}; leave "
                    "it out"
                )
    return config


def _scheduled(config: TrainConfig) -> TrainConfig:
    """The options, with a schedule that fits --lr-decay and --milestones."""
    schedule = config.schedule
    if config.lr_decay is not None and "schedule" not in config.model_fields_set:
        schedule = "step" if config.milestones else "exponential"
    elif config.milestones and "schedule" not in config.model_fields_set:
        schedule = "step"
    if config.milestones and schedule != "step":
        raise TrainError(f"--milestones: --schedule is {schedule}; they are for step")
    if config.lr_decay is not None and schedule not in ("step", "exponential"):
        raise TrainError(f"--lr-decay: --schedule is {schedule}; it is for step and exponential")
    if schedule == "exponential" and config.lr_decay is None:
        raise TrainError("--schedule exponential needs --lr-decay, its factor of an epoch")
    if config.warmup >= config.epochs:
        raise TrainError(
            f"--warmup: given {config.warmup:g} epochs of {config.epochs}, allowed is less than "
            "the whole run"
        )
    return config.model_copy(update={"schedule": schedule})


def suited(config: TrainConfig) -> TrainConfig:
    """The options, with the optimizer and learning rate that suit the method where they were not
    given.

    Momentum without an optimizer means sgd.
    """
    entry = _method(config.method)
    if entry is None:
        return config
    cls = entry.cls
    if "optimizer" in config.model_fields_set:
        optimizer = config.optimizer
    else:
        optimizer = "sgd" if config.momentum else cls.run_optimizer
    lr = cls.run_lr if config.lr is None and optimizer == cls.run_optimizer else config.lr
    return config.model_copy(update={"optimizer": optimizer, "lr": lr})


def method_options(config: TrainConfig, steps: int | None = None) -> dict[str, Any]:
    """Hyper-parameters of the method: those given, and those that suit a run of ``steps``."""
    entry = _method(config.method)
    given = config.method_options
    if entry is None:
        return given
    from rewire.methods.core.runs import Run  # loads torch

    run = Run(config.epochs, config.optimizer, steps)
    return entry.cls.run_options(run, given) | given


def starts_dense(method: str) -> bool:
    """Whether the method begins with a dense network; False for an unknown name."""
    entry = _method(method)
    return entry is not None and entry.cls.starts_dense


def _method(name: str) -> MethodInfo | None:
    """What is known of a method; None for an unknown name."""
    from rewire.app.train import baselines  # loads torch, which --help does without

    return baselines.info(name) if name in baselines.available() else None


def _dense_budget(config: TrainConfig) -> TrainConfig:
    """The options of a method that starts dense, checked.

    It finds out how much is left, or has a parameter ``density``, which --density sets.
    """
    entry = _method(config.method)
    assert entry is not None  # starts_dense knows it
    is_small = config.method == "small-dense"
    takes_density = is_small or "density" in entry.parameters()
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
    useless = ["distribution", "start_density", "fan_in", "fan_out", "block", "init"]
    useless += [] if is_small else ["connections"]
    if is_small and config.density is not None and config.connections is not None:
        raise TrainError(
            "--density and --connections both say how many connections: give one of them"
        )
    for field in useless if takes_density else ["density", *useless]:
        if getattr(config, field) != TrainConfig.model_fields[field].default:
            instead = takes_density and field == "connections"
            raise TrainError(
                f"{option_name(field)}: {config.method} starts from a dense network and has no "
                f"such budget; {'use --density' if instead else 'leave it out'}"
            )
    if takes_density and config.density is None and config.connections is None and not is_set:
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
