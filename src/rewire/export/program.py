"""Programs of `torch.export` with frozen layers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewire.nn.frozen.freeze import freeze
from rewire.nn.frozen.quantize import Values
from rewire.nn.weight.listing import sparse_weights
from rewire.storage.files import write_atomic

__all__ = ["save_program", "write"]


def save_program(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    values: Values | Mapping[str, Values] = "float",
    dynamic_batch: bool = True,
) -> int:
    """Write ``model`` as a program of `torch.export` with frozen layers; returns its bytes.

    The file holds 2 to 6 bytes for each connection and no slots, so it is smaller than that of the
    dense model below a density of a half. `torch.export.load` reads it where rewire is imported,
    which has its operators.

    Args:
        args: an example of the model's arguments, of at least one sample.
        values: see `rewire.freeze`; a model without sparse weights is exported as it is.
        dynamic_batch: let the first dimension of the arguments be any number of samples; else the
            program takes the shapes of the example.

    Raises ValueError as `rewire.freeze`, and where `torch.export` cannot follow the model. The file
    is complete or absent at every moment.
    """
    frozen = freeze(model, values) if any(sparse_weights(model)) else model.eval()
    shapes: Any = None
    if dynamic_batch:
        # An example of one sample would make 1 a constant of the program.
        args = tuple(a.expand(2, *a.shape[1:]) if a.shape[0] == 1 else a for a in args)
        shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
    try:
        with torch.no_grad():
            program = torch.export.export(frozen, args, dynamic_shapes=shapes)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"torch.export cannot follow the model: {reason}") from None
    file = io.BytesIO()
    torch.export.save(program, file)
    content = file.getvalue()
    write_atomic(Path(path), content)
    return len(content)


def write(model: nn.Module, path: Path, *, example: torch.Tensor, values: Values = "float") -> int:
    """`save_program` with an example of one tensor."""
    return save_program(model, (example,), path, values=values)
