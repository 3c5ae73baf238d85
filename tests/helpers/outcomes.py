"""What came of a run of a study, as the tests of tables and reports invent it."""

from __future__ import annotations

from typing import Any


def outcome(score: float) -> dict[str, Any]:
    """The numbers that every run has."""
    return {
        "score": score,
        "loss": 0.5,
        "validation": score,
        "connections": 222,
        "possible": 2220,
        "epochs": 3,
        "seconds": 1.5,
        "training_multiply_adds": 2_593_404,
        "peak_memory": 1_250_000,
        "inference": {"ms": 0.25, "samples": 256, "threads": 1},
    }
