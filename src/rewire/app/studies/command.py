"""What `rewire compare` does between reading its options and showing the table."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console

from rewire.app import interrupts, run_files
from rewire.app.cores import cores
from rewire.app.errors import StudyError, TrainError, UserError
from rewire.app.studies.plan import Cell, Plan, make_plan, read_yaml
from rewire.app.studies.results import FORMATS
from rewire.app.train.signals import Signals
from rewire.storage import files

__all__ = ["FORMATS", "Options", "compare", "needed", "plan_from", "recipe_names", "recipe_path"]

#: What the extra `studies` installs.
NEEDED = ("optuna", "sqlalchemy", "yaml", "scipy")


@dataclass(frozen=True)
class Options:
    """How a study is worked on; none of it changes a number."""

    study: str | None = None
    out: Path | None = None
    storage: str | None = None
    jobs: int | None = None
    patience: float = 86400.0
    grace: int = 60
    quiet: bool = False
    table: str = "terminal"


class StoppedStudy(UserError):
    """A signal asked to stop; everything under way was saved."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


def needed() -> None:
    """Say in one line what to install where the packages of studies are missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise StudyError(
            f"rewire compare needs {', '.join(missing)}, which cannot be found; install it all "
            "with: pip install 'torch-rewire[app,studies]'"
        )


class FailedRuns(UserError):
    """Some runs of a study failed; the others are whole."""

    code = 1


# --- plans ----------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("rewire.app.studies") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name[-5:] == ".yaml")


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises `StudyError`."""
    from rewire.app.train.config import check_name

    try:
        check_name("--recipe", name, recipe_names())
    except TrainError as error:
        raise StudyError(str(error)) from None
    return Path(str(resources.files("rewire.app.studies") / "recipes" / f"{name}.yaml"))


def plan_from(
    file: Path | None, given: Mapping[str, Any], train: Mapping[str, Any], sets: list[str]
) -> Plan:
    """The plan of a file (or of the defaults), with what was given on the command line over it.

    ``train``: options of `rewire train`; ``sets``: METHOD.NAME=VALUE. Raises `StudyError`.
    """
    values = read_yaml(file) if file is not None else {}
    values |= given
    if given.keys() & {"methods", "densities", "data"} and "expect" in values:
        values["expect"] = _still_said(values)
    common = values.get("train", {})
    if not isinstance(common, dict):
        raise StudyError(f"{file}: train: needed are options by name, such as epochs: 20")
    values["train"] = {**common, **train}
    if "methods" not in values:
        raise StudyError("give the methods to compare, for example --methods static,set,rigl,dense")
    plan = make_plan(values, "" if file is None else str(file))
    return _with_sets(plan, sets)


def _still_said(values: Mapping[str, Any]) -> list[Any]:
    """The claims of a file about what the study still has, after options went before the file."""
    plan = make_plan({**values, "expect": [], "train": {}})
    labels = {None, *(entry.label for entry in plan.methods)}
    densities = {None, *plan.densities, *(d for e in plan.methods for d in e.densities or ())}
    kept = []
    for claim in values["expect"]:
        names = claim if isinstance(claim, dict) else {}
        said = {names.get("method"), names.get("above")} <= labels
        said = said and names.get("data") in {None, *plan.data}
        if said and names.get("density") in densities:
            kept.append(claim)
    return kept


def _with_sets(plan: Plan, sets: list[str]) -> Plan:
    """The plan with hyper-parameters of methods, as typed."""
    if not sets:
        return plan
    labels = [entry.label for entry in plan.methods]
    values = plan.model_dump(mode="json")
    for text in sets:
        name, equals, value = text.partition("=")
        label, dot, parameter = name.strip().rpartition(".")
        if not (equals and dot) or label not in labels:
            raise StudyError(
                f"--set {text}: write it as METHOD.NAME=VALUE with a method of the study "
                f"({', '.join(labels)}), for example --set {labels[0]}.every=10"
            )
        values["methods"][labels.index(label)]["set"][parameter] = value
    return make_plan(values)


# --- the study ------------------------------------------------------------------------------------


