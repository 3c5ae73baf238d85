"""Make the layers of a model sparse, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewire.budget import Limits
from rewire.nn.convert import attached
from rewire.nn.convert.counts import Patterns, chosen, connection_counts, kept_by, matches
from rewire.nn.convert.kinds import KINDS, join, kind_of
from rewire.nn.convert.replacing import layers_of, refuse_shared, swap
from rewire.nn.layers.initial import Init, check_init
from rewire.nn.weight.pool import SparseWeight
from rewire.topology import limits as limited

__all__ = ["sparsify"]


def sparsify(
    model: nn.Module,
    *,
    density: float | Mapping[str, float] | None = None,
    connections: int | Mapping[str, int] | None = None,
    distribution: str = "erk",
    only: Patterns | None = None,
    exclude: Patterns | None = None,
    select: Literal["random", "magnitude"] = "random",
    limits: Limits | Mapping[str, Limits] | None = None,
    generator: torch.Generator | None = None,
    init: Init = "auto",
) -> nn.Module:
    """Replace dense layers by sparse ones within a budget, in place; returns the model.

    Args:
        density: the share of the chosen layers' potential connections, spread by ``distribution``;
            or a dict from glob pattern to the density of each layer (``"encoder.lstm"``) or single
            weight (``"encoder.lstm.weight_hh_l0"``) that it matches. The first match counts, and
            layers without one stay dense. If a pattern matches the name of a layer with several
            weights, ``distribution`` spreads the layer's budget over them.
        connections: the same as a number of connections.
        distribution: a name in `rewire.budget.DISTRIBUTIONS` ("erk", "er", "uniform").
        only, exclude: glob patterns over layer names (``"encoder.*"``), one or several.
        select: "random" draws a random topology with fresh values, for training from scratch;
            "magnitude" keeps the largest weights and their values, for a trained model. Biases are
            kept in both.
        limits: on fan-in, fan-out and blocks of each weight (`rewire.budget.Limits`), or a dict
            from glob pattern to the limits of the layers or weights that it matches. For
            select="random" only.
        generator: for the random draws.
        init: how large fresh values are: "auto" gives outputs the variance that they have in the
            dense layer, "dense" draws as the dense layer does, "sparse" depends on the mean fan-in;
            see `rewire.nn.layers.initial.draw_values`. For select="random" only.

    Layers converted are `torch.nn.Linear`, `Conv1d`, `Conv2d`, `Conv3d`, `RNN`, `LSTM`, `GRU` and
    `MultiheadAttention` themselves, not subclasses, whose forward may differ. Make the optimizer
    afterwards, because the old parameters are gone. Biases (the same parameters), hooks, mode and
    anything else set on a layer stay with it. Transformer encoders stop using nested tensors, which
    need fused kernels for dense weights.

    A weight with a mask of `torch.nn.utils.prune` takes its topology from the mask and its values
    from the masked weight, whatever ``select`` is, and is not pruned any more. Without ``density``
    and ``connections``, only layers with such masks are converted; their other weights keep all
    connections. A budget given beside masks must agree with them: other layers share what the masks
    leave of it. To choose anew, make the masks permanent first (`torch.nn.utils.prune.remove`).

    Raises ValueError, and leaves the model unchanged, if nothing matches, if the budget cannot be
    met, if a parameter to be replaced is shared with another layer, and for a layer whose weight is
    computed (parametrizations, weight norm, spectral norm), whose gradient has a hook, or whose
    forward was assigned.
    """
    if density is not None and connections is not None:
        raise ValueError("give exactly one of density= and connections=")
    if select not in ("random", "magnitude"):
        raise ValueError(f"select must be 'random' or 'magnitude', not {select!r}")
    if limits is not None and select != "random":
        raise ValueError("limits= are for select='random': the largest weights need not fit them")
    check_init(init)
    if init != "auto" and select != "random":
        raise ValueError(
            f"init={init!r} is for select='random': the largest weights keep their values"
        )
    found = {
        name: (module, kind)
        for name, module, kind in layers_of(model, kind_of)
        if chosen(name, only, exclude)
    }
    _refuse_disguised(model, only, exclude, density if density is not None else connections)
    masks = {name: attached.prune_masks(module, kind) for name, (module, kind) in found.items()}
    if density is None and connections is None:
        found = {name: layer for name, layer in found.items() if masks[name]}
        if not found:
            raise ValueError(
                "give exactly one of density= and connections=: no layer has a prune mask to take "
                "instead"
            )
    weights = {name: kind.weights(module) for name, (module, kind) in found.items()}
    for name, path, weight in ((n, p, w) for n, parts in weights.items() for p, w in parts.items()):
        if not weight.numel():
            raise ValueError(
                f"{join(name, path)} has the shape {tuple(weight.shape)}, with nothing to connect: "
                "exclude it"
            )
    if density is None and connections is None:
        counts = {
            name: {p: kept_by(masks[name].get(p), w) for p, w in parts.items()}
            for name, parts in weights.items()
        }
    else:
        counts = connection_counts(weights, density, connections, distribution, masks)
    if not counts:
        kinds = ", ".join(kind.dense.__name__ for kind in KINDS)
        raise ValueError(
            f"no layer to convert: sparsify converts layers of torch.nn ({kinds}), and only=, "
            "exclude= or the patterns of the budget leave none of them"
        )
    refuse_shared(model, {name: found[name][0] for name in counts})
    for name in counts:
        attached.check_dense(name, *found[name])
        meta = next((p for p, w in weights[name].items() if w.device.type == "meta"), None)
        if meta is not None and select == "magnitude":
            raise ValueError(
                f"{join(name, meta)} is on the meta device, where no value is the largest: load it "
                "first"
            )
    if isinstance(limits, Mapping):
        names = [join(layer, path) for layer in counts for path in weights[layer]]
        for pattern in limits:
            if not any(matches(name, pattern) for name in (*counts, *names)):
                raise ValueError(
                    f"pattern {pattern!r} of limits= matches no layer; there are "
                    f"{', '.join(counts)}"
                )

    def sparse(name: str) -> nn.Module:
        layer, kind = found[name]
        made = kind.to_sparse(
            layer, {path: max(count, 1) for path, count in counts[name].items()}, generator
        )
        drawn = [path for path in weights[name] if path not in masks[name]]
        _restrict(made, name, drawn, limits, generator, pruned=False)
        # Values were drawn with the default, and limits may have changed the connections of rows.
        if init != "auto" or limits is not None:
            redrawn: Any = made
            redrawn.reset_weights(generator, init=init)
        for path, dense in weights[name].items():
            parent, _, leaf = path.rpartition(".")
            pool = None
            if path in masks[name]:
                whole = attached.parameter(layer, kind, path)
                pool = _masked(kind.part(layer, path, whole), masks[name][path])
            elif select == "magnitude" or density is connections is None:
                pool = SparseWeight.from_dense(dense, connections=counts[name][path])
            if pool is not None:
                setattr(made.get_submodule(parent), leaf, pool)
        _restrict(made, name, masks[name], limits, generator, pruned=True)
        for path in weights[name]:
            trained = attached.parameter(layer, kind, path).requires_grad
            made.get_parameter(f"{path}.values").requires_grad_(trained)
        attached.move(made, layer, kind.plain(), places[name])
        return made

    places = {name: set(found[name][1].places(found[name][0]).values()) for name in counts}
    return swap(model, counts, sparse, places)


def _restrict(
    made: nn.Module,
    layer: str,
    paths: Iterable[str],
    limits: Limits | Mapping[str, Limits] | None,
    generator: torch.Generator | None,
    *,
    pruned: bool,
) -> None:
    """Give the weights of a new layer their limits; those that prune masks fixed must keep them."""
    for path in paths:
        both = layer, join(layer, path)
        own = limits
        if isinstance(limits, Mapping):
            matching = (w for p, w in limits.items() if any(fnmatchcase(name, p) for name in both))
            own = next(matching, None)
        pool = made.get_submodule(path)
        if isinstance(own, Limits) and isinstance(pool, SparseWeight):
            broken = pruned and limited.violation(pool.index, *pool.matrix_shape, own)
            if broken:
                raise ValueError(f"the prune mask of {both[1]} does not keep the limits: {broken}")
            try:
                pool.restrict(own, generator)
            except ValueError as error:
                raise ValueError(f"{both[1]}: {error}") from None


def _refuse_disguised(
    model: nn.Module, only: Patterns | None, exclude: Patterns | None, given: Any
) -> None:
    """Raise ValueError for a layer that the patterns choose, but that has become of another
    type.
    """
    for name, module in model.named_modules() if given is not None else ():
        what = attached.disguised(module)
        meant = what is not None and chosen(name, only, exclude)
        if isinstance(given, Mapping):
            meant = meant and matches(name, list(given), join(name, "weight"))
        if meant:
            raise ValueError(f"{name or 'the model'} {what}")


def _masked(weight: Tensor, mask: Tensor) -> SparseWeight:
    """A sparse weight of the entries where ``mask`` is true; of one empty slot if there is none."""
    kept = mask.reshape(-1).nonzero().flatten()
    columns = weight.shape[1:].numel()
    values = weight.detach().reshape(-1)[kept]
    return SparseWeight.from_coo(
        weight.shape, kept // columns, kept % columns, values, capacity=max(kept.numel(), 1)
    )
