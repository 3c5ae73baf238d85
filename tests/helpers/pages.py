"""The Python of a page of documentation, run block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]


def run_page(page: str, **names: Any) -> dict[str, Any]:
    """Run all Python of a page (a path within the repository) in one namespace, which begins as
    ``names``, and return the namespace.

    Blocks in ``<!-- invisible-code: python ... -->`` run too. One that must not run has the comment
    ``<!-- skip: next "why" -->`` before it; SkipTest is raised there.
    """
    document = Document.parse(str(ROOT / page), PythonCodeBlockParser(), SkipParser())
    document.namespace.update(names)
    for example in document.examples():
        example.evaluate()
    return document.namespace
