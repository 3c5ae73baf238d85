"""Running out of memory, whoever says so: real failures, not texts that were copied."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import rewire
from rewire.app import memory
from rewire.nn import SparseLinear

HUGE = 2**45  # numbers: more than a process can address


def _native() -> object:
    """A product whose result does not fit; its batch is one number, seen many times."""
    layer = SparseLinear(4, 4, connections=4)
    return layer(torch.zeros(1, 1).expand(HUGE, 4))


@pytest.mark.parametrize(
    "fail",
    [
        lambda: bytearray(2**62),
        lambda: np.zeros(HUGE),
        lambda: torch.empty(HUGE),
        lambda: torch.zeros(1).expand(HUGE).contiguous(),
        lambda: torch.zeros(2**20, 2**20) @ torch.zeros(2**20, 2**20),
        lambda: torch.empty(2**60, 2**60),
        _native,
    ],
    ids=[
        "python",
        "numpy",
        "torch",
        "torch, a copy",
        "torch, a product",
        "torch, beyond counting",
        "native",
    ],
)
def test_is_recognised(fail: Callable[[], object]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (its class is what differs)
        fail()
    assert memory.is_exhausted(caught.value), repr(caught.value)


def test_other_errors_are_not_taken_for_it() -> None:
    for fail in (
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: torch.zeros(2)[5],
        lambda: SparseLinear(4, 4, connections=4)(torch.zeros(3, 5)),
        lambda: rewire.nn.SparseWeight((4, 4), 40),
        lambda: Path("/nowhere/at/all").read_bytes(),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            fail()
        assert not memory.is_exhausted(caught.value), repr(caught.value)
