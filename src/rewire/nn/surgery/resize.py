"""Changes the shape of parameters and buffers in place, with the state of their optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import LBFGS, Optimizer

from rewire.nn.structure import Part, announce
from rewire.nn.surgery.sides import refresh

__all__ = ["Keep", "check_state", "fit_shapes", "load_resized", "put", "select", "slice_state"]

#: By dimension that is cut: the entries that stay, int64, ascending.
Keep = Mapping[int, Tensor]


def select(tensor: Tensor, keep: Keep) -> Tensor:
    """A copy of what stays.

    Does not cut a dimension of length 1, which can stand for a whole one (Adafactor's factors).
    """
    for dim, index in keep.items():
        if tensor.shape[dim] != 1 or index.numel() != 1:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


@torch.no_grad()
def put(tensor: Tensor, data: Tensor, grad: Tensor | None = None) -> None:
    """Give ``tensor`` (a parameter or a buffer), which stays the same object, contents of any
    shape.

    Backward passes of earlier forward passes raise then, as after any in-place change.
    """
    tensor.grad = None
    # Autograd's accumulator remembers the shape while an old graph is alive; going by way of
    # another dtype renews it.
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data
    if grad is not None:
        tensor.grad = grad
    increment_version([tensor])


def _kept(tensor: Tensor, shape: torch.Size, keep: Keep) -> Keep | None:
    """How to cut a state tensor of a parameter of ``shape``: {} for not at all, None if unknown."""
    if tensor.dim() == 0 or (tensor.numel() == 1 and shape.numel() != 1):
        return {}
    if tensor.dim() != len(shape):
        return None
    if any(n not in (1, full) for n, full in zip(tensor.shape, shape, strict=True)):
        return None
    return {dim: index for dim, index in keep.items() if tensor.shape[dim] == shape[dim]}


def check_state(optimizer: Optimizer, name: str, parameter: Tensor, keep: Keep) -> None:
    """Raise ValueError if the optimizer has state of ``parameter`` that cannot be cut with it."""
    if isinstance(optimizer, LBFGS):
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor):
            known = _kept(value, parameter.shape, keep) is not None
        else:
            known = value is None or isinstance(value, bool | int | float | str)
        if not known:
            raise ValueError(
                f"{type(optimizer).__name__} keeps state {key!r} of {name} that has not one number "
                "per weight, so it cannot be cut with it: del optimizer.state[parameter] to start "
                "it afresh, or use another optimizer"
            )


def slice_state(optimizer: Optimizer, parameter: Tensor, shape: torch.Size, keep: Keep) -> None:
    """Cut the optimizer's state of ``parameter``, which had ``shape`` before; call `check_state`
    first.
    """
    state = optimizer.state.get(parameter)
    if not state or isinstance(optimizer, LBFGS):
        return
    for key, value in list(state.items()):
        if isinstance(value, Tensor):
            state[key] = select(value, _kept(value, shape, keep) or {})


def slice_lbfgs(optimizer: LBFGS, cuts: Mapping[Tensor, tuple[torch.Size, Keep]]) -> None:
    """Cut the history of LBFGS, which is flat vectors over all parameters, in their order."""
    optimizer._numel_cache = None
    kept, offset = [], 0
    for parameter in optimizer.param_groups[0]["params"]:
        shape, keep = cuts.get(parameter, (parameter.shape, {}))
        positions = torch.arange(shape.numel()).view(shape) + offset
        kept.append(select(positions, keep).flatten())
        offset += shape.numel()
    index = torch.cat(kept)
    for state in optimizer.state.values():
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim() == 1 and value.numel() == offset:
                state[key] = value[index.to(value.device)]
            elif isinstance(value, list):
                state[key] = [
                    v[index.to(v.device)]
                    if isinstance(v, Tensor) and v.dim() == 1 and v.numel() == offset
                    else v
                    for v in value
                ]


def apply_cuts(
    model: nn.Module,
    cuts: Mapping[str, Keep],
    modules: Iterable[nn.Module],
    optimizers: Iterable[Optimizer],
) -> None:
    """Cut named parameters and buffers of ``model``, with the state of optimizers."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    optimizers = list(optimizers)
    before: dict[Tensor, tuple[torch.Size, Keep]] = {}
    for name, keep in cuts.items():
        tensor = tensors[name]
        before[tensor] = tensor.shape, keep
        grad = None if tensor.grad is None else select(tensor.grad, keep)
        put(tensor, select(tensor.detach(), keep), grad)
    for optimizer in optimizers:
        for tensor, (shape, keep) in before.items():
            slice_state(optimizer, tensor, shape, keep)
        if isinstance(optimizer, LBFGS):
            slice_lbfgs(optimizer, before)
    for module in modules:
        refresh(module)
    for name, keep in cuts.items():
        announce(tensors[name], [Part(tensors[name], partial(select, keep=keep))])


def fit_shapes(model: nn.Module, shapes: Mapping[str, Iterable[int]]) -> list[Tensor]:
    """Give the named parameters and buffers these shapes, and return those that changed.

    This is for loading the state of a cut network into one that was not cut; load the values
    afterwards. What changes loses its values and its gradient. Raises ValueError, with nothing
    changed, for a name that the model does not have or another number of dimensions.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = {name: tuple(int(n) for n in shape) for name, shape in shapes.items()}
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"the shapes are those of another model: this one has no {name}")
        if tensors[name].dim() != len(shape):
            raise ValueError(
                f"{name} has {tensors[name].dim()} dimensions, the shape {shape} has {len(shape)}"
            )
    changed = []
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            put(tensors[name], tensors[name].detach().new_zeros(shape))
            changed.append(tensors[name])
    if changed:
        touched = {id(t) for t in changed}
        for module in model.modules():
            own = (*module._parameters.values(), *module._buffers.values())
            if any(id(t) in touched for t in own):
                refresh(module)
    for tensor in changed:
        announce(tensor, [Part(tensor)])
    return changed


def load_resized(model: nn.Module, state: Mapping[str, Any]) -> None:
    """``model.load_state_dict(state)`` for a state of the same network with fewer or more units.

    Parameters stay the same objects, so an optimizer made before still trains them; load its state
    afterwards. Raises ValueError for names that are not the model's.
    """
    own = model.state_dict()
    if set(own) != set(state):
        odd = sorted(set(own) ^ set(state))[0]
        raise ValueError(f"the state is that of another model: {odd} is in one of the two only")
    names = {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    tensors = {n: t for n, t in state.items() if n in names and isinstance(t, Tensor)}
    fit_shapes(model, {n: t.shape for n, t in tensors.items()})
    model.load_state_dict(state)
