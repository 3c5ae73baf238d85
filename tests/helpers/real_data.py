"""Where the tests find real data sets that are too large to ship."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "REWIRE_TEST_DATA"


def folder(name: str) -> Path:
    """The folder that holds the subfolder `name`; skips the test where there is none."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    places = [Path(os.environ[VARIABLE])] if VARIABLE in os.environ else [beside]
    for place in places:
        if (place / name).is_dir():
            return place
    pytest.skip(f"no real {name} files: set {VARIABLE} to a folder with a subfolder {name}/")
