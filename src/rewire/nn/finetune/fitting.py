"""What can be adapted, what can stop being it, and whether a file fits a model; checked before
anything changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from rewire.nn.convert import attached
from rewire.nn.convert.kinds import KINDS, Kind, join, kind_of
from rewire.nn.finetune.base import Base
from rewire.nn.finetune.files import Saved
from rewire.nn.layers.adapted import ADAPTED, DIFFERENCE, Adapted, dense_class, difference_of
from rewire.nn.layers.base import SparseLayer
from rewire.nn.weight.pool import SparseWeight
from rewire.storage.reading import brief

__all__ = [
    "adaptable",
    "differences",
    "reason",
    "refuse_changed",
    "refuse_shared_weights",
    "refuse_training",
    "refuse_wrapped",
    "value_dtype",
]

_CLASSES = ", ".join(f"torch.nn.{dense.__name__}" for dense in ADAPTED)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError for a model within a wrapper that would not see the differences, or would
    give other names to layers.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which would not see the differences: "
            "adapt it before rewire.distributed.prepare(model) and the wrapping"
        )
    if any(isinstance(module, DataParallel) for module in model.modules()):
        raise ValueError("the model is wrapped in DataParallel: adapt the model inside")
    # By name: the class is in a module that takes seconds to import.
    if any(kind.__name__ == "OptimizedModule" for kind in type(model).__mro__):
        raise ValueError(
            "the model is what torch.compile gives (OptimizedModule): adapt the model inside, and "
            "compile it afterwards"
        )


def reason(module: nn.Module) -> str | None:
    """Why a layer with a weight cannot be adapted; None if it can, and for modules that are no
    layers.
    """
    what = attached.disguised(module)
    if what is not None or type(module) in ADAPTED:
        return what
    for kind in KINDS:
        if isinstance(module, kind.sparse):
            return "is sparse already, and differences are for dense layers: exclude it"
        if isinstance(module, kind.dense):
            name = type(module).__name__
            subclass = "" if type(module) is kind.dense else ", whose forward may differ"
            return f"is a {name}{subclass}: only {_CLASSES} can be adapted, so exclude it"
    return None


def adaptable(name: str, layer: nn.Module) -> Kind:
    """The kind of a layer that can be adapted. Raises ValueError for any other."""
    where = name or "the model"
    what = reason(layer)
    kind = kind_of(layer)
    if what is not None or kind is None or kind.dense not in ADAPTED:
        raise ValueError(f"{where} {what or f'is no layer of {_CLASSES}'}")
    attached.check_dense(name, layer, kind)
    if attached.prune_masks(layer, kind):
        raise ValueError(
            f"{where} has a prune mask, which a merge would undo: call "
            "torch.nn.utils.prune.remove(layer, 'weight') first, or exclude the layer"
        )
    if hasattr(layer, DIFFERENCE):
        raise ValueError(
            f"{where} was given {DIFFERENCE!r}, a name that adapted layers use: rename or delete "
            "it, or exclude the layer"
        )
    return kind


def value_dtype(weight: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the values beside ``weight``: ``wanted``, or float32 beside 16 bits, where small
    steps would be lost, and else that of the weight.

    Raises ValueError for one with which layers cannot compute.
    """
    narrow = weight.dtype.itemsize == 2
    if wanted is None:
        return torch.float32 if narrow else weight.dtype
    if wanted != weight.dtype and not (narrow and wanted == torch.float32):
        also = " or torch.float32" if narrow else ""
        raise ValueError(f"dtype must be that of the weights, {weight.dtype}{also}, not {wanted}")
    return wanted


def refuse_shared_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if the weight of one of these layers is a parameter of another module, or
    has memory in common with one or within itself.
    """
    all_parameters = [
        (module, join(path, name), parameter)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    advice = "give the layer a parameter of its own before it is adapted, or leave it unmerged"
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        title = join(name, "weight")
        if any(step == 0 and n > 1 for step, n in zip(weight.stride(), weight.shape, strict=True)):
            raise ValueError(
                f"{title} is expanded: several of its elements are one number, which would change "
                f"for all of them: {advice}"
            )
        for other, path, parameter in all_parameters:
            if parameter is weight:
                if other is not layer:
                    raise ValueError(f"{title} is {path} too, which would change along: {advice}")
            elif _overlap(weight, parameter):
                raise ValueError(
                    f"{title} has memory in common with {path}, which would change along: {advice}"
                )


def _overlap(weight: Tensor, other: Tensor) -> bool:
    """Whether two tensors may have memory in common: whether their ranges of addresses meet."""
    if is_lazy(other) or type(other.data) is not Tensor or other.device != weight.device:
        return False
    if other.layout != torch.strided or 0 in (weight.numel(), other.numel()):
        return False
    if weight.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    (begin, end), (start, stop) = _range(weight), _range(other)
    return begin < stop and start < end


def _range(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of what follows its last one."""
    last = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def refuse_changed(name: str, layer: nn.Module, difference: SparseLayer) -> None:
    """Raise ValueError if an adapted layer is no longer what `put_beside` has made of it."""
    where = name or "the model"
    if dense_class(layer) is None or layer.difference is not difference:
        raise ValueError(
            f"{where} is a {type(layer).__name__} now: take off what was put on the layer "
            "(parametrizations) since it was adapted"
        )
    if "forward" in layer.__dict__:
        raise ValueError(
            f"{where} has a forward of its own (one that was assigned), which would go on asking "
            "for the difference: take it off first"
        )


