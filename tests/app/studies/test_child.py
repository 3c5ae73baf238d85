"""What the process of a run tells the one that began it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rewire.app.studies import child
from rewire.app.studies.measure import Meter
from rewire.app.train.metrics import EpochRecord


@pytest.mark.parametrize("score", ["accuracy", "r2"])
def test_the_search_hears_the_validation_score_of_any_task(
    score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "epoch_ended", lambda self, record: None)
    sent: list[Any] = []
    reporter = child._Reporter.__new__(child._Reporter)
    reporter.told = SimpleNamespace(connection=SimpleNamespace(send=sent.append))  # type: ignore[assignment]
    scores: dict[str, Any] = {"train_accuracy": None, "validation_accuracy": None}
    scores |= {f"train_{score}": 0.5, f"validation_{score}": 0.25}
    lists: dict[str, Any] = {key: [1] for key in ("connections", "dropped", "grown", "turnover")}
    record = EpochRecord(
        epoch=1, step=2, lr=0.1, train_loss=0.3, validation_loss=0.4, seconds=1.0, **scores, **lists
    )
    reporter.epoch_ended(record)
    assert sent == [("epoch", [1, 0.25, 0.3])]
