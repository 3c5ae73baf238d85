"""What the benchmarks raise."""

from __future__ import annotations

__all__ = ["BenchError", "NotAvailable"]


class BenchError(Exception):
    """Something the user asked for cannot be; one line that says what is allowed."""


class NotAvailable(Exception):  # a bar without a verdict, not an error of anybody
    """A bar cannot be measured here (a layer that does not exist yet, an operating system without
    /proc).
    """
