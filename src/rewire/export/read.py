"""`read`: networks of other programs as a state with sparse weights; `load` puts it in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewire import budget, topology
from rewire.export.lists.entries import Entries, State, entries_of, others_of, put, sparse_names
from rewire.formats import format_of
from rewire.nn.convert.counts import Patterns, chosen, connection_counts
from rewire.nn.convert.cut import dense_weights
from rewire.nn.convert.restore import load_state
from rewire.nn.weight.listing import sparse_weights
from rewire.storage.reading import FileError

__all__ = ["load", "read"]

_ORIGINAL, _MASK = "_orig", "_mask"
#: What a mask beside a weight may be called.
_MASKS = (_MASK, ".mask")
_STACKED = "in_proj_weight"
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def read(
    path: str | Path,
    format: str | None = None,
    *,
    masks: str | Path | Mapping[str, Tensor] | None = None,
    density: float | Mapping[str, float] | None = None,
    connections: int | Mapping[str, int] | None = None,
    threshold: float | None = None,
    distribution: str = "erk",
    only: Patterns | None = None,
    exclude: Patterns | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> State:
    """The state in a file, with sparse weights: what `rewire.load` and ``load_state_dict`` take.

    The weights that become sparse are

    - those that the file has as lists of connections (a run's ``model.safetensors``, npz, SciPy's
      files, Parquet, CSV);
    - ``NAME_orig`` with ``NAME_mask``, as `torch.nn.utils.prune` saves them: NAME gets the
      connections of the mask, also where a value is 0;
    - NAME with ``NAME_mask`` or ``NAME.mask``, or with an entry NAME of ``masks``;
    - with ``density``, ``connections`` or ``threshold``, all other tensors of at least two
      dimensions whose names end with ``weight`` (``weight_ih_l0`` and the like included) and fit
      ``only`` and ``exclude``: they keep their largest values. Exclude embeddings.

    ``in_proj_weight`` of `torch.nn.MultiheadAttention` is divided into the weights of query, key
    and value, as in `rewire.nn.SparseMultiheadAttention`. All else stays as it is.

    Args:
        path: the ending says what it is, see `rewire.formats.FORMATS`. Files of `torch.save` are
            read with ``weights_only=True``; nothing else in them is unpickled.
        format: the name of the format, where the ending does not say it.
        masks: a file of masks by the names of weights, or a dict of tensors; 0 drops.
        density, connections: the budget, as in `rewire.sparsify`, for weights that have no mask.
        threshold: keep the values of a larger magnitude; 0 keeps all that are not 0.
        distribution: spreads a single budget over the weights, see `rewire.budget`.
        only, exclude: glob patterns over the names of weights.
        shapes: of the dense weights by name, for files that do not have them (CSV).

    Raises OSError, ValueError for a file or a budget that does not fit, ImportError if a package is
    missing. O(K) memory for lists, else that of the file.
    """
    budgets = {"density": density, "connections": connections, "threshold": threshold}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of {' and '.join(given)}")
    state = _raw(path, format, shapes)
    masked = _masks_beside(state)
    for name, mask in _masks_given(masks).items():
        if name in masked:
            raise ValueError(f"{name} has two masks, one in {path}: leave it out of masks=")
        if name not in state:
            raise ValueError(f"the mask {name!r} is for no tensor of {path}")
        masked[name] = mask
    _divide(state, masked)
    for name, mask in masked.items():
        _prune(state, name, mask)
    if given:
        _by_magnitude(state, density, connections, threshold, distribution, only, exclude)
    elif only is not None or exclude is not None:
        raise ValueError("only= and exclude= are for density=, connections= and threshold=")
    if not sparse_names(state):
        raise ValueError(
            f"{path} has no sparse weight and no mask: say what to keep with density=, "
            "connections= or threshold="
        )
    return state


def load(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    strict: bool = True,
    **reading: Any,
) -> nn.Module:
    """Give ``model`` the weights in a file, and make its layers sparse where the file has sparse
    weights; returns the model.

    Args:
        model: the same network, its layers dense or sparse; if it is such a layer itself, use the
            module returned. Make the optimizer afterwards.
        source: a file, read by `rewire.export.read`, or a state with sparse weights.
        strict: refuse a state that lacks tensors of the model, or has others. Lists of edges have
            no biases: load them with strict=False, which keeps the model's.
        reading: arguments of `rewire.export.read`; the shapes are those of the model.

    Raises ValueError or RuntimeError where the state does not fit, and those of
    `rewire.export.read`. No dense array is made for a sparse weight.
    """
    if isinstance(source, Mapping):
        if reading:
            raise ValueError(f"{next(iter(reading))}= is for files: source is a state already")
        return load_state(model, source, strict=strict)
    found = format_of(source, reading.get("format"))
    if found.name in ("csv", "parquet") and "shapes" not in reading:
        reading["shapes"] = weight_shapes(model)
    state = read(source, **reading)
    return load_state(model, state, strict=strict)


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that are or can become sparse, by name."""
    found = {name: tuple(weight.shape) for name, weight in sparse_weights(model)}
    return found | {name: tuple(weight.shape) for name, *_, weight in dense_weights(model)}