# --- files ----------------------------------------------------------------------------------------


def differences(base: Base, saved: Saved, where: str, check_base: bool) -> dict[str, SparseLayer]:
    """The differences of a file, for the layers of ``base`` and in their order. Raises ValueError
    where they, or what else the file has, do not fit; nothing has changed then.
    """
    if check_base:
        _check_base(base, saved, where)
    found: dict[str, SparseLayer] = {}
    seen: dict[nn.Module, str] = {}
    for name, state in saved.differences.items():
        try:
            layer = base.model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{where} has a difference for {brief(name)}, which the model does not have"
            ) from None
        if layer in seen:
            raise ValueError(f"{where} has two differences for {seen[layer]}")
        seen[layer] = name
        if not isinstance(layer, Adapted):  # an adapted one was looked at before
            adaptable(name, layer)
        found[name] = difference_of(
            layer, _weight(layer.get_parameter("weight"), name, state, where)
        )
    taken = {id(layer.weight): name for layer, name in seen.items()}
    parameters = base.named_parameters()
    for name, value in saved.parameters.items():
        _check_tensor(name, value, parameters.get(name), where)
        refuse_training(name, parameters[name], taken)
    for name, value in saved.buffers.items():
        _check_tensor(name, value, base.buffers.get(name), where)
    # The states of optimizers go by the order of parameters.
    order = [seen[layer] for layer in base.model.modules() if layer in seen]
    return {name: found[name] for name in order}


def refuse_training(name: str, parameter: Tensor, taken: Mapping[int, str]) -> None:
    """Raise ValueError if a parameter cannot be trained; ``taken``: layers with a difference, by
    the ``id`` of their weight.
    """
    if id(parameter) in taken:
        raise ValueError(
            f"{name} cannot be trained as a whole, because {taken[id(parameter)] or 'the model'} "
            "has a difference beside it: choose one of both"
        )
    if not parameter.is_floating_point():
        raise ValueError(f"{name} cannot be trained: it is {parameter.dtype}")
    if parameter.is_inference():
        raise ValueError(f"{name} cannot be trained: it was made under torch.inference_mode")


def _weight(dense: Tensor, name: str, state: Mapping[str, Tensor], where: str) -> SparseWeight:
    title = join(name, "weight")
    try:
        dtype = value_dtype(dense, state["values"].dtype)
    except KeyError:
        raise ValueError(f"{where} is damaged: {title} has no values") from None
    except ValueError:
        dtype = value_dtype(dense, None)
    generator = torch.Generator().manual_seed(0)  # its connection is replaced
    pool = SparseWeight(dense.shape, 1, generator=generator, device=dense.device, dtype=dtype)
    if "shape" not in state:
        raise ValueError(f"{where} is damaged: {title} has no shape")
    try:
        pool.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(f"the difference beside {title} in {where}: {brief(error)}") from None
    return pool


def _check_tensor(name: str, value: Tensor, own: Tensor | None, where: str) -> None:
    if own is None:
        raise ValueError(f"{where} has values for {brief(name)}, which the model does not have")
    if value.shape != own.shape or value.is_floating_point() != own.is_floating_point():
        raise ValueError(
            f"{name} is {own.dtype} {tuple(own.shape)}, and in {where} {value.dtype} "
            f"{tuple(value.shape)}"
        )


def _check_base(base: Base, saved: Saved, where: str) -> None:
    mine = base.identity()
    for name in (*mine, *saved.base):
        here, there = mine.get(name), saved.base.get(name)
        if here == there:
            continue
        if here is None or there is None:
            lacks = "the model" if here is None else "the base that it was trained beside"
            raise ValueError(f"{where} belongs to another base: {lacks} has no {brief(name)}")
        if here[:2] != there[:2]:
            words = [f"{dtype.removeprefix('torch.')} {shape}" for dtype, shape, _ in (here, there)]
            raise ValueError(
                f"{where} belongs to another base: {name} is {words[0]} here and "
                f"{brief(words[1])} there"
            )
        raise ValueError(
            f"{where} belongs to another base: {name} has other values here than there "
            "(check_base=False loads it all the same)"
        )
