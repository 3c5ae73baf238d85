"""`Twin`: the base class of all layers, which refuses TorchScript and `torch.nn.DataParallel`."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

__all__ = ["Twin"]


class Twin(nn.Module):
    """A layer whose ``forward`` takes the arguments of its twin in `torch.nn`, by the same names.

    It refuses TorchScript, because a trace would keep the topology of one moment as constants and
    lose the gradients of the custom operators, and a script cannot call them. `torch.compile` and
    `torch.export` work.
    """

    def _slow_forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        # `nn.Module` calls this instead of forward while torch.jit.trace records (also for the old
        # ONNX exporter).
        refuse_torchscript("torch.jit.trace", self)

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script calls this on every module before it reads its code.
        refuse_torchscript("torch.jit.script", self)

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)


def refuse_torchscript(what: str, module: nn.Module) -> NoReturn:
    """Raise RuntimeError, which says what to use instead."""
    raise RuntimeError(
        f"{what} cannot record {type(module).__name__}: TorchScript knows no sparse layers. Use "
        "torch.export.export(model, args) to save a model as a program (torch.onnx.export with "
        "dynamo=True goes that way), torch.compile(model) for speed, or rewire.densify(model) for "
        "a dense model that TorchScript takes"
    )


def refuse_data_parallel(module: nn.Module) -> NoReturn:
    """Raise RuntimeError, which says what to use instead."""
    raise RuntimeError(
        f"torch.nn.DataParallel cannot replicate {type(module).__name__}: its copies live for one "
        "forward pass, and what a sparse weight knows of its gradients and topology would be lost "
        "with them. Use torch.nn.parallel.DistributedDataParallel after "
        "rewire.distributed.prepare(model)"
    )
