"""The HTML report of a run."""

from rewire.app.report.page import write
from rewire.app.report.read import ReportError

__all__ = ["ReportError", "write"]
