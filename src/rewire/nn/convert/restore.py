"""A state with sparse weights put into a model whose layers may still be dense."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rewire.nn.convert.cut import dense_weights
from rewire.nn.convert.sparsify import sparsify
from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight

__all__ = ["load_state"]


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True, resize: bool = False
) -> nn.Module:
    """Load a state after making those layers sparse whose weights are sparse in it; returns the
    model.

    Args:
        strict: as in ``load_state_dict``.
        resize: replace a sparse weight by one of another shape, because its layer lost units before
            it was cut; else another shape is refused.

    Raises ValueError, before anything changes, for a layer of which only some weights are sparse in
    the state and for another shape; ValueError and RuntimeError as `rewire.sparsify` and
    ``load_state_dict`` do.
    """
    shapes = {
        name: tuple(int(n) for n in state[f"{name}.shape"].flatten().tolist())
        for name in (key.removesuffix(".rows") for key in state if key.endswith(".rows"))
        if f"{name}.shape" in state
    }
    dense = {name: (layer, weight) for name, layer, _, weight in dense_weights(model)}
    sparse = [name for name in dense if f"{name}.rows" in state]
    layers = {dense[name][0] for name in sparse}
    partly = [n for n, (layer, _) in dense.items() if layer in layers and n not in sparse]
    if partly:
        raise ValueError(
            f"{partly[0]} is dense in the state and another weight of its layer is sparse: a layer "
            "is sparse as a whole"
        )
    pools = dict(sparse_weights(model))
    for name, found in shapes.items() if not resize else ():
        own = (
            pools[name].shape if name in pools else dense[name][1].shape if name in dense else None
        )
        if own is not None and tuple(own) != found:
            raise ValueError(f"{name} has the shape {tuple(own)}, and in the state {found}")
    if sparse:
        generator = torch.Generator().manual_seed(0)
        model = sparsify(model, connections=dict.fromkeys(sparse, 1), generator=generator)
    for name, pool in list(sparse_weights(model)):
        if shapes.get(name, tuple(pool.shape)) != tuple(pool.shape):
            _resize(model, name, state, shapes[name])
    model.load_state_dict(dict(state), strict=strict)
    return model


def _resize(
    model: nn.Module, name: str, state: Mapping[str, Tensor], shape: tuple[int, ...]
) -> None:
    """Put a pool of another shape in the place of one."""
    parent, _, leaf = name.rpartition(".")
    layer = model.get_submodule(parent)
    rows, cols = state[f"{name}.rows"], state[f"{name}.cols"]
    active = rows >= 0
    made = SparseWeight.from_coo(
        torch.Size(shape), rows[active].long(), cols[active].long(), state[f"{name}.values"][active]
    )
    setattr(layer, leaf, made)
