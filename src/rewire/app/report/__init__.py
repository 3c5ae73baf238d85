"""The HTML report of a run."""

from rewire.app.report.page import write

__all__ = ["write"]
