"""What a study compares: methods x densities x seeds x data x models, from flags or a YAML file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rewire.app import run_files
from rewire.app.errors import DataError, StudyError, TrainError
from rewire.app.train import baselines
from rewire.app.train.command import config_to_start
from rewire.app.train.config import (
    MethodOption,
    Share,
    TrainConfig,
    check_name,
    did_you_mean,
    option_name,
)
from rewire.storage import reading

__all__ = ["Cell", "Entry", "Expectation", "Plan", "Run", "make_plan", "read_yaml"]

#: Options of `rewire train` that are an axis of the study, or belong to a single run.
AXES = {
    "method": "--methods",
    "method_options": "--set METHOD.NAME=VALUE",
    "density": "--densities",
    "seed": "--seeds",
    "data": "--data",
    "connections": "--densities",
    "hidden": "--model mlp:SIZES",
    "model": "--model",
}


def _words(value: object) -> object:
    """ "a,b", as the command line has it, in parts; a single value is a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int | float | Mapping) else value


def _seeds(value: object) -> object:
    """3 is the seeds 0, 1, 2; "5,7" and [5, 7] are themselves."""
    if isinstance(value, str):
        parts = value.split(",")
        if len(parts) == 1 and parts[0].strip().isdigit():
            return _seeds(int(parts[0]))
        return [part for part in parts if part.strip()]
    if isinstance(value, int) and not isinstance(value, bool):
        return range(min(value, 10_000))
    return value


def _entries(value: object) -> object:
    """Names of methods as entries."""
    value = _words(value)
    if not isinstance(value, list | tuple):
        return value
    return [{"method": part} if isinstance(part, str) else part for part in value]


Densities = Annotated[tuple[Share, ...], Field(min_length=1), BeforeValidator(_words)]
Names = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_words)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]


def _range(value: object) -> object:
    """Two numbers are a range, and all else choices."""
    if isinstance(value, list | tuple) and len(value) == 2:
        numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool)]
        return tuple(value) if len(numbers) == 2 else list(value)
    return value


#: A range of numbers, or choices.
Search = Annotated[tuple[int | float, int | float] | list[MethodOption], BeforeValidator(_range)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Strict):
    """A method of the study, with settings of its own; the table calls it by ``name``.

    ``search`` replaces ranges of the search; with ``tuned: false`` there is none for this entry.
    """

    method: str
    name: str = ""
    densities: Densities | None = None
    set: dict[str, MethodOption] = {}
    train: dict[str, Any] = {}
    search: dict[str, Search] = {}
    tuned: bool = True

    @property
    def label(self) -> str:
        """What the table calls it."""
        return self.name or self.method


class Expectation(_Strict):
    """A claim about means of the table, in percent: of a row, or of one row minus another."""

    method: str
    density: Share | None = None
    data: str | None = None
    above: str | None = None
    at_least: float
    claim: str = ""


class Plan(_Strict):
    """A study. Fields of ``train`` are options of `rewire train`, the same for all runs.

    ``tune``: trials of the search of each cell; with ``untuned`` every method is there twice, with
    its defaults and with what its search found.
    """

    title: str = ""
    claim: str = ""
    source: str = ""
    scaled: str = ""
    methods: Annotated[tuple[Entry, ...], Field(min_length=1), BeforeValidator(_entries)]
    densities: Densities = (0.1,)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), BeforeValidator(_seeds)] = (0, 1, 2)
    data: Names = ("digits",)
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("mlp:300,100",)
    train: dict[str, Any] = {}
    tune: Annotated[int, Field(ge=0, le=100_000)] = 0
    untuned: bool = False
    match: Literal["epochs", "multiply-adds"] = "epochs"
    expect: tuple[Expectation, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Plan:
        for what, given in (
            ("methods", [entry.label for entry in self.methods]),
            ("densities", list(self.densities)),
            ("seeds", list(self.seeds)),
            ("data", list(self.data)),
            ("models", list(self.models)),
        ):
            twice = [value for i, value in enumerate(given) if value in given[:i]]
            if twice:
                hint = "; give one of the two a name: of its own" if what == "methods" else ""
                raise ValueError(f"{what}: {twice[0]} is there twice{hint}")
        return self

    def sha256(self) -> str:
        """Checksum over all that decides the numbers of the study."""
        told = {"title", "claim", "source", "scaled", "expect"}
        plain = self.model_dump(mode="json", exclude=told)
        plain["train"] = {n: v for n, v in plain["train"].items() if n not in run_files.FREE}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def cells(self) -> list[Cell]:
        """All combinations but for seeds, in the order of the table."""
        return [
            Cell(entry, density, data, model)
            for data in self.data
            for model in self.models
            for density, entry in self._budgets()
        ]

    def _budgets(self) -> Iterator[tuple[float | None, Entry]]:
        """Methods without a budget once, then the others at each density."""
        for entry in self.methods:
            if not takes_density(entry.method):
                yield None, entry
        every = {d for e in self.methods for d in e.densities or self.densities}
        for density in sorted(every):
            for entry in self.methods:
                if takes_density(entry.method) and density in (entry.densities or self.densities):
                    yield density, entry

    def run(self, cell: Cell, stage: str, seed: int, **changed: Any) -> Run:
        """One run of a cell; ``changed`` goes before the plan's options. Raises `StudyError`."""
        options = {**self.train, **cell.entry.train, "data": cell.data, "model": cell.model}
        options |= {"method": cell.entry.method, "seed": seed}
        given = cell.entry.set | changed.pop("set", {})
        options |= changed
        if cell.density is not None:
            options["density"] = (cell.density,)
        try:
            config = config_to_start(options, [f"{n}={typed(v)}" for n, v in given.items()])
        except TrainError as error:
            raise StudyError(f"{cell.entry.label}: {error}") from None
        values = config.model_dump(mode="json")
        decisive = {n: v for n, v in values.items() if n not in run_files.FREE}
        return Run(cell, stage, seed, decisive)


@dataclass(frozen=True)
class Cell:
    """What the seeds are compared within; ``density`` is None for a method without a budget."""

    entry: Entry
    density: float | None
    data: str
    model: str

    @property
    def names(self) -> dict[str, Any]:
        """The cell as plain values."""
        return {
            "label": self.entry.label,
            "method": self.entry.method,
            "density": self.density,
            "data": self.data,
            "model": self.model,
        }

    def __str__(self) -> str:
        budget = "" if self.density is None else f" {100 * self.density:g} %"
        return f"{self.entry.label}{budget} {self.data} {self.model}"


@dataclass(frozen=True)
class Run:
    """One run: options that decide its numbers, and which part of the study it belongs to.

    ``stage`` is "run", "pilot" (how many multiply-adds the cell takes) or "tune".
    """

    cell: Cell
    stage: str
    seed: int
    values: Mapping[str, Any]

    @property
    def key(self) -> str:
        """What is the same for the same run, whichever process plans it."""
        return f"{self.stage} {self.cell} seed {self.seed} {run_files.config_sum(self.values)[:12]}"

    def pilot_of(self, epochs: int) -> Run:
        """The same run with another number of epochs."""
        return replace(self, values={**self.values, "epochs": epochs})


def folder_name(key: str) -> str:
    """The name of a run's folder: its key, without what file names may not hold."""
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9.]+", "-", key).strip("-.")[:100] + "-" + digest


