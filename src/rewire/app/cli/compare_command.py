"""The commands `rewire compare` and `rewire recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewire.app.cli.failures import CommandError
from rewire.app.cli.options import given_of, option, train_options, with_options

STUDY, WORK = "Study", "Work"

#: What a study varies, by the names that its plan has for it.
_AXES = {
    "methods": option(str, STUDY, "NAMES", "Methods to compare, such as static,set,rigl,dense."),
    "densities": option(str, STUDY, "SHARES", r"Such as 0.02,0.1. \[default: 0.1]"),
    "seeds": option(str, STUDY, "NUMBER", r"How many seeds, or which: 3, or 5,6,9. \[default: 3]"),
    "data": option(str, STUDY, "NAMES", r"Data sets, such as digits,mnist. \[default: digits]"),
    "models": option(
        list[str], STUDY, "NAME", r"A network; may be repeated. \[default: mlp:300,100]", "--model"
    ),
    "tune": option(
        str,
        STUDY,
        "TRIALS",
        "Search the settings of every method first, with so many trials each, by validation "
        r"accuracy; the winners then run on the seeds. \[default: 0]",
    ),
    "untuned": option(
        bool, STUDY, "", "With --tune: the defaults of every method as well.", "--untuned"
    ),
    "match": option(
        str,
        STUDY,
        "WHAT",
        "What runs have equally: epochs, or multiply-adds, as many as the first method needs."
        r" \[default: epochs]",
    ),
}
_PLAN = {
    "method_options": option(
        list[str], STUDY, "METHOD.NAME=VALUE", "A parameter of a method; may be repeated.", "--set"
    ),
    "config": option(Path, STUDY, "FILE", "A plan in YAML; options given here go before it."),
    "recipe": option(str, STUDY, "NAME", "A plan that comes along: see rewire recipes."),
}
#: How the study is worked on, by the names of `rewire.app.studies.command.Options`.
_WORK = {
    "study": option(
        str, WORK, "NAME", r"Name of the study. \[default: made of the plan, the same each time]"
    ),
    "out": option(
        Path, WORK, "FOLDER", r"Where runs, tables and report go. \[default: runs/STUDY]"
    ),
    "storage": option(
        str,
        WORK,
        "URL",
        "The database: postgresql://USER:PASSWORD@HOST/DATABASE lets many machines work on one "
        r"study. \[default: study.db in --out]",
    ),
    "jobs": option(
        int,
        WORK,
        "NUMBER",
        "Runs at a time; 0 trains nothing and shows what there is. "
        r"\[default: one a core]",
    ),
    "patience": option(
        float, WORK, "SECONDS", r"How long the database may be away. \[default: a day]"
    ),
    "grace": option(
        int,
        WORK,
        "SECONDS",
        r"After how long a silence a worker on another machine counts as dead. \[default: 60]",
    ),
    "table": option(
        str, WORK, "KIND", r"What to print: terminal, markdown, latex or csv. \[default: terminal]"
    ),
    "quiet": option(bool, WORK, "", "Print the table and errors only.", "--quiet", "-q"),
}
_OWN = _AXES | _PLAN | _WORK
#: Fields of a run that a study varies under other names.
_VARIED = ("method", "density", "connections", "seed", "hidden", "model")
_OF_RUNS = {
    name: made for name, made in train_options().items() if name not in _VARIED and name not in _OWN
}


@with_options(_OWN | _OF_RUNS)
def compare(**given: Any) -> None:
    """Compare methods: every method at every density, on every data set, with several seeds.

    Give the same command again, also at the same time in other terminals or on other machines with
    the same --storage, and they work together: no run is made twice, and one that was broken off
    goes on from its last checkpoint. Leaves a table and a report.
    """
    from rewire.app.studies import command

    command.needed()
    plan, axes, work = (given_of(given, table) for table in (_PLAN, _AXES, _WORK))
    if "config" in plan and "recipe" in plan:
        raise CommandError("--config and --recipe are both plans: give one of them")
    for name, least, unit in (("jobs", 0, ""), ("grace", 15, " of seconds")):
        if work.get(name, least) < least:
            raise CommandError(
                f"--{name}: given {work[name]}, allowed is a whole number{unit} from {least}"
            )
    kinds = ("terminal", *command.FORMATS)
    if work.get("table", "terminal") not in kinds:
        raise CommandError(f"--table: given {work['table']!r}, allowed are {', '.join(kinds)}")
    source = plan.get("config")
    if "recipe" in plan:
        source = command.recipe_path(plan["recipe"])
        work["study"] = work.get("study") or plan["recipe"]
    command.compare(
        command.plan_from(source, axes, given_of(given, _OF_RUNS), plan.get("method_options", [])),
        command.Options(**work),
    )


def recipes() -> None:
    """List the plans that come along, one for each published claim."""
    from rewire.app.studies import command

    command.needed()
    command.list_recipes()
