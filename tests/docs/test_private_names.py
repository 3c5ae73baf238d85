"""No module of the package reads a private name of another one, except from base classes."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import rewire

PACKAGE = Path(rewire.__file__).parent


class Pair(NamedTuple):
    """For the private names of named tuples."""

    one: int


#: Private attributes that PyTorch and Python give to modules, tensors, optimizers, named tuples.
LIBRARY = frozenset(
    name
    for thing in (
        nn.Module(),
        nn.RNN(1, 1),
        nn.MultiheadAttention(1, 1),
        torch.zeros(()),
        torch.optim.SGD([torch.zeros(())]),
        Pair(1),
    )
    for name in dir(thing)
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_in(tree: ast.AST) -> set[str]:
    """The private functions, classes, variables and attributes that a module defines or sets."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def bases_of(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For each module, the modules that define base classes, near and far, of its classes."""
    classes: dict[str, list[tuple[str, list[str]]]] = {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
                classes.setdefault(node.name, []).append((module, bases))
    found: dict[str, set[str]] = {module: set() for module in trees}
    for entries in classes.values():
        for module, bases in entries:
            waiting, seen = list(bases), set()
            while waiting:
                name = waiting.pop()
                for home, further in classes.get(name, []) if name not in seen else ():
                    found[module].add(home)
                    waiting += further
                seen.add(name)
    return found


def foreign_names(trees: dict[str, ast.Module]) -> list[str]:
    """The places at which a module imports or reads a private name that only others define."""
    own = {module: defined_in(tree) for module, tree in trees.items()}
    everywhere = set().union(*own.values()) - LIBRARY
    bases = bases_of(trees)
    found = []
    for module, tree in trees.items():
        foreign = everywhere - own[module].union(*(own[base] for base in bases[module]))
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rewire."):
                names = [alias.name for alias in node.names if is_private(alias.name)]
            elif isinstance(node, ast.Attribute) and node.attr in foreign:
                names = [node.attr]
            found += [f"{module}:{node.lineno} reads {name}" for name in names]
    return found


def test_no_module_reads_private_names_of_another() -> None:
    trees = {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert len(trees) > 100
    assert foreign_names(trees) == []


def test_a_private_name_of_another_module_is_found() -> None:
    one = ast.parse("def _helper(): ...\nclass A:\n    def __init__(self):\n        self._x = 1\n")
    other = ast.parse("from rewire.one import _helper\ndef f(a):\n    return a._x\n")
    assert foreign_names({"one.py": one, "other.py": other}) == [
        "other.py:1 reads _helper",
        "other.py:3 reads _x",
    ]
    heir = ast.parse("class B(A):\n    def f(self):\n        return self._x\n")
    assert foreign_names({"one.py": one, "heir.py": heir}) == []
