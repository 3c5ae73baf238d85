"""The base of an adapter: a dense model, what training may change of it, and how that was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn.convert.kinds import join
from rewire.nn.layers.adapted import Adapted
from rewire.storage.tensors import content_sha256

__all__ = ["Base", "Identity"]

#: What is known of a tensor of the base: dtype, shape, and a checksum of its numbers.
Identity = tuple[str, tuple[int, ...], str]

_DIGITS = 16


class Base:
    """A dense model that an adapter changes, and what it needs to be as before.

    It keeps copies of buffers (running statistics change in training) and of the parameters that
    are trained, `trained`, and of no other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        self.trained: dict[str, Tensor] = {}
        self.buffers = {name: b.detach().clone() for name, b in _buffers(model)}
        #: Encoders and their layers whose fused kernels read the weights of layers themselves.
        self._fused = [
            (module, name, getattr(module, name))
            for module in model.modules()
            for kind, name in _FUSED
            if isinstance(module, kind) and hasattr(module, name)
        ]

    def freeze(self) -> None:
        """Let no parameter be trained but `trained`."""
        for name, parameter in _parameters(self.model):
            parameter.requires_grad_(name in self.trained)
            if name not in self.trained:
                parameter.grad = None

    def train(self, names: Iterable[str]) -> None:
        """Let these parameters be trained too, in the order of the model."""
        chosen = {id(self.model.get_parameter(name)) for name in names}
        for name, parameter in _parameters(self.model):
            if id(parameter) in chosen:
                self.trained[name] = parameter.detach().clone()
                parameter.requires_grad_(True)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the base, under all their names; those of differences are none."""
        own = {id(parameter) for _, parameter in _parameters(self.model)}
        every = self.model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in every if id(parameter) in own}

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [self.model.get_parameter(name) for name in self.trained]

    def refuse_others(self) -> None:
        """Raise ValueError if another parameter could have been trained, which no file would
        have.
        """
        for name, parameter in _parameters(self.model):
            if parameter.requires_grad and name not in self.trained:
                raise ValueError(
                    f"{name} requires a gradient and is not among the parameters that train= has "
                    "named, so the file would lack it: name it there, or freeze it"
                )

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """The buffers of ``model``, this one or a copy, that are not as they were here."""
        now = dict(_buffers(model))
        return {
            name: now[name]
            for name, before in self.buffers.items()
            if name in now and not _same(now[name], before)
        }

    def unfuse(self, adapted: bool) -> None:
        """Keep encoders of torch from their fused kernels, which would pass differences by; or give
        these back.
        """
        for module, name, was in self._fused:
            inside = any(isinstance(part, Adapted) for part in module.modules())
            setattr(module, name, type(was)() if adapted and inside else was)

    @torch.no_grad()
    def reset(self) -> None:
        """Give trained parameters and buffers the values that they had."""
        for name, value in self.trained.items():
            parameter = self.model.get_parameter(name)
            parameter.copy_(value)
            parameter.requires_grad_(False)
            parameter.grad = None
        self.trained = {}
        for name in self.changed_buffers(self.model):
            self.set_buffer(name, self.buffers[name])

    @torch.no_grad()
    def set_buffer(self, name: str, value: Tensor) -> None:
        """Give a buffer this value; one that cannot take it in place is replaced."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        now = module._buffers[leaf]
        assert now is not None
        if now.shape != value.shape or now.is_inference():
            module._buffers[leaf] = value.to(now).clone()
        else:
            now.copy_(value)

    def release(self) -> None:
        """Let those parameters be trained again that were before the adapter came."""
        for name, parameter in _parameters(self.model):
            if not parameter.is_inference():  # such a tensor can have no gradient
                parameter.requires_grad_(name in self.trainable)

    def identity(self) -> dict[str, Identity]:
        """What tells this base from others, by name of parameter or buffer; as they were before.

        O(M) time, about a second for a gigabyte, and no memory beyond a copy of one tensor that is
        not contiguous or not on the CPU.
        """
        before = self.trained | self.buffers
        now = dict(_parameters(self.model)) | dict(_buffers(self.model))
        found = {}
        for name, tensor in sorted(now.items()):
            if name in before:  # of the dtype that the model has been given since
                tensor = before[name].to(tensor.dtype)
            # Quantized tensors and the like have no numbers to look at in one way for all.
            plain = type(tensor.data) is Tensor
            digest = content_sha256({"": tensor.detach()}, {})[:_DIGITS] if plain else ""
            found[name] = str(tensor.dtype), tuple(tensor.shape), digest
        return found


#: Attributes that, at 0 or False, keep PyTorch's encoders from fused kernels.
_FUSED: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)


def _same(now: Tensor, before: Tensor) -> bool:
    """Whether a buffer is as it was, on whatever device and of whatever dtype it is now."""
    if now.shape != before.shape:
        return False
    before = before.to(now)
    if now.is_floating_point() and now.dtype.itemsize == 1:  # float8 cannot be compared
        return torch.equal(now.view(torch.uint8), before.view(torch.uint8))
    if now.is_floating_point() or now.is_complex():
        return bool(((now == before) | (now.isnan() & before.isnan())).all())
    return torch.equal(now, before)


def _own(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base, by name: all but the differences."""
    differences = {
        part
        for module in model.modules()
        if isinstance(module, Adapted)
        for part in module.difference.modules()
    }
    for name, module in model.named_modules():
        if module not in differences:
            yield name, module


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[Any] = set()
    for path, module in _own(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield join(path, name), parameter


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state_dict has."""
    for path, module in _own(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield join(path, name), buffer
