"""What every layer says where PyTorch would take it for one that TorchScript or data-parallel
threads can read.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

__all__ = ["Twin"]


class Twin(nn.Module):
    """A layer of `rewire.nn`; its ``forward`` takes the arguments of its twin in `torch.nn`, by the
    same names.

    TorchScript is refused: a trace would keep the topology of one moment as constants and lose the
    custom operators' gradients, and a script cannot read them. `torch.compile` and `torch.export`
    can.
    """

    def _slow_forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        # What `nn.Module` calls instead of forward while torch.jit.trace (or the old ONNX exporter,
        # by it) records.
        refuse_torchscript("torch.jit.trace", self)

    def __prepare_scriptable__(self) -> NoReturn:
        # What torch.jit.script asks of every module before it reads its code.
        refuse_torchscript("torch.jit.script", self)

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)


def refuse_torchscript(what: str, module: nn.Module) -> NoReturn:
    """Raise RuntimeError with the way that works."""
    raise RuntimeError(
        f"{what} cannot record {type(module).__name__}: TorchScript knows no sparse layers. Use "
        "torch.export.export(model, args) to save a model as a program (torch.onnx.export with "
        "dynamo=True goes that way), torch.compile(model) for speed, or rewire.densify(model) for "
        "a dense model that TorchScript takes"
    )


def refuse_data_parallel(module: nn.Module) -> NoReturn:
    """Raise RuntimeError with the way that works."""
    raise RuntimeError(
        f"torch.nn.DataParallel cannot replicate {type(module).__name__}: its copies live for one "
        "forward pass, and what a sparse weight knows of its gradients and topology would be lost "
        "with them. Use torch.nn.parallel.DistributedDataParallel after "
        "rewire.distributed.prepare(model)"
    )
