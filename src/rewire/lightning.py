"""A callback for Lightning's Trainer (the extra ``lightning``)."""

from __future__ import annotations

try:
    import lightning as _lightning  # noqa: F401
except ImportError as error:
    raise ImportError(
        "rewire.lightning needs lightning: pip install 'torch-rewire[lightning]'"
    ) from error

from rewire.adapters.lightning import RewireCallback

__all__ = ["RewireCallback"]
