"""`save`: weights and connections in a format of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from rewire.formats import format_of

__all__ = ["save"]


def save(model: nn.Module, path: str | Path, format: str | None = None, **settings: Any) -> Any:
    """Write ``model`` in a format of `rewire.formats.FORMATS`; returns what its writer returns,
    mostly the bytes written.

    Args:
        path: the file, in a folder that exists; or the folder, for formats that write one.
        format: its name; by default the format that has the ending of ``path``.
        settings: those that the format takes: ``dense=True`` allows the dense form of weights above
            `rewire.export.DENSE_LIMIT` bytes.

    Raises ValueError for an unknown format or ending, for a setting that the format does not have,
    and for what the format cannot hold; ImportError, with the line to type, if a package that the
    format needs is missing; OSError. A file is complete or absent at every moment.
    """
    found = format_of(path, format, writing=True)
    odd = [name for name in settings if name not in found.settings]
    if odd:
        allowed = ", ".join(found.settings) or "no settings"
        raise ValueError(f"the format {found.name} has no {odd[0]}: it takes {allowed}")
    return found.writer()(model, Path(path), **settings)
