"""A callback for the Trainer of Hugging Face's transformers (the extra ``transformers``)."""

from __future__ import annotations

try:
    import accelerate as _accelerate  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "rewire.transformers needs transformers and accelerate: "
        "pip install 'torch-rewire[transformers]'"
    ) from error

from rewire.adapters.conv1d import conv1d_to_linear
from rewire.adapters.transformers import RewireCallback

__all__ = ["RewireCallback", "conv1d_to_linear"]
