"""The networks that `--model` names, and those of one's own."""

from rewire.app.models.spec import NAMES, Signature, build, parse

__all__ = ["NAMES", "Signature", "build", "parse"]
