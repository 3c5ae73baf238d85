"""Pages that MkDocs makes from the code: one per method, the API reference, changelog.

MkDocs calls the functions `on_...` (mkdocs.yml names this file as a hook). Methods come from
the registry, through what `rewire.methods.MethodInfo` offers to everybody, so a new method has a
page without any other change.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from rewire import methods
from rewire.formats import FORMATS

ROOT = Path(__file__).parents[1]

#: The plans of published claims.
RECIPES = ROOT / "src" / "rewire" / "app" / "studies" / "recipes"

#: The public modules, in the order of the API reference: all that `__all__` of these names is.
PUBLIC = (
    "rewire",
    "rewire.nn",
    "rewire.nn.surgery",
    "rewire.methods",
    "rewire.methods.criteria.drop",
    "rewire.methods.criteria.grow",
    "rewire.methods.criteria.gradients",
    "rewire.methods.criteria.topk",
    "rewire.methods.criteria.similarity",
    "rewire.methods.criteria.share",
    "rewire.methods.criteria.sampling",
    "rewire.budget",
    "rewire.schedules",
    "rewire.ema",
    "rewire.posterior",
    "rewire.distributed",
    "rewire.export",
    "rewire.formats",
    "rewire.lightning",
    "rewire.sklearn",
    "rewire.transformers",
    "rewire.ops",
    "rewire.topology",
    "rewire.random",
)

#: Where a page has the table of formats.
FORMATS_HERE = "<!-- table of formats -->"

BUDGETS = {
    "every step": "exactly K connections after every step",
    "every update": "exactly the planned number after every update, K at the end",
    "at most": "never more than K connections",
    "no": "not kept: the method decides how many connections are left",
}


def public_names(module: ModuleType) -> list[str]:
    """The names of ``__all__`` that are documented with the module: no submodules."""
    return [
        name
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name)) and not name.startswith("__")
    ]


@functools.cache
def linked_names() -> frozenset[str]:
    """Public names that have a place in the reference, or a page of their own."""
    modules = {path: importlib.import_module(path) for path in PUBLIC}
    return frozenset(f"{p}.{name}" for p, m in modules.items() for name in public_names(m))


def prose(docstring: str) -> str:
    """A docstring as Markdown: a literal block begins after `:`, and public names are links."""

    def link(found: re.Match[str]) -> str:
        return f"[`{found[1]}`][{found[1]}]" if found[1] in linked_names() else found[0]

    text = re.sub(r"::$", ":", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return re.sub(r"(?<![`\[])`(rewire\.[\w.]+)`(?!`)", link, text)


def first_sentence(docstring: str) -> str:
    paragraph = " ".join(prose(docstring).split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0].rstrip(":")


def cell(text: object) -> str:
    """Text within a table."""
    return " ".join(prose(str(text)).split()).replace("|", "\\|") or "-"


# ------------------------------------------------------------------------------------- methods


def table_of_parameters(entry: methods.MethodInfo) -> Iterator[str]:
    found = entry.parameters()
    if not found:
        yield "This method has no hyper-parameters."
        return
    yield "| name | meaning | allowed | default |"
    yield "| --- | --- | --- | --- |"
    for p in found.values():
        allowed = p.allowed().replace("a finite number", "a number")
        yield f"| `{p.name}` | {cell(p.help)} | {cell(allowed)} | `{p.default!r}` |"


def starts(entry: methods.MethodInfo) -> str:
    if entry.cls.starts_dense:
        return "from an ordinary dense model, and ends with sparse or smaller layers"
    if entry.start_density is not None:
        density = f"{entry.start_density:g}"
        return f"from sparse layers of density {density}, and comes down to the budget"
    return "from sparse layers that have their budget already"


def description(cls: type) -> str:
    """What the docstring of a method's class says, without its list of parameters."""
    sections = griffe.Docstring(inspect.getdoc(cls) or "").parse("google", warnings=False)
    text = griffe.DocstringSectionKind.text
    return prose("\n\n".join(part.value for part in sections if part.kind is text))


def own_members(cls: type) -> list[str]:
    """Public functions and properties that a method's class adds to those of every method."""

    def is_defined_here(value: object) -> bool:
        function = value.fget if isinstance(value, property) else value
        return getattr(function, "__qualname__", "").startswith(f"{cls.__qualname__}.")

    return [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, property))
        and is_defined_here(value)
        and not hasattr(methods.Method, name)
    ]


