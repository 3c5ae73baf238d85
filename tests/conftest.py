"""Settings of all tests: few threads, reproducible random numbers, hypothesis without clock or
luck.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# cores are shared with other test processes; tests of threads choose their own number
torch.set_num_threads(1)

settings.register_profile(
    "rewire",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("rewire")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same default generator."""
    torch.manual_seed(0)
