"""The HTML report of a run."""

from .page import write
from .read import ReportError

__all__ = ["ReportError", "write"]
