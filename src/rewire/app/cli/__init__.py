"""The command line."""

from rewire.app.cli.program import run

__all__ = ["run"]