def method_page(name: str) -> str:
    entry = methods.info(name)
    cls = entry.cls
    path = f"{cls.__module__}.{cls.__qualname__}"
    exported = cls.__name__ in methods.__all__
    in_python = f"rewire.methods.{cls.__name__}" if exported else path
    lines = [
        f"# `{name}`",
        "",
        f"{entry.summary[:1].upper()}{entry.summary[1:]}.",
        "",
        "```sh",
        f"rewire train --data digits --method {name}",
        "```",
        "",
        f"[](){{#{in_python}}}In Python: `{in_python}(model, optimizer, ...)`, or "
        f"`rewire.methods.create({name!r}, model, optimizer, ...)`. The [tutorial](../tutorial.md) "
        "has the loop.",
        "",
        "| | |",
        "| --- | --- |",
        f"| paper | {cell(entry.paper)} |",
        f"| starts | {starts(entry)} |",
        f"| budget | {cell(BUDGETS.get(entry.keeps_budget, entry.keeps_budget))} |",
        f"| guarantees | {cell('; '.join(entry.guarantees))} |",
        f"| memory | {entry.memory}"
        f"{': in proportion to the connections' if entry.memory == 'O(K)' else ': dense state'} |",
        f"| needs | {cell(entry.needs or 'nothing but the optimizer')} |",
        f"| keeps limits on | {', '.join(entry.limits) or '-'} |",
        f"| keeps allowed positions and frozen connections | {'yes' if entry.prior else 'no'} |",
        "",
        "## How it works",
        "",
        description(cls),
        "",
        "## Hyper-parameters",
        "",
        "Keyword arguments in Python; `--set NAME=VALUE` on the command line.",
        "",
        *table_of_parameters(entry),
    ]
    if entry.services:
        given = ", ".join(f"`{service}`" for service in entry.services)
        lines += ["", f"Besides these the constructor takes {given}; `rewire train` gives them."]
    members = own_members(cls)
    if members:
        lines += ["", "## Besides what every method has", ""]
    for member in members:
        lines += [f"::: {path}.{member}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines) + "\n"


def methods_page() -> str:
    lines = [
        "# Methods",
        "",
        "Every method has the same four calls, so that you can exchange one for another: "
        "`penalty()`, `step()`, `end_epoch()`, `finalize()`. "
        "[Compare methods](../guides/compare_methods.md) says how to choose; "
        "[Defaults](../defaults.md) what each of them reaches.",
        "",
        "K is the number of connections allowed, M the number of possible ones. A method of O(K) "
        "memory never makes an array of a weight's shape.",
        "",
        "| name | what it does | starts | keeps K | memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    kept = {"no": "-", "at most": "at most"}
    for name in methods.available():
        entry = methods.info(name)
        start = "dense model" if entry.cls.starts_dense else "sparse"
        if entry.start_density is not None:
            start = f"density {entry.start_density:g}"
        lines.append(
            f"| [`{name}`]({name}.md) | {cell(entry.summary)} | {start} | "
            f"{kept.get(entry.keeps_budget, entry.keeps_budget)} | {entry.memory} |"
        )
    lines += [
        "",
        "Two classes are no published methods but building blocks: "
        "[`Rewirer`][rewire.methods.Rewirer] composes a drop and a grow criterion, and "
        "[`Group`][rewire.methods.Group] uses several methods in one model; see "
        "[Write a method](../write_your_own_method.md).",
    ]
    return "\n".join(lines) + "\n"


def table_of_formats() -> str:
    """The formats of files, for the page that has the comment `FORMATS_HERE`."""
    lines = [
        "| format | `rewire export` | what it holds | extra | read back | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in FORMATS.values():
        option = f"`--{found.name} {found.metavar}`" if found.writes else "-"
        needs = f"`{found.extra}`" if found.extra else "-"
        name = f"`{found.name}`{''.join(f' {ending}' for ending in found.endings)}"
        reads = "yes" if found.reads else "no"
        lines.append(f"| {name} | {option} | {found.holds} | {needs} | {reads} | {found.memory} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- claims


def claims_page() -> str:
    """Every recipe of `rewire compare`: what its paper claims, and what was found here."""
    lines = [
        "# Claims of the papers",
        "",
        "Each published claim that this library measures is a recipe: a plan that "
        "`rewire compare --recipe NAME` runs. Scores are means over seeds on data that no choice "
        "was made on, with the standard deviation. *p* is that of a paired t-test over the seeds "
        "against the best row, adjusted by Holm's rule.",
        "",
    ]
    known = {path.stem: _claim(path) for path in sorted(RECIPES.glob("*.yaml"))}
    run = sum(found is not None for _, found in known.values())
    lines += [
        f"So far {run} of {len(known)} recipes have results here: they take hours to days of two "
        "cores. `benchmarks/claims.py` runs recipes and keeps what they find; other pages of these "
        "results have earlier measurements of DEEP R, HALO, ternary networks and NoiseOut.",
        "",
    ]
    lines += ["| recipe | claims that hold | runs |", "| --- | --- | --- |"]
    for name, (_, found) in known.items():
        held = runs = "not run yet"
        if found is not None:
            told = [claim["holds"] for claim in found["claims"]]
            held = f"{told.count(True)} of {len(told)}"
            held += f", {told.count(None)} not known yet" if None in told else ""
            runs = "{ended} of {planned}".format(**found["runs"])
        lines.append(f"| [{name}](#{name}) | {held} | {runs} |")
    for name, (recipe, found) in known.items():
        lines += ["", f"## {recipe['title']} {{#{name}}}", "", f"*{cell(recipe['claim'])}*", ""]
        lines.append(f"Source: {cell(recipe['source'])}.")
        if "scaled" in recipe:
            lines.append(f"Scaled here: {cell(recipe['scaled'])}.")
        lines += ["", f"`rewire compare --recipe {name}`", ""]
        if found is None:
            lines.append("Nobody has run this recipe for this page yet.")
            continue
        for claim in found["claims"]:
            verdict = {True: "holds", False: "**missed**", None: "not known yet"}[claim["holds"]]
            value = "" if claim["found"] is None else f" (found {claim['found']:.2f})"
            lines.append(f"- {verdict}: {cell(claim['claim'])}{value}")
        m = found["machine"]
        lines += [
            "",
            f"{found['runs']['ended']} of {found['runs']['planned']} runs, {found['date']}: "
            f"{m['cpu']}, {m['cores']} cores, torch {found['torch']}, rewire {m['rewire']}, "
            f"{m['kernels']}.",
            "",
            found["table"],
        ]
    return "\n".join(lines) + "\n"


def _claim(recipe: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A recipe, and its results if there are any."""
    results = ROOT / "docs" / "results" / "claims" / f"{recipe.stem}.json"
    found = json.loads(results.read_text()) if results.exists() else None
    return yaml.safe_load(recipe.read_text()), found


# --------------------------------------------------------------------------------------- API


def api_page(path: str) -> str:
    module = importlib.import_module(path)
    lines = [f"# {path}", "", prose(module.__doc__ or ""), ""]
    own = {}
    if path == "rewire.methods":
        own = {methods.info(name).cls.__name__: name for name in methods.available()}
        lines += ["The methods themselves have [pages of their own](../methods/index.md).", ""]
    for name in public_names(module):
        if name not in own:
            lines += [f"::: {path}.{name}", ""]
    return "\n".join(lines)


def api_index() -> str:
    lines = [
        "# API reference",
        "",
        "What is public is what `__all__` of these modules names. Everything else may change "
        "without notice.",
        "",
        "| module | what is in it |",
        "| --- | --- |",
    ]
    for path in PUBLIC:
        summary = first_sentence(importlib.import_module(path).__doc__ or "")
        lines.append(f"| [`{path}`]({path}.md) | {cell(summary)} |")
    return "\n".join(lines) + "\n"


class PlainDocstrings(griffe.Extension):
    """Docstrings as Markdown: literal blocks, and links to public names in backticks."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = prose(obj.docstring.value)


# ------------------------------------------------------------------------------------- MkDocs


def pages() -> dict[str, str]:
    """All generated pages by their place under docs/."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    return {
        "changelog.md": changelog,
        "contributing.md": contributing.replace("](docs/", "]("),
        "claims.md": claims_page(),
        "methods/index.md": methods_page(),
        **{f"methods/{name}.md": method_page(name) for name in methods.available()},
        "api/index.md": api_index(),
        **{f"api/{path}.md": api_page(path) for path in PUBLIC},
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation, under their indexes."""
    below = {
        "Methods": [{name: f"methods/{name}.md"} for name in methods.available()],
        "API reference": [{path: f"api/{path}.md"} for path in PUBLIC],
    }
    for item in config.nav or ():
        for title, entries in below.items():
            if title in item:
                item[title] = [item[title], *entries]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of the folder."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of formats where a page asks for it."""
    return markdown.replace(FORMATS_HERE, table_of_formats())


#: A tag that makes a browser fetch something from another server; a link that people follow is
#: fine.
_FETCHES = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\">]*")


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn of what a page fetches from elsewhere: a strict build then fails."""
    for tag in _FETCHES.findall(output):
        logging.getLogger("mkdocs.hooks.generate").warning(
            "%s fetches from another server: %s", page.file.src_uri, tag
        )
    return output
