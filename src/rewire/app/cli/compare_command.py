"""The commands `rewire compare` and `rewire recipes`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

from rewire.app.cli.failures import CommandError
from rewire.app.cli.options import described, with_train_options

STUDY, WORK = "Study", "Work"

#: Fields of a run that a study varies: no options of it.
_VARIED = ("method", "density", "connections", "seed", "hidden")


def _without_varied(command: Any) -> Any:
    """Take the options out that a study has under other names."""
    signature = inspect.signature(command)
    kept = [p for name, p in signature.parameters.items() if name not in _VARIED]
    own = inspect.unwrap(command).__code__.co_varnames  # those come first in --help
    kept.sort(key=lambda parameter: parameter.name not in own)
    command.__signature__ = signature.replace(parameters=kept)
    return command


@_without_varied
@with_train_options
def compare(
    *,
    methods: Annotated[
        str | None, described(STUDY, "NAMES", "Methods to compare, such as static,set,rigl,dense.")
    ] = None,
    densities: Annotated[
        str | None, described(STUDY, "SHARES", r"Such as 0.02,0.1. \[default: 0.1]")
    ] = None,
    seeds: Annotated[
        str | None,
        described(STUDY, "NUMBER", r"How many seeds, or which: 3, or 5,6,9. \[default: 3]"),
    ] = None,
    data: Annotated[
        str | None,
        described(STUDY, "NAMES", r"Data sets, such as digits,mnist. \[default: digits]"),
    ] = None,
    model: Annotated[
        list[str] | None,
        described(STUDY, "NAME", r"A network; may be repeated. \[default: mlp:300,100]", "--model"),
    ] = None,
    method_options: Annotated[
        list[str] | None,
        described(STUDY, "METHOD.NAME=VALUE", "A parameter of a method; may be repeated.", "--set"),
    ] = None,
    tune: Annotated[
        str | None,
        described(
            STUDY,
            "TRIALS",
            "Search the settings of every method first, with so many trials each, by validation "
            r"accuracy; the winners then run on the seeds. \[default: 0]",
        ),
    ] = None,
    untuned: Annotated[
        bool | None,
        described(STUDY, "", "With --tune: the defaults of every method as well.", "--untuned"),
    ] = None,
    match: Annotated[
        str | None,
        described(
            STUDY,
            "WHAT",
            "What runs have equally: epochs, or multiply-adds, as many as the first method needs."
            r" \[default: epochs]",
        ),
    ] = None,
    config: Annotated[
        Path | None, described(STUDY, "FILE", "A plan in YAML; options given here go before it.")
    ] = None,
    recipe: Annotated[
        str | None, described(STUDY, "NAME", "A plan that comes along: see rewire recipes.")
    ] = None,
    study: Annotated[
        str | None,
        described(
            WORK, "NAME", r"Name of the study. \[default: made of the plan, the same each time]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        described(WORK, "FOLDER", r"Where runs, tables and report go. \[default: runs/STUDY]"),
    ] = None,
    storage: Annotated[
        str | None,
        described(
            WORK,
            "URL",
            "The database: postgresql://USER:PASSWORD@HOST/DATABASE lets many machines work on one "
            r"study. \[default: study.db in --out]",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        described(
            WORK,
            "NUMBER",
            "Runs at a time; 0 trains nothing and shows what there is. "
            r"\[default: one a core]",
        ),
    ] = None,
    patience: Annotated[
        float | None,
        described(
            WORK, "SECONDS", r"How long the database may be away. \[default: a day]", "--patience"
        ),
    ] = None,
    grace: Annotated[
        int | None,
        described(
            WORK,
            "SECONDS",
            r"After how long a silence a worker on another machine counts as dead. \[default: 60]",
        ),
    ] = None,
    table: Annotated[
        str | None,
        described(
            WORK, "KIND", r"What to print: terminal, markdown, latex or csv. \[default: terminal]"
        ),
    ] = None,
    quiet: Annotated[
        bool, described(WORK, "", "Print the table and errors only.", "--quiet", "-q")
    ] = False,
    **given: Any,
) -> None:
    """Compare methods: every method at every density, on every data set, with several seeds.

    Give the same command again, also at the same time in other terminals or on other machines with
    the same --storage, and they work together: no run is made twice, and one that was broken off
    goes on from its last checkpoint. Leaves a table and a report.
    """
    from rewire.app.studies import command

    command.needed()
    if config is not None and recipe is not None:
        raise CommandError("--config and --recipe are both plans: give one of them")
    if jobs is not None and jobs < 0:
        raise CommandError(f"--jobs: given {jobs}, allowed is a whole number from 0")
    if grace is not None and grace < 15:
        raise CommandError(f"--grace: given {grace}, allowed is a whole number of seconds from 15")
    kinds = ("terminal", *command.FORMATS)
    if table is not None and table not in kinds:
        raise CommandError(f"--table: given {table!r}, allowed are {', '.join(kinds)}")
    axes = {
        "methods": methods,
        "densities": densities,
        "seeds": seeds,
        "data": data,
        "models": model,
        "tune": tune,
        "untuned": untuned,
        "match": match,
    }
    plan = command.plan_from(
        command.recipe_path(recipe) if recipe is not None else config,
        {name: value for name, value in axes.items() if value is not None},
        {name: value for name, value in given.items() if value is not None},
        method_options or [],
    )
    work = {
        "study": study or recipe,
        "out": out,
        "storage": storage,
        "jobs": jobs,
        "patience": patience,
        "grace": grace,
        "table": table,
        "quiet": quiet,
    }
    command.compare(
        plan,
        command.Options(**{n: v for n, v in work.items() if v is not None}),  # type: ignore[arg-type]
    )


def recipes() -> None:
    """List the plans that come along, one for each published claim."""
    from rewire.app.studies import command

    command.needed()
    command.list_recipes()