def _raw(path: str | Path, format: str | None, shapes: Any) -> State:
    found = format_of(path, format)
    more = {"shapes": shapes} if shapes is not None else {}
    if more and found.name not in ("csv", "parquet"):
        raise ValueError(f"shapes= is for lists of edges, and {path} is {found.name}")
    try:
        state: State = found.reader()(Path(path), **more)
        entries_of(state)
    except topology.TopologyError as error:
        raise FileError(f"{path} is damaged: {error}") from None
    return state


def _masks_beside(state: State) -> dict[str, Tensor]:
    """Take the masks out of a state, and give what they mask its own name."""
    masks: dict[str, Tensor] = {}
    for key in list(state):
        ending = next((e for e in _MASKS if key.endswith(e) and len(key) > len(e)), None)
        name = key.removesuffix(ending or "")
        if ending is None or not {name, name + _ORIGINAL} & state.keys():
            continue
        masks[name] = state.pop(key)
        if name + _ORIGINAL in state:
            state[name] = state.pop(name + _ORIGINAL)
    return masks


def _masks_given(masks: str | Path | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if masks is None:
        return {}
    return dict(masks) if isinstance(masks, Mapping) else _raw(masks, None, None)


def _divide(state: State, masks: dict[str, Tensor]) -> None:
    """Put three weights in the place of each ``in_proj_weight``."""
    for tensors in (state, masks):
        for name in [n for n in tensors if n.rpartition(".")[2] == _STACKED]:
            stacked = tensors[name]
            if stacked.dim() == 2 and stacked.shape[0] == 3 * stacked.shape[1]:
                del tensors[name]
                for part, own in zip(stacked.chunk(3), _PROJECTIONS, strict=True):
                    tensors[name.removesuffix(_STACKED) + own] = part


def _prune(state: State, name: str, mask: Tensor) -> None:
    """Put the connections of a mask in the place of a tensor; masks of vectors are applied."""
    weight = state[name]
    if weight.shape != mask.shape or not weight.is_floating_point():
        raise ValueError(
            f"the mask of {name} is {tuple(mask.shape)}, for a tensor of {weight.dtype} "
            f"{tuple(weight.shape)}; needed is one number for each float"
        )
    if weight.dim() < 2:
        state[name] = torch.where(mask != 0, weight, torch.zeros_like(weight))
        return
    _keep(state, name, (mask != 0).reshape(-1).nonzero().flatten())


def _keep(state: State, name: str, kept: Tensor) -> None:
    """Put a sparse weight of the entries at these flat positions in the place of a tensor."""
    weight = state.pop(name)
    columns = weight.shape[1:].numel()
    values = weight.reshape(-1)[kept]
    put(state, name, Entries(tuple(weight.shape), kept // columns, kept % columns, values))


def _by_magnitude(
    state: State,
    density: float | Mapping[str, float] | None,
    connections: int | Mapping[str, int] | None,
    threshold: float | None,
    distribution: str,
    only: Patterns | None,
    exclude: Patterns | None,
) -> None:
    """Make the dense weights of a state sparse, by their largest values."""
    dense = {
        name: tensor
        for name, tensor in others_of(state).items()
        if tensor.dim() >= 2
        and tensor.is_floating_point()
        and tensor.numel()
        and "weight" in name.rpartition(".")[2]
        and chosen(name, only, exclude)
    }
    if not dense:
        raise ValueError(
            "no dense weight to choose from: needed are floats of two or more dimensions whose "
            "names end with weight, and that only= and exclude= leave"
        )
    if threshold is not None:
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, not {threshold}")
        for name, tensor in dense.items():
            _keep(state, name, (tensor.reshape(-1).abs() > threshold).nonzero().flatten())
        return
    if distribution not in budget.DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {', '.join(budget.DISTRIBUTIONS)}, not {distribution!r}"
        )
    every = {name: {"": tensor} for name, tensor in dense.items()}
    masks: dict[str, dict[str, Tensor]] = {name: {} for name in dense}
    counts = connection_counts(every, density, connections, distribution, masks)
    if not counts:
        raise ValueError(f"no pattern of the budget fits a weight: there are {', '.join(dense)}")
    for name, count in counts.items():
        order = torch.sort(-dense[name].reshape(-1).abs(), stable=True).indices
        _keep(state, name, order[: count[""]].sort().values)
