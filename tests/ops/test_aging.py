"""The native step of young connections against plain PyTorch, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewire import _native
from rewire.ops import aging

pytestmark = pytest.mark.skipif(not _native.available("age_step_"), reason="the native library is not in use")


def case(n: int, share: float, ages: torch.dtype, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(n)
    young = torch.rand(n, generator=g) < share
    made = torch.where(young, torch.randint(0, 900, (n,), generator=g), torch.tensor(-1)).to(ages)
    if ages == torch.int16 and n:
        made[0] = -3  # 65533: read as unsigned
    numbers = [torch.rand(n, generator=g, dtype=dtype) for _ in range(4)]
    tables = aging.Tables(*(torch.rand(800, generator=g, dtype=dtype) + 0.1 for _ in range(4)))
    return {"ages": made, "values": numbers[0], "first": numbers[1], "second": numbers[2], "gradient": numbers[3],
            "tables": tables}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ages", [torch.int16, torch.int32])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_as_plain_pytorch(with_gradient: bool, ages: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, share in ((0, 1.0), (1, 1.0), (700, 0.0), (700, 0.3), (270_000, 0.2)):
        given = case(n, share, ages, dtype)
        results = []
        for native in (True, False):
            if not native:
                monkeypatch.setattr(aging, "_is_native", lambda *tensors: False)
            mine = given | {"ages": given["ages"].clone(), "values": given["values"].clone()}
            if not with_gradient:
                mine["gradient"] = None
            before = aging.young_values(mine["ages"], mine["values"])
            mine["values"].mul_(2)
            aging.age_step_(
                before=before, lr=0.01, shrink=0.9, decay=0.1, maximize=True, squared=True, horizon=700, **mine
            )
            results.append((mine["ages"], before, mine["values"]))
            monkeypatch.undo()
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        exact = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(results[0][2], results[1][2], rtol=exact, atol=exact)


def test_what_the_native_step_refuses() -> None:
    good = case(700, 0.5, torch.int16, torch.float32)
    before = aging.young_values(good["ages"], good["values"])
    tables = good["tables"]
    step = torch.ops.rewire.age_step_

    def call(**other: Any) -> None:
        given = {k: v.clone() for k, v in good.items() if k != "tables"} | {"before": before} | other
        lists = [given[k] for k in ("ages", "values", "before", "first", "second", "gradient")]
        step(*lists, *given.get("tables", tables), 0.01, 1.0, 0.0, False, True, 700)

    call()
    short = before[:-1].clone()
    for bad, message in (
        ({"before": short}, "one number for each young connection"),
        ({"ages": good["ages"].long()}, "int16 or int32"),
        ({"ages": good["ages"][1:].clone()}, "same length"),
        ({"first": good["first"][1:].clone()}, "as long as values"),
        ({"gradient": good["gradient"].double()}, "dtype"),
        ({"values": torch.zeros(1400)[::2]}, "contiguous"),
        ({"tables": (tables.m[:5], *tables[1:])}, "of one length"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**bad)
