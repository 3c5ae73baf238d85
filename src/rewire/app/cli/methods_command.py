"""The command `rewire methods`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

#: Columns from which the table has room for papers and guarantees.
_WIDE = 140


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show one method with its parameters.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with every parameter.")
    ] = False,
) -> None:
    """List the methods: paper, what they do, what they guarantee, memory."""
    from rewire.app.train import baselines as registry
    from rewire.app.train.config import check_name

    if name is not None:
        check_name("methods", name, registry.available())
    described = [_described(n) for n in registry.available() if name in (None, n)]
    if as_json:
        print(json.dumps(described, indent=2))
    elif name is None:
        _print_table(described)
    else:
        print(_page(described[0]))


def _described(name: str) -> dict[str, Any]:
    """All that is known of a method, as JSON has it."""
    from rewire.app.train import baselines as registry
    from rewire.app.train.config import make_config, method_options

    entry, suits = registry.info(name), make_config({"method": name})
    return {
        "name": entry.name,
        "paper": entry.paper,
        "summary": entry.summary,
        "keeps_budget": entry.keeps_budget,
        "guarantees": list(entry.guarantees),
        "memory": entry.memory,
        "starts_dense": entry.cls.starts_dense,
        "start_density": entry.start_density,
        "limits": list(entry.limits),
        "prior": entry.prior,
        "train": {"optimizer": suits.optimizer, "lr": suits.lr, "set": method_options(suits)},
        "parameters": {
            parameter.name: {"default": _plain(parameter.default), "help": parameter.help}
            for parameter in entry.parameters().values()
        },
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _page(method: dict[str, Any]) -> str:
    """One method, with its parameters."""
    lines = [
        f"{method['name']}: {method['summary']}",
        method["paper"],
        f"guarantees: {'; '.join(method['guarantees'])}",
    ]
    if method["start_density"] is not None:
        lines.append(f"starts: at density {method['start_density']:g}, comes down to its budget")
    if method["starts_dense"]:
        lines.append("starts: from an ordinary dense model")
    if method["limits"]:
        lines.append(f"keeps limits on: {', '.join(method['limits'])}")
    if method["prior"]:
        lines.append("keeps: allowed positions and frozen connections")
    train = method["train"]
    chosen = "".join(f" --set {name}={value}" for name, value in train["set"].items())
    lines += [
        f"memory: {method['memory']}",
        "rewire train, unless you say otherwise: "
        f"--optimizer {train['optimizer']} --lr {train['lr']:g}{chosen}",
        "parameters (--set name=value):" if method["parameters"] else "no parameters",
    ]
    for name, parameter in method["parameters"].items():
        lines.append(f"  {name} = {parameter['default']}\n      {parameter['help']}")
    return "\n".join(lines)


def _print_table(described: list[dict[str, Any]]) -> None:
    """All methods, as far as the terminal is wide."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    wide = console.width >= _WIDE
    table = Table(
        *("name", "memory", "what it does", *(("paper", "guarantees") if wide else ())),
        box=box.SIMPLE_HEAD,
        show_lines=wide,
    )
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for method in described:
        more = (method["paper"], "; ".join(method["guarantees"])) if wide else ()
        table.add_row(method["name"], method["memory"], method["summary"], *more)
    console.print(table)
    if not wide:
        print("rewire methods NAME shows one with its paper, guarantees and parameters")
