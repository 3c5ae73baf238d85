"""Moves what PyTorch and users attach to a layer to the layer's twin, or refuses it with a
reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rewire.nn.convert.kinds import KINDS, Kind, join, kind_of
from rewire.nn.layers import adapted
from rewire.nn.weight.pool import SparseWeight

__all__ = [
    "check_dense",
    "check_sparse",
    "disguised",
    "move",
    "parameter",
    "prune_masks",
    "settle",
    "source_of",
]

#: The attributes that hold a module's hooks. The twin gets the same objects, so that handles which
#: users hold stay valid.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

#: Older hooks that compute a weight before each forward pass, and the functions that remove them.
_NORMS: tuple[tuple[type, str], ...] = (
    (WeightNorm, "torch.nn.utils.remove_weight_norm"),
    (SpectralNorm, "torch.nn.utils.remove_spectral_norm"),
)

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# --- what cannot be converted ---------------------------------------------------------------------


def disguised(module: nn.Module) -> str | None:
    """Why a module that was made of one of `KINDS` is not one of them; None for any other
    module.
    """
    if isinstance(module, adapted.Adapted):
        return adapted.REASON
    bases = {kind.dense for kind in KINDS} | {kind.sparse for kind in KINDS}
    if parametrize.is_parametrized(module) and type(module).__bases__[0] in bases:
        return _parametrized(module)
    if type(module) is nn.MultiheadAttention and kind_of(module) is None:
        return (
            f"has a {type(module.out_proj).__name__} for its out_proj: put a plain layer there, or "
            "exclude the layer"
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.cls_to_become in bases:
        return (
            f"is a {type(module).__name__}, which has no weight yet: run the model once on a batch "
            "first"
        )
    if type(module).__module__.startswith("torch.ao.nn") and any(
        k.dense.__name__ in _names(module) for k in KINDS
    ):
        return (
            f"is a quantized {type(module).__name__}: make the model sparse before it is "
            "quantized, or exclude it"
        )
    return None


def _names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _parametrized(module: nn.Module) -> str:
    parametrizations: Any = module.parametrizations
    name, chain = next(iter(parametrizations.items()))
    kinds = " and ".join(type(p).__name__ for p in chain)
    return (
        f"has a parametrization of {name} ({kinds}), which would be lost: call "
        f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first, or exclude "
        "the layer"
    )


def check_dense(name: str, layer: nn.Module, kind: Kind) -> None:
    """Raise ValueError if the dense layer ``name`` has something that cannot move to its twin."""
    plain = kind.plain()
    for path, _ in plain.named_modules():
        own = layer.get_submodule(path)
        _check_module(join(name, path), own)
        for hook in own._forward_pre_hooks.values():
            for norm, remove in _NORMS:
                if isinstance(hook, norm):
                    raise ValueError(
                        f"{_title(join(name, path))} computes its "
                        f"{hook.name} "  # type: ignore[attr-defined]
                        f"by {norm.__name__}, which would be lost: call {remove}(layer) first, or "
                        "exclude the layer"
                    )
    for path, (module, attribute) in kind.places(layer).items():
        where = join(name, path)
        parameter = source_of(module, attribute)
        if parameter is None:
            raise ValueError(
                f"{where} is not a parameter but computed from others: remove what computes it "
                "first, or exclude the layer"
            )
        _check_parameter(where, f"{where}.values", parameter)
        if parameter.dtype not in _FLOATS:
            raise ValueError(
                f"{where} is {parameter.dtype}, and sparse weights are real: float32, float64 or "
                "16 bits"
            )
        if not parameter.numel():
            raise ValueError(
                f"{where} has the shape {tuple(parameter.shape)}, so there is nothing to connect: "
                "exclude the layer"
            )
        if parameter.device.type == "meta" and module._buffers.get(f"{attribute}_mask") is not None:
            raise ValueError(
                f"{where} is on the meta device, where its prune mask has no values: load the "
                "model first"
            )


def check_sparse(name: str, layer: nn.Module) -> None:
    """Raise ValueError if the sparse layer ``name`` has something that cannot move to its twin."""
    for path, own in layer.named_modules():
        where = join(name, path)
        if parametrize.is_parametrized(own):
            raise ValueError(f"{_title(where)} {_parametrized(own)}")
        if not isinstance(own, SparseWeight):
            _check_module(where, own)
            continue
        if not isinstance(own._parameters.get("values"), nn.Parameter):
            raise ValueError(
                f"{where}.values is not a parameter but computed from others "
                "(torch.nn.utils.prune?), which would be lost: call "
                "torch.nn.utils.prune.remove(pool, 'values') first"
            )
        _check_parameter(f"{where}.values", where, own.values)
        hooks = [kind for kind in _HOOKS if getattr(own, kind) and kind != "_is_full_backward_hook"]
        if hooks:
            raise ValueError(
                f"the pool {where} itself has hooks, which would be lost: remove them first"
            )


def _title(name: str) -> str:
    return name or "the model"


def _check_module(name: str, module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise ValueError(
            f"{_title(name)} has a forward of its own (one that was assigned), which belongs to "
            "the layer it was made for: take it off first, or exclude the layer"
        )
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise ValueError(
            f"{_title(name)} was compiled by its compile(): convert the model first and compile it "
            "then"
        )


def _check_parameter(name: str, new: str, parameter: Tensor) -> None:
    if type(parameter.data) is not Tensor:
        raise ValueError(
            f"{name} is a {type(parameter.data).__name__} (sharded, quantized or the like), not an "
            "ordinary tensor: convert the model before whatever wraps its weights"
        )
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"{name} has a hook on its gradient, and the gradient of {new} has another shape: "
            f"remove the hook, convert the model and register it on {new}"
        )


# --- prune masks ----------------------------------------------------------------------------------


def parameter(layer: nn.Module, kind: Kind, path: str) -> nn.Parameter:
    """The parameter of a weight of a dense layer that `check_dense` passed, by the name of the
    sparse weight.
    """
    found = source_of(*kind.places(layer)[path])
    assert found is not None
    return found


def source_of(module: nn.Module, attribute: str) -> nn.Parameter | None:
    """The parameter of a weight, which may be under a prune mask; None if it is computed
    otherwise.
    """
    own = module._parameters.get(attribute)
    if own is None and _pruning(module, attribute):
        own = module._parameters.get(f"{attribute}_orig")
    return own


def _pruning(module: nn.Module, attribute: str) -> list[int]:
    """The hooks with which `torch.nn.utils.prune` masks a parameter."""
    return [
        number
        for number, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == attribute
    ]


def prune_masks(layer: nn.Module, kind: Kind) -> dict[str, Tensor]:
    """The prune masks of a dense layer's weights, boolean and of the weights' shapes, by the names
    of the sparse weights.

    Raises ValueError for a mask with other entries than 0 and 1.
    """
    found = {}
    for path, (module, attribute) in kind.places(layer).items():
        mask = module._buffers.get(f"{attribute}_mask") if _pruning(module, attribute) else None
        if mask is None:
            continue
        if mask.device.type != "meta" and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"the prune mask of {path} has other entries than 0 and 1: it is not a topology"
            )
        found[path] = kind.part(layer, path, mask) != 0
    return found


# --- moving ---------------------------------------------------------------------------------------


def move(
    made: nn.Module, layer: nn.Module, plain: nn.Module, replaced: set[tuple[nn.Module, str]]
) -> None:
    """Give ``made`` what ``layer`` has besides its weights: biases, hooks, mode, and anything set
    on it.

    ``made`` gets the same objects, and ``layer`` stays as it is; see `settle`.

    Args:
        plain: a fresh layer of the type of ``layer``. What it does not have was added by somebody.
        replaced: the parameters of ``layer`` that became weights of ``made``, as (module, name).

    Raises ValueError if an addition has a name that the twin needs.
    """
    fresh = dict(plain.named_modules())
    made.train(layer.training)  # sparse weights as well
    for own, target in _pairs(layer, made):  # each part has its own mode
        target.training = own.training
    for own, target in list(_pairs(layer, made)):
        path = next(path for path, module in layer.named_modules() if module is own)
        if path in fresh and not isinstance(target, SparseWeight):
            gone = {attribute for module, attribute in replaced if module is own}
            _move_part(target, own, fresh[path], gone)


def _move_part(made: nn.Module, layer: nn.Module, plain: nn.Module, gone: set[str]) -> None:
    hidden = {f"{name}{end}" for name in gone for end in ("", "_orig", "_mask")}
    for name in [n for n in made._parameters if isinstance(layer.__dict__.get(n), Tensor)]:
        # A pruned bias: its parameter, of another name, and its mask follow below.
        del made._parameters[name]
    for name, parameter in layer._parameters.items():
        if name not in hidden and parameter is not None:
            if name not in made._parameters:
                _check_name(made, layer, name)
            # Not register_parameter: recurrent layers of torch.nn also keep a list.
            setattr(made, name, parameter)
    for name, buffer in layer._buffers.items():
        if name not in hidden:
            _check_name(made, layer, name)
            kept = name not in layer._non_persistent_buffers_set
            made.register_buffer(name, buffer, persistent=kept)
    for name, module in layer._modules.items():
        if name not in plain._modules and not isinstance(module, SparseWeight):
            _check_name(made, layer, name)
            made.add_module(name, module)
    for name, value in layer.__dict__.items():
        if name not in plain.__dict__ and name not in hidden:
            _check_name(made, layer, name)
            if isinstance(value, Tensor):
                setattr(made, name, value)
            else:  # also a module that is not part of the layer, such as its parent
                made.__dict__[name] = value
    for hooks in _HOOKS:
        setattr(made, hooks, getattr(layer, hooks))


def _check_name(made: nn.Module, layer: nn.Module, name: str) -> None:
    if hasattr(made, name):
        raise ValueError(
            f"a {type(layer).__name__} was given {name!r}, a name that {type(made).__name__} uses "
            "for itself: rename or delete it, or exclude the layer"
        )


def settle(made: nn.Module, layer: nn.Module, replaced: set[tuple[nn.Module, str]]) -> None:
    """The rest of `move`, for when nothing can fail any more: ``made`` takes the place of
    ``layer``.
    """
    for module, attribute in replaced:
        for number in _pruning(module, attribute):
            del module._forward_pre_hooks[number]
    for before, now in _pairs(layer, made):
        for hook in before._load_state_dict_pre_hooks.values():
            if getattr(hook, "with_module", False):  # it calls the module that it was registered on
                hook.module = weakref.ref(now)  # type: ignore[attr-defined]


def _pairs(layer: nn.Module, made: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    there = dict(made.named_modules())
    for path, module in layer.named_modules():
        if path in there:
            yield module, there[path]
