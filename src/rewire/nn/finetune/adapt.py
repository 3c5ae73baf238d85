"""`adapt`: sparse differences beside the layers of a dense model, for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn.convert import attached
from rewire.nn.convert.counts import Patterns, chosen, connection_counts, matches
from rewire.nn.convert.kinds import join, kind_of
from rewire.nn.convert.replacing import layers_of
from rewire.nn.finetune import fitting
from rewire.nn.finetune.adapter import Adapter
from rewire.nn.finetune.base import Base
from rewire.nn.layers.adapted import ADAPTED, difference_of, refuse_adapted
from rewire.nn.layers.base import SparseLayer
from rewire.nn.weight.pool import SparseWeight

__all__ = ["adapt"]

Budget = int | float | Mapping[str, int] | Mapping[str, float] | None


def adapt(
    model: nn.Module,
    *,
    density: float | Mapping[str, float] | None = None,
    connections: int | Mapping[str, int] | None = None,
    distribution: str = "erk",
    only: Patterns | None = None,
    exclude: Patterns | None = None,
    train: Patterns = (),
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Adapter:
    """Freeze a dense model and put a sparse difference beside the weight of each chosen layer, for
    fine-tuning with O(K) trained numbers::

        adapter = rewire.adapt(model, density=0.01, only="*.attention.*")
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
        method = rewire.methods.RigL(model, optimizer, total_steps=1000)

    A layer then computes ``layer(x) + difference(x)``. The values of the difference are 0 at first,
    so outputs for finite inputs are what they were, to the bit (but for `torch.nn.Transformer`'s
    encoders in eval mode without gradients: they leave their fused kernels, which round otherwise
    and put zeros at padded positions). A method can rewire it: to drop by
    magnitude is to drop what has moved least from the base, and what grows starts at 0, at the
    base's own weight. This is the way of SpIEL (Ansell et al. 2024, arXiv 2401.16405) with
    `rewire.methods.RigL` or SET, and of SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) with a fixed
    random topology (`rewire.methods.Static`, or no method).

    Args:
        model: changed in place. Layers that can be adapted are `torch.nn.Linear`, `Conv1d`,
            `Conv2d` and `Conv3d` themselves, not subclasses. They stay the objects they are, with
            the same parameters under the same names, which may be shared with other layers.
        density, connections: the budget of all differences together, or a dict from glob pattern to
            the budget of each layer that it matches; see `rewire.sparsify`.
        distribution: spreads one budget over the layers, see `rewire.budget`. "erk" gives a linear
            layer connections in proportion to inputs + outputs, as low-rank adapters do.
        only, exclude: glob patterns over the names of layers, one or several.
        train: glob patterns over the names of parameters that are trained as a whole besides
            (``("*.bias", "head.*")``). Copies of them are kept.
        dtype: of the values; by default that of the weights, float32 where these have 16 bits.
        generator: draws the topologies; torch's default generator otherwise.

    All other parameters no longer require gradients. Make the optimizer afterwards, of
    ``adapter.parameters()`` or of all parameters that require gradients.

    Returns an `Adapter`, which saves, exchanges, merges and takes off the differences.

    Raises ValueError, and leaves the model unchanged, if nothing matches or the budget cannot be
    met; for a layer whose weight is computed (parametrizations, prune masks, weight norm),
    quantized, sharded or on the meta device, whose gradient has a hook or whose forward was
    assigned; for one of another class that ``only`` names; for a model that is adapted already,
    wrapped in DistributedDataParallel or DataParallel, or what torch.compile gives. O(K log K)
    time, O(K + rows + columns) memory: no weight is copied.
    """
    if (density is None) == (connections is None):
        raise ValueError("give exactly one of density= and connections=")
    refuse_adapted(model)
    fitting.refuse_wrapped(model)
    given: Budget = density if density is not None else connections
    layers = dict(_layers(model, given, only, exclude))
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
    counts = connection_counts(
        {name: {"weight": weight} for name, weight in weights.items()},
        density,
        connections,
        distribution,
        {name: {} for name in layers},
    )
    if not counts:
        raise ValueError(
            "no layer to adapt: only torch.nn.Linear, Conv1d, Conv2d and Conv3d can be adapted, "
            "and only=, exclude= or the patterns of the budget leave none of them (a layer with "
            "several names goes by its first, as named_modules() gives it)"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(f"{name} is on the meta device, without values: load the model first")
    trained = _trained(model, train, {id(weights[name]): name for name in counts})

    def difference(name: str) -> SparseLayer:
        weight = weights[name]
        pool = SparseWeight(
            weight.shape,
            counts[name]["weight"],
            generator=generator,
            device=weight.device,
            dtype=fitting.value_dtype(weight, dtype),
        )
        return difference_of(layers[name], pool)

    made = {name: difference(name) for name in counts}
    base = Base(model)
    base.freeze()
    base.train(trained)
    return Adapter(base, made)


def _layers(
    model: nn.Module, given: Budget, only: Patterns | None, exclude: Patterns | None
) -> Iterator[tuple[str, Any]]:
    """The layers to choose from. ValueError for one that was meant and cannot be adapted."""
    patterns = list(given) if isinstance(given, Mapping) else None
    whole = {name for name, _, kind in layers_of(model, kind_of) if kind.dense in ADAPTED}
    attention: list[str] = []  # which reads the weights of its layers itself
    for name, module in model.named_modules():
        possible = chosen(name, only, exclude) and not name.startswith(tuple(attention))
        if isinstance(module, nn.MultiheadAttention):
            attention.append(f"{name}." if name else "")
        meant = patterns is None or matches(name, patterns, join(name, "weight"))
        if possible and meant:
            # Without a pattern, layers of other classes just stay frozen.
            named = only is not None or patterns is not None
            what = fitting.reason(module) if named else attached.disguised(module)
            if what is not None:
                raise ValueError(f"{name or 'the model'} {what}")
        if possible and name in whole:
            if meant:
                fitting.adaptable(name, module)
            yield name, module


def _trained(model: nn.Module, patterns: Patterns, taken: Mapping[int, str]) -> list[str]:
    """The parameters to train as a whole; ``taken``: as of `fitting.refuse_training`."""
    several = [patterns] if isinstance(patterns, str) else list(patterns)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern in several:
        if not any(matches(name, pattern) for name in parameters):
            raise ValueError(f"pattern {pattern!r} of train= matches no parameter of the model")
    found = [name for name in parameters if matches(name, several)]
    for name in found:
        fitting.refuse_training(name, parameters[name], taken)
    return found
