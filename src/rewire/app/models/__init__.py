"""The networks that `--model` names, and those of one's own."""

from rewire.app.models.spec import NAMES, Signature, build, call_with, load_object, parse

__all__ = ["NAMES", "Signature", "build", "call_with", "load_object", "parse"]
