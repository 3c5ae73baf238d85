"""What README shows runs, and its table is the registry's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from rewire import methods

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_first_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    torch.manual_seed(0)
    loader = [(torch.rand(10, 784), torch.randint(0, 10, (10,))) for _ in range(5)]
    names: dict[str, Any] = {"loader": loader}
    exec(code[1], names)
    connections = [layer.weight.connections for layer in names["model"][::2]]
    assert connections == [2352, 900, 300]
    assert names["method"].stats()["steps"] == 50
    assert sum(names["method"].stats()["dropped"].values()) > 0


def test_method_table_is_the_registry() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (O\(\w\)) \|$", README, re.MULTILINE))
    assert rows == {name: methods.info(name).memory for name in methods.available()}
