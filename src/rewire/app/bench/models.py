"""Finds the layers of a model and what passes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewire.app.bench import networks
from rewire.app.bench.targets import transformer
from rewire.app.bench.targets.transformer import GPT_40M
from rewire.app.errors import BenchError
from rewire.app.importing import find_object, made_network
from rewire.nn.forward.tensors import first_input

__all__ = ["MODELS", "Found", "Known", "layers", "load"]


@dataclass(frozen=True)
class Known:
    """A model known by name: what makes it, the shape of a sample, and samples in a batch."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 128


MODELS = {
    "mlp": Known(networks.set_mlp, (3072,)),
    "resnet18": Known(networks.resnet18, (3, 224, 224), 32),
    "gpt-40m": Known(transformer.gpt_40m, (GPT_40M.steps,), GPT_40M.batch),
}


#: Layers that have a sparse twin but are not measured.
_OTHERS = nn.RNNBase | nn.MultiheadAttention | nn.Conv1d | nn.Conv3d


@dataclass(frozen=True)
class Found:
    """A linear layer or 2-D convolution, and its input's shape for ``rows`` rows or images."""

    module: nn.Module
    shape: tuple[int, ...]
    rows: int

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer."""
        return isinstance(self.module, nn.Linear)

    @property
    def inputs(self) -> int:
        """Input features or channels."""
        return int(getattr(self.module, "in_features" if self.is_linear else "in_channels"))

    @property
    def outputs(self) -> int:
        """Output features or channels."""
        return int(getattr(self.module, "out_features" if self.is_linear else "out_channels"))

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for layers that take equally long."""
        m = self.module
        how = (
            ()
            if isinstance(m, nn.Linear)
            else (m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
        )
        return (self.inputs, self.outputs, self.shape, self.rows, *how)

    @property
    def shown(self) -> str:
        """How it is printed."""
        if self.is_linear:
            return f"linear {self.outputs} x {self.inputs}"
        kernel = " x ".join(map(str, self.module.kernel_size))  # type: ignore[arg-type]
        size = " x ".join(map(str, self.shape[2:]))
        return f"conv {kernel}, {self.inputs} to {self.outputs} channels, {size}"


def load(source: str, shape: Sequence[int] | None) -> tuple[nn.Module, tuple[int, ...]]:
    """The model called ``source`` (one of `MODELS`) or made by "module:callable", and the shape of
    a sample.

    Without ``shape``, a model of your own takes what its first linear layer takes.
    """
    if source in MODELS:
        return MODELS[source].make(), tuple(shape or MODELS[source].shape)
    module_name, colon, attribute = source.partition(":")
    if not colon or not module_name or not attribute:
        allowed = ", ".join(MODELS)
        raise BenchError(
            f"--model: given {source!r}, allowed are {allowed} or path.to.module:callable"
        )
    model = made_network(source, lambda: find_object(source)())
    if shape is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)
        if not isinstance(first, nn.Linear):
            raise BenchError(
                f"--model: {source!r} does not tell its input: give --input, such as "
                "--input 3x224x224"
            )
        shape = (first.in_features,)
    return model, tuple(shape)


def _sample(model: nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    leaves = (m for m in model.modules() if next(m.children(), None) is None)
    first = next(leaves, None)
    if isinstance(first, nn.Embedding):
        return torch.randint(first.num_embeddings, size)
    return torch.randn(size)


@torch.no_grad()
def layers(
    model: nn.Module, shape: Sequence[int], batch: int
) -> tuple[list[tuple[str, Found]], list[tuple[str, str]]]:
    """The linear layers and 2-D convolutions of ``model`` that a sample passes, in order, with
    their inputs' shapes.

    Samples are random numbers, or tokens where the first layer is an `nn.Embedding`. Also the name
    and type of layers of other kinds that have a sparse twin and that a sample passes.
    """
    seen: dict[str, Found] = {}
    others: dict[str, str] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if isinstance(module, _OTHERS):
                others[name] = type(module).__name__
                return
            x = first_input(module, args, kwargs)
            # One sample went in: for a linear layer every leading dimension is another row.
            rows = x.shape[:-1].numel() if isinstance(module, nn.Linear) else x.shape[0]
            seen.setdefault(name, Found(module, tuple(x.shape), rows * batch))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | _OTHERS)
    ]
    training = model.training
    try:
        model.eval()(_sample(model, (1, *shape)))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        shown = "x".join(map(str, shape))
        raise BenchError(
            f"--model: a sample of shape {shown} does not pass: {reason}; give --input"
        ) from None
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not seen:
        only = f", only {', '.join(sorted({*others.values()}))}" if others else ""
        raise BenchError(
            f"--model: the model has no linear layer and no 2-D convolution to compare{only}"
        )
    return list(seen.items()), list(others.items())
