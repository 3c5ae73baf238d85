"""The machine's ceilings: the native function counts right, and caches are read as the system has
them.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from rewire import _native
from rewire.app.bench import ceilings
from rewire.app.bench.ceilings import Ceilings, Level
from rewire.app.bench.curves import Setting

NATIVE = pytest.mark.skipif(
    not _native.available("multiply_adds"), reason="the C++ extension is not in use"
)


@NATIVE
def test_every_number_is_read_in_every_pass() -> None:
    x = torch.randint(0, 9, (3, 2 * 192)).float()
    assert torch.ops.rewire.multiply_adds(x, 5, True) == 0.5 * 5 * float(x.sum())
    in_registers = torch.ops.rewire.multiply_adds(x, 50, False)
    assert in_registers == pytest.approx(3 * 2 * 192)  # every sum of 192 tends to 2


@NATIVE
def test_a_second_takes_as_long_as_the_work_is() -> None:
    """Twice the passes take twice the time: nothing was left out by the compiler."""
    x = torch.ones(1, 192 * 20)

    def took(passes: int) -> float:
        best = 1e9
        for _ in range(7):
            start = time.process_time()
            torch.ops.rewire.multiply_adds(x, passes, True)
            best = min(best, time.process_time() - start)
        return best

    assert 1.3 < took(40_000) / took(20_000) < 3.0


@NATIVE
@pytest.mark.parametrize(
    ("x", "passes"),
    [
        (torch.ones(192), 1),
        (torch.ones(1, 191), 1),
        (torch.ones(1, 192, dtype=torch.float64), 1),
        (torch.ones(1, 192), -1),
        (torch.ones(1, 192), 2**62),
    ],
)
def test_wrong_arguments(x: torch.Tensor, passes: int) -> None:
    with pytest.raises(RuntimeError, match="multiply_adds"):
        torch.ops.rewire.multiply_adds(x, passes, True)


@NATIVE
def test_nearer_is_not_slower() -> None:
    found = ceilings.of(Setting(threads=1, seconds=0.2))
    assert found is not None
    assert [level.name for level in found.levels[:2]] == ["L1", "L2"]
    assert found.levels[-1] == found.holding(2**60)
    assert found.peak > 0.5 * max(level.flops for level in found.levels)
    assert found.levels[0].flops > found.levels[-1].flops


def test_without_native_kernels_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available", lambda *_: False)
    assert ceilings.of(Setting()) is None


def test_where_x_lies() -> None:
    levels = (Level("L1", 1000, 9e9), Level("L2", 100_000, 5e9), Level("memory", None, 1e9))
    found = Ceilings(1e10, levels)
    assert found.for_rows(10, 25).name == "L1"
    assert found.for_rows(100, 128).name == "L2"
    assert found.for_rows(100, 9999).name == "L2"  # not more rows than are kept together
    assert found.for_rows(1000, 128).name == "memory"


def test_caches(tmp_path: Path) -> None:
    for number, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M")]
    ):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert ceilings.cache_sizes(tmp_path) == (48 << 10, 2 << 20)
    assert ceilings.cache_sizes(tmp_path / "none") == (32 << 10, 1 << 20, 8 << 20)
    (tmp_path / "index0" / "size").write_text("much")
    assert len(ceilings.cache_sizes(tmp_path)) == 3