def takes_density(method: str) -> bool:
    """Whether a run of the method is given a budget: not if it is dense, or finds one itself."""
    if method not in baselines.available() or method == baselines.SMALL_DENSE:
        return True
    entry = baselines.info(method)
    return not entry.cls.starts_dense or "density" in entry.parameters()


def typed(value: Any) -> str:
    """A hyper-parameter as ``--set`` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(typed, value))
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{typed(item)}" for name, item in value.items())
    return "none" if value is None else str(value)


def make_plan(values: Mapping[str, Any], where: str = "") -> Plan:
    """A plan from plain values, every run's options checked. ``where`` names the file.

    Raises `StudyError`.
    """
    prefix = f"{where}: " if where else ""
    try:
        plan = Plan(**values)
    except ValidationError as error:
        raise StudyError(prefix + _explain(error)) from None
    for options in (plan.train, *(entry.train for entry in plan.methods)):
        for name in options:
            if name in AXES:
                raise StudyError(f"{prefix}train: {name} is not the same for all; say {AXES[name]}")
            if name not in TrainConfig.model_fields:
                hint = did_you_mean(name, TrainConfig.model_fields)
                raise StudyError(f"{prefix}train: unknown option {name!r}{hint}")
    if plan.tune and plan.untuned and all(entry.tuned for entry in plan.methods):
        beside = [
            entry.model_copy(update=change)
            for entry in plan.methods
            for change in ({"tuned": False}, {"name": f"{entry.label} (tuned)"})
        ]
        plan = plan.model_copy(update={"methods": tuple(beside)})
    try:
        for entry in plan.methods:
            check_name("--methods", entry.method, baselines.available())
        for cell in plan.cells():
            plan.run(cell, "run", plan.seeds[0])
        _check_expectations(plan)
    except (DataError, StudyError, TrainError) as error:
        raise StudyError(f"{prefix}{error}") from None
    return plan


def _check_expectations(plan: Plan) -> None:
    """Refuse a claim about a row that the table does not have."""
    labels = [entry.label for entry in plan.methods]
    for claim in plan.expect:
        for label in filter(None, (claim.method, claim.above)):
            check_name("expect", label, labels)


_BOUNDS = {"gt": "above", "ge": "at least", "le": "at most", "lt": "below"}


def _explain(error: ValidationError) -> str:
    """The first complaint of pydantic as one line."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known: Mapping[str, Any] = Plan.model_fields
        if len(first["loc"]) > 1:
            known = {"methods": Entry.model_fields, "expect": Expectation.model_fields}.get(
                str(first["loc"][0]), known
            )
        return f"unknown entry {field!r}{did_you_mean(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{field} is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    limits = [f"{w} {first['ctx'][k]}" for k, w in _BOUNDS.items() if k in first.get("ctx", {})]
    allowed = "a number " + " and ".join(limits) if limits else first["msg"].lower()
    name = option_name(str(first["loc"][0])) if first["loc"] else "the plan"
    return f"{name}: given {reading.brief(repr(first['input']))}, allowed is {allowed}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a plan in a YAML file. Raises `StudyError`."""
    import yaml

    try:
        text = reading.read_bytes(path, reading.MEBIBYTE)
        values = yaml.safe_load(text)
    except OSError as error:
        raise StudyError(f"cannot read {path}: {error.strerror}") from None
    except reading.FileError as error:
        raise StudyError(str(error)) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise StudyError(f"{path} is no YAML: {reading.brief(error)}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise StudyError(f"{path} has no plan: needed are entries such as methods: [static, set]")
    return values
