"""The native step of young connections against plain PyTorch and against the formula, and what it
refuses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewire import _native
from rewire.ops import aging

pytestmark = pytest.mark.skipif(
    not _native.available("age_step_"), reason="the native library is not in use"
)

OWN = (0.9, 0.2, 1.1, 0.05)


def case(n: int, share: float, ages: torch.dtype, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(n)
    young = torch.rand(n, generator=g) < share
    made = torch.where(young, torch.randint(0, 900, (n,), generator=g), torch.tensor(-1)).to(ages)
    if ages == torch.int16 and n:
        made[0] = -3  # 65533: read as unsigned
    numbers = [torch.rand(n, generator=g, dtype=dtype) for _ in range(4)]
    tables = aging.Tables(*(torch.rand(800, generator=g, dtype=dtype) + 0.1 for _ in range(4)))
    return {
        "ages": made,
        "values": numbers[0],
        "first": numbers[1],
        "second": numbers[2],
        "gradient": numbers[3],
        "tables": tables,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ages", [torch.int16, torch.int32])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_as_plain_pytorch(
    with_gradient: bool, ages: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, share in ((0, 1.0), (1, 1.0), (17, 1.0), (700, 0.0), (700, 0.3), (270_000, 0.2)):
        given = case(n, share, ages, dtype)
        results = []
        for native in (True, False):
            if not native:
                monkeypatch.setattr(aging, "_is_native", lambda *tensors: False)
            mine = given | {"ages": given["ages"].clone(), "values": given["values"].clone()}
            if not with_gradient:
                mine["gradient"] = None
            young = aging.age_step_(
                own=OWN, lr=0.01, decay=0.1, maximize=True, squared=True, horizon=700, **mine
            )
            assert young == int((mine["ages"] != -1).sum())
            results.append((mine["ages"], mine["values"]))
            monkeypatch.undo()
        assert torch.equal(results[0][0], results[1][0])
        old = given["ages"] == -1
        assert torch.equal(results[0][1][old], given["values"][old])
        exact = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(results[0][1], results[1][1], rtol=exact, atol=exact)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_young_values_end_where_a_step_of_their_age_leads(with_gradient: bool) -> None:
    """From the values before, one step by the optimizer's numbers and then `age_step_`: as one step
    by the age's.
    """
    given = case(500, 0.5, torch.int16, torch.float64)
    if not with_gradient:
        given["gradient"] = None
    before, first, second, gradient = (given[k] for k in ("values", "first", "second", "gradient"))
    ages, tables, lr, decay = given["ages"].clone(), given["tables"], 0.03, 0.2

    def stepped(m: Any, g: Any, root: Any, eps: Any) -> torch.Tensor:
        slope = 0.0 if gradient is None else g * (gradient + decay * before)
        return before - lr * (slope + m * first) / (root * second.sqrt() + eps)

    at = (ages.long() & 0xFFFF).clamp(max=799)
    right = torch.where(ages != -1, stepped(*(t[at] for t in tables)), stepped(*OWN))
    values = stepped(*OWN)
    aging.age_step_(
        ages,
        values,
        first,
        second,
        gradient,
        tables,
        OWN,
        lr=lr,
        decay=decay,
        maximize=False,
        squared=True,
        horizon=800,
    )
    torch.testing.assert_close(values, right, rtol=1e-12, atol=1e-12)


def test_what_the_native_step_refuses() -> None:
    good = case(700, 0.5, torch.int16, torch.float32)
    tables = good["tables"]
    step = torch.ops.rewire.age_step_

    def call(**other: Any) -> None:
        given = {k: v.clone() for k, v in good.items() if k != "tables"} | other
        lists = [given[k] for k in ("ages", "values", "first", "second", "gradient")]
        step(*lists, *given.get("tables", tables), *OWN, 0.01, 0.0, False, True, 700)

    call()
    for bad, message in (
        ({"ages": good["ages"].long()}, "int16 or int32"),
        ({"ages": good["ages"][1:].clone()}, "same length"),
        ({"first": good["first"][1:].clone()}, "as long as values"),
        ({"gradient": good["gradient"].double()}, "dtype"),
        ({"values": torch.zeros(1400)[::2]}, "contiguous"),
        ({"tables": (tables.m[:5], *tables[1:])}, "of one length"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**bad)