def _place(plan: Plan, options: Options) -> tuple[str, Path]:
    """Name and folder of the study: the same for the same plan, so the same command goes on."""
    data = "-".join(plan.data[:2])
    name = options.study or f"compare-{re.sub(r'[^A-Za-z0-9.-]+', '-', data)}-{plan.sha256()[:8]}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise StudyError(f"--study: given {name!r}, allowed are letters, digits, '.', '_' and '-'")
    return name, options.out or Path("runs") / name


def compare(plan: Plan, options: Options) -> None:
    """Work on a study until it is over, then print its table and write table and report."""
    from rewire.app.studies import results
    from rewire.app.studies.progress import Shower
    from rewire.app.studies.stages import Stages
    from rewire.app.studies.store import Store, is_failed
    from rewire.app.studies.work import Crew

    name, folder = _place(plan, options)
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"--out {folder}: this is a file, needed is a folder")
    url = options.storage or f"sqlite:///{(folder / 'study.db').absolute()}"
    quiet = options.quiet or options.table != "terminal"
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=quiet)
    with Signals() as signals, contextlib.closing(Shower(console, quiet=quiet)) as shower:
        signals.training = True
        store = Store(url, shower.say, grace=options.grace, patience=options.patience)
        store.stop = signals
        jobs = cores() if options.jobs is None else options.jobs
        runs = len(plan.cells()) * (len(plan.seeds) + plan.tune)
        jobs = min(jobs, runs)
        free = {key: value for key, value in plan.train.items() if key in run_files.FREE}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stages = Stages(plan, store, name)
            if jobs:
                _check_data(plan, stages.unknown(), console)
                outlook = Crew(stages, folder / "runs", free, jobs, shower, signals).work()
            else:
                outlook = stages.look()
        except KeyboardInterrupt:
            if not signals():
                raise
            interrupts.leave()
            outlook = stages.look()
            ended, planned = outlook.ended, outlook.planned
            raise StoppedStudy(
                f"stopped; {ended} of {planned} runs have ended, those under way are saved: give "
                "the same command again to go on",
                128 + (signals() or signal.SIGINT),
            ) from None
        finally:
            shower.close()
        signals.training = False
    text = json.dumps(plan.model_dump(mode="json"), indent=2) + "\n"
    files.write_atomic(folder / "plan.json", text.encode())
    results.show(plan, outlook, folder, options.table, Console(highlight=False, soft_wrap=False))
    store.close()
    failed = sum(map(is_failed, outlook.trials))
    if failed:
        raise FailedRuns(f"{failed} of {outlook.planned} runs failed, as said above")


def _check_data(plan: Plan, cells: Sequence[Cell], console: Console) -> None:
    """Get the data sets and make the parts of one run of each of ``cells``: what is refused is
    refused now, in one line, before anything runs.
    """
    if not cells:
        return
    from rewire.app.train.command import load_data
    from rewire.app.train.config import make_config
    from rewire.app.train.display import DownloadBar
    from rewire.app.train.parts import assemble

    sets: dict[str, Any] = {}
    free = {key: value for key, value in plan.train.items() if key in run_files.FREE}
    for cell in cells:
        config = make_config({**plan.run(cell, "run", plan.seeds[0]).values, **free})
        if cell.data not in sets:
            sets.clear()  # one at a time in memory
            with contextlib.closing(DownloadBar(console)) as bar:
                sets[cell.data] = load_data(config, bar)
        try:
            assemble(config, sets[cell.data])
        except TrainError as error:
            raise StudyError(f"{cell}: {error}") from None


def list_recipes() -> None:
    """Print each recipe with its claim and where that stands."""
    console = Console(highlight=False, markup=False)
    for name in recipe_names():
        plan = make_plan(read_yaml(recipe_path(name)), name)
        console.print(name, style="bold")
        for line in (plan.claim, plan.source, plan.scaled and f"scaled: {plan.scaled}"):
            if line:
                console.print(f"    {line}")
    console.print("rewire compare --recipe NAME runs one; its other options go before the recipe's")
