"""Methods of one's own: the docs' example, groups, and classes from other packages."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import assert_identical
from interpreter import run_python
from rewire import methods
from rewire.methods import SET, SNIP, DeepR, Group, OneShot, RigL, Static, parameter
from rewire.methods.core.registry import _METHODS
from rewire.nn import SparseConv2d, SparseLinear, sparse_weights

DOCS = (Path(__file__).parents[3] / "docs" / "write_your_own_method.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.conv1 = SparseConv2d(1, 4, 3, padding=1, connections=20, generator=g)
        self.conv2 = SparseConv2d(4, 4, 3, padding=1, connections=60, generator=g)
        self.fc1 = SparseLinear(64, 20, connections=200, generator=g)
        self.fc2 = SparseLinear(20, 4, connections=40, generator=g)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu()).relu().flatten(1)
        return self.fc2(self.fc1(x).relu())


def train(model: nn.Module, optimizer: Any, method: Any, steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 1, 4, 4, generator=g), torch.randint(0, 4, (6,), generator=g)
        loss = nn.functional.cross_entropy(model(x), y) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.step()
        if step % 4 == 3:
            method.end_epoch()


def test_the_docs_examples_run() -> None:
    one, own, group = EXAMPLES
    model = Net()
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(one, names)
    train(model, names["optimizer"], names["method"], range(3))
    try:
        exec(own, names)
        assert "columns" in methods.available()
        method = methods.create("columns", model, names["optimizer"], every=2, seed=1)
        train(model, names["optimizer"], method, range(8))
        assert method.stats()["updates"] == 4
        assert sum(w.connections for _, w in sparse_weights(model)) == 320
        assert method.stats()["dropped"]["fc1.weight"] == 4 * 40
    finally:
        _METHODS.pop("columns", None)
    exec(group, names)
    train(model, names["optimizer"], names["method"], range(3))
    assert isinstance(names["method"]["conv*"], RigL)


def make(seed: int = 0, method_seed: int = 3) -> tuple[Net, Any, Group]:
    model = Net(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    group = Group(
        model,
        optimizer,
        {
            "conv*": partial(RigL, every=2),
            "fc1": partial(DeepR, l1=1e-3, noise=0.01),
            "fc2": partial(OneShot, connections=10, after=1),
        },
        seed=method_seed,
    )
    return model, optimizer, group


def test_each_method_has_its_layers() -> None:
    model, optimizer, group = make()
    assert [[p.name for p in m.pools] for m in group.methods.values()] == [
        ["conv1.weight", "conv2.weight"],
        ["fc1.weight"],
        ["fc2.weight"],
    ]
    streams = [p.stream(1) for m in group.methods.values() for p in m.pools]
    assert len(set(streams)) == 4
    train(model, optimizer, group, range(6))
    stats = group.stats()
    assert stats["steps"] == 6
    assert list(stats["dropped"]) == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert all(n > 0 for n in stats["dropped"].values())
    assert group["fc1"].steps == 6  # RigL's skipped steps are its own layers' alone
    assert group.count_connections() == {
        "conv1.weight": 20,
        "conv2.weight": 60,
        "fc1.weight": 200,
        "fc2.weight": 10,
    }
    assert group.finalize() is model
    assert not any(w.followers for _, w in sparse_weights(model))


def test_what_acts_on_all_parameters_acts_on_its_own_in_a_group() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    patterns = {
        "conv*": partial(SNIP, batches=3, density=0.3),
        "fc1": partial(SET, optimizer_state="reset", every=1),
        "fc2": Static,
    }
    group = Group(model, optimizer, patterns, seed=1)
    before = {name: w.values.detach().clone() for name, w in sparse_weights(model)}
    # SNIP measures: its layers rest, the others are trained
    train(model, optimizer, group, range(2))
    moved = {
        name: not torch.equal(before[name], w.values.detach()) for name, w in sparse_weights(model)
    }
    assert moved == {
        "conv1.weight": False,
        "conv2.weight": False,
        "fc1.weight": True,
        "fc2.weight": True,
    }
    assert group["fc2"].steps == 2
    assert model.fc1.weight.values not in optimizer.state
    assert optimizer.state[model.fc2.weight.values]["momentum_buffer"].any()
    assert optimizer.state[model.fc1.bias]["momentum_buffer"].any()


def test_a_group_resumes_bit_exactly() -> None:
    model, optimizer, group = make()
    train(model, optimizer, group, range(9))
    first, its_optimizer, its_group = make()
    train(first, its_optimizer, its_group, range(5))
    second, other_optimizer, other_group = make(9, 8)
    second.load_state_dict(first.state_dict())
    other_optimizer.load_state_dict(its_optimizer.state_dict())
    other_group.load_state_dict(its_group.state_dict())
    train(second, other_optimizer, other_group, range(5, 9))
    assert_identical(dict(model.state_dict()), dict(second.state_dict()))
    assert group.stats() == other_group.stats()
    with pytest.raises(ValueError, match="state of a group of conv"):
        Group(model, optimizer, {"*": Static}).load_state_dict(group.state_dict())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"conv*": SET}, r"no pattern matches fc1.weight, fc2.weight"),
        (
            {"conv*": SET, "*": Static},
            r"more than one pattern matches conv1.weight \(conv\* "
            r"and \*\)",
        ),
        ({"*": Static, "lstm*": SET}, "no trained sparse weight matches lstm"),
        ({"conv*": partial(SET, fraction=2.0), "fc*": Static}, "fraction must be"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(patterns: Any, message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=message):
        Group(model, torch.optim.SGD(model.parameters(), lr=0.1), patterns)


PLUGIN = '''
from rewire.methods import Method, register

@register(
    name="plug", paper="none", summary="does nothing", keeps_budget="every step", guarantees=("K",)
)
class Plug(Method):
    """Nothing."""
'''


def test_what_a_method_of_another_package_requires_is_asked_for_by_name() -> None:
    class Needy(Static):
        """Nothing."""

        level: float = parameter(help="how high it is")

    about = {
        "paper": "none",
        "summary": "does nothing",
        "keeps_budget": "every step",
        "guarantees": ("K",),
    }
    methods.register(name="needy", **about)(Needy)
    try:
        model = Net()
        with pytest.raises(ValueError, match="needy needs level=: how high it is"):
            methods.create("needy", model, torch.optim.SGD(model.parameters(), lr=0.1))
    finally:
        _METHODS.pop("needy")


def test_classes_of_other_packages_are_found_and_broken_ones_named(tmp_path: Path) -> None:
    (tmp_path / "plug_module.py").write_text(PLUGIN)
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[rewire.methods]\nplug = plug_module:Plug\nbroken = plug_module:Missing\nalias = "
        "plug_module:Plug\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import warnings\n"
        "from rewire import methods\n"
        "assert methods.info('plug').cls.__name__ == 'Plug'\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    assert 'plug' in methods.available() and 'broken' not in methods.available()\n"
        "print(len(seen))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "'broken' of plug (plug_module:Missing) cannot be used" in done.stderr
