"""The documentation: all Python of its pages runs, and all that is public is documented.

`make docs` builds the site, where a warning is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rewire
from pages import run_page
from rewire import methods
from rewire.formats import FORMATS
from rewire.methods.core import registry

ROOT = Path(__file__).parents[2]
WRITTEN = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


def generator() -> ModuleType:
    """docs/generate.py, which MkDocs runs as a hook."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = generator()


def differentiable(names: dict[str, Any]) -> None:
    assert [target.name for target in names["method"].targets] == ["bn1", "bn2", "branches"]
    assert names["model"](names["x"]).shape == (4, 2)


def noiseout(names: dict[str, Any]) -> None:
    assert names["model"][0].out_features == 1


def posterior(names: dict[str, Any]) -> None:
    assert len(names["samples"]) == 7
    again = rewire.posterior.Posterior.load("samples.safetensors", names["model"])
    assert torch.equal(again.predict(names["test_x"]).mean, names["prediction"].mean)


#: What the Python of a page must have come to, besides that it runs.
REACHED = {f"docs/{check.__name__}.md": check for check in (differentiable, noiseout, posterior)}


@pytest.mark.parametrize("page", WRITTEN)
def test_python_of_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # pages write files
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # and register methods
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    if page == "README.md":  # it shows no data
        names["loader"] = [(torch.rand(10, 784), torch.randint(0, 10, (10,))) for _ in range(5)]
    names = run_page(page, **names)
    if page in REACHED:
        REACHED[page](names)


def test_pages_that_are_looked_at_further_are_there() -> None:
    assert set(REACHED) <= set(WRITTEN)


@pytest.mark.parametrize("page", WRITTEN)
def test_no_python_hides_from_the_test_above(page: str) -> None:
    text = (ROOT / page).read_text()
    fences = re.findall(r"^```(py.*)$", text, re.MULTILINE)
    assert set(fences) <= {"python"}  # a title or attribute would hide the block
    assert "<!-- skip" not in text


def test_pages_made_from_code_show_no_python_that_nothing_runs() -> None:
    assert [page for page, text in GENERATE.pages().items() if "```python" in text] == []


def test_every_method_has_a_page_with_its_hyper_parameters() -> None:
    pages = GENERATE.pages()
    for name in methods.available():
        text = pages[f"methods/{name}.md"]
        assert f"--method {name}\n" in text
        table = text.partition("## Hyper-parameters")[2]
        shown = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
        assert shown == list(methods.info(name).parameters())
        assert f"[`{name}`]({name}.md)" in pages["methods/index.md"]


def test_the_page_on_formats_has_their_table() -> None:
    text = (ROOT / "docs" / "guides" / "exchange.md").read_text()
    made = GENERATE.on_page_markdown(text)
    for found in FORMATS.values():
        assert f"| `{found.name}`" in made
    assert made.count("\n| ") > text.count("\n| ") + len(FORMATS)


def test_the_page_on_installation_has_all_extras() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    part = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", part, re.MULTILINE))
    rows = re.findall(r"^\| (`\w.*?) \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(extras - {"dev"})
    script = (ROOT / ".ci" / "try_distributions").read_text()
    alone = script.partition("done <<'END'\n")[2].partition("\nEND")[0]
    tried = [line.partition(" ")[0] for line in alone.splitlines()]
    assert sorted(tried) == sorted(extras - {"app", "dev"}), "CI installs each extra alone"


def undocumented(path: str) -> list[str]:
    """Public names of a module, and public members of its classes, without a docstring."""
    module = importlib.import_module(path)
    found = []
    for name in GENERATE.public_names(module):
        value = getattr(module, name)
        if inspect.isclass(value):
            entries = ((member, inspect.getattr_static(value, member)) for member in dir(value))
            members = {
                member: getattr(entry, "__func__", entry)
                for member, entry in entries
                if not member.startswith("_") and _is_ours(getattr(entry, "__func__", entry))
            }
            found += [
                f"{name}.{member}"
                for member in members
                if not inspect.getdoc(getattr(value, member, None))
            ]
        if (inspect.isclass(value) or inspect.isroutine(value)) and not _documented(value):
            found.append(name)
    return [f"{path}.{name}" for name in found]


def _is_ours(value: Any) -> bool:
    function = value.fget if isinstance(value, property) else value
    return inspect.isfunction(function) and (function.__module__ or "").split(".")[0] == "rewire"


def _documented(value: Any) -> bool:
    """Whether it has a docstring of its own (not a parent's, nor what `dataclass` makes)."""
    own = value.__doc__ or ""
    return bool(own) and not own.startswith(f"{value.__name__}(")


@pytest.mark.parametrize("path", GENERATE.PUBLIC)
def test_public_symbols_are_documented(path: str) -> None:
    assert undocumented(path) == []


def test_every_public_module_is_in_the_reference() -> None:
    named = {f"rewire.{n}" for n in rewire.__all__ if inspect.ismodule(getattr(rewire, n))}
    assert named <= set(GENERATE.PUBLIC)


@pytest.mark.parametrize(
    ("tag", "fetches"),
    [
        ('<script src="https://elsewhere.org/a.js"></script>', True),
        ("<link rel=stylesheet href=//elsewhere.org/a.css>", True),
        ('<img alt="a picture" src=http://elsewhere.org/a.png>', True),
        ('<script src="assets/a.js"></script> <a href="https://elsewhere.org">there</a>', False),
    ],
)
def test_a_page_that_fetches_from_another_server_ends_the_strict_build(
    tag: str, fetches: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """`make docs` makes warnings of MkDocs's own loggers errors."""
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="a.md"))
    html = f"<html><body>{tag}</body></html>"
    assert GENERATE.on_post_page(html, page, None) == html
    assert len(caplog.records) == fetches
    assert all(r.levelname == "WARNING" and r.name.startswith("mkdocs.") for r in caplog.records)
