"""`Adapter`: the differences beside the layers of one model, and what can be done with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewire.nn.convert.densify import refuse_rewired
from rewire.nn.convert.kinds import join
from rewire.nn.finetune import files, fitting
from rewire.nn.finetune.base import Base
from rewire.nn.layers.adapted import (
    ADAPTED,
    DIFFERENCE,
    Adapted,
    put_beside,
    refuse_adapted,
    take_off,
)
from rewire.nn.layers.base import SparseLayer
from rewire.nn.weight.pool import SparseWeight

__all__ = ["Adapter", "load_adapter"]


class _Written(NamedTuple):
    """What a merge has put into a weight: where, what was there, and what is there now."""

    places: tuple[Tensor, ...]
    before: Tensor
    now: Tensor


class Adapter:
    """Sparse differences beside the frozen layers of a dense model, which is their base.

    `rewire.adapt` and `rewire.load_adapter` make adapters. Train `parameters` with any optimizer,
    and give model and optimizer to a method to have the differences rewired.

    Attributes:
        model: the model; its layers have the differences from the beginning until `merge` or
            `detach`.
    """

    def __init__(self, base: Base, differences: Mapping[str, SparseLayer]) -> None:
        self.model = base.model
        self._base = base
        self._differences = dict(differences)
        self._merged: dict[str, _Written] = {}
        self._state = "beside"
        self._put()

    def __repr__(self) -> str:
        dense = sum(pool.size for pool in self.differences.values())
        trained = len(self._base.trained)
        return (
            f"Adapter({len(self._differences)} layers, {self.connections:,} connections beside "
            f"{dense:,} weights, {trained} parameters of the base trained, {self._state})"
        )

    # --- what there is ----------------------------------------------------------------------------

    @property
    def differences(self) -> dict[str, SparseWeight]:
        """The sparse weights beside those of the layers, by the name of the layer."""
        return {name: layer.weight for name, layer in self._differences.items()}

    @property
    def connections(self) -> int:
        """Connections of all differences."""
        return sum(pool.connections for pool in self.differences.values())

    @property
    def state(self) -> str:
        """Where the differences are: "beside" the layers, "merged" into them, or "detached"."""
        return self._state

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: the values of the differences, and the parameters that ``train=`` has
        named.
        """
        yield from (pool.values for pool in self.differences.values())
        yield from self._base.parameters()

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | Path, model: nn.Module | None = None) -> None:
        """Write differences, trained parameters, and buffers that training has changed (running
        statistics) to a safetensors file, atomically.

        The file has O(K) bytes besides what ``train=`` has named, and a checksum of every tensor of
        the base, for which the base is read once: about a second for a gigabyte.

        Args:
            model: a copy of the model whose values are saved instead, such as an average
                (`rewire.ema`); of this one by default.

        Raises OSError, RuntimeError once merged or detached, ValueError for a model that is no
        copy, and if another parameter of the base requires a gradient.
        """
        self._check("beside")
        self._base.refuse_others()
        source = self.model if model is None else model
        differences: dict[str, dict[str, Tensor]] = {}
        for name, own in self.differences.items():
            try:
                layer: nn.Module | None = _module(source, name)
            except AttributeError:
                layer = None
            fits = isinstance(layer, Adapted) and (
                (layer.difference.weight.shape, layer.difference.weight.connections)
                == (own.shape, own.connections)
            )
            if not isinstance(layer, Adapted) or not fits:
                what = "has another difference" if isinstance(layer, Adapted) else "is not adapted"
                raise ValueError(
                    f"{name or 'the model'} {what} in the model given: "
                    "give a copy of the adapter's model, such as copy.deepcopy makes"
                )
            differences[name] = dict(layer.difference.weight.state_dict())
        parameters = {n: source.get_parameter(n).detach() for n in self._base.trained}
        buffers = self._base.changed_buffers(source)
        saved = files.Saved(differences, parameters, buffers, self._base.identity())
        files.write(Path(path), saved)

    def load(self, path: str | Path, *, check_base: bool = True) -> None:
        """Put the adapter in a file, which `save` wrote beside the same base, in the place of this
        one.

        Arguments and errors as for `rewire.load_adapter`; also ValueError while a method rewires
        the differences. On an error nothing changes. O(K) memory.

        The parameters are new ones: make the optimizer again, of `parameters`. One that was made
        before goes on with those of the adapter that left, to no effect.
        """
        self._check("beside")
        self._refuse_leaving("loading another adapter")
        saved = files.read(Path(path))
        new = fitting.differences(self._base, saved, str(path), check_base)
        self._base.reset()
        self._take()
        self._differences = new
        self._fill(saved)
        self._put()

    @torch.no_grad()
    def _fill(self, saved: files.Saved) -> None:
        self._base.train(saved.parameters)
        for name, value in saved.parameters.items():
            self.model.get_parameter(name).copy_(value)
        for name, value in saved.buffers.items():
            self._base.set_buffer(name, value)

    # --- merging and taking off -------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the differences to the weights and take them off: a plain dense model, of the classes
        that it had, with the same parameter objects. Returns it.

        Sums are rounded to the dtype of the weights, so outputs differ from those before by
        rounding. `unmerge` takes it back, exactly: what was at K positions is kept, O(K) memory.

        Raises ValueError, and changes nothing, while a method rewires the differences, and where a
        weight is shared with another layer, which would change along.
        """
        self._check("beside")
        self._refuse_leaving("merge()")
        fitting.refuse_shared_weights(self.model, self._differences)
        made = {name: self._sum(name, pool) for name, pool in self.differences.items()}
        done: list[str] = []
        try:
            for name, written in made.items():
                self._weight(name)[written.places] = written.now
                done.append(name)
        except BaseException:
            for name in done:
                self._weight(name)[made[name].places] = made[name].before
            raise
        self._take()
        self._merged = made
        self._base.release()
        self._state = "merged"
        return self.model

    @torch.no_grad()
    def unmerge(self) -> nn.Module:
        """Take `merge` back: the weights are to the bit what they were, and the differences beside
        them. Returns the model.

        Raises ValueError, and changes nothing, if merged weights have changed at one of the K
        positions since. Changes elsewhere are not noticed, and stay.
        """
        self._check("merged")
        for name, written in self._merged.items():
            if not self._as_merged(name, written):
                raise ValueError(
                    f"{name or 'the model'} has changed since the merge, so what it was before is "
                    "not known"
                )
        for name, written in self._merged.items():
            self._weight(name)[written.places] = written.before
        self._merged.clear()
        self._base.freeze()
        self._put()
        self._state = "beside"
        return self.model

    def detach(self) -> nn.Module:
        """Take the differences off (after `unmerge`, if they are merged) and give back the model as
        it was, to the bit: weights, buffers, and parameters that were trained. Returns it.

        The adapter is of no use afterwards. Raises ValueError as `merge` and `unmerge` do.
        """
        if self._state == "merged":
            self.unmerge()
        self._check("beside")
        self._refuse_leaving("detach()")
        self._base.reset()
        self._take()
        self._base.release()
        self._state = "detached"
        return self.model

    # ----------------------------------------------------------------------------------------------

    def _put(self) -> None:
        for name, difference in self._differences.items():
            put_beside(_module(self.model, name), difference)
        self._base.unfuse(adapted=True)

    def _take(self) -> None:
        for name in self._differences:
            take_off(_module(self.model, name))
        self._base.unfuse(adapted=False)

    def _sum(self, name: str, pool: SparseWeight) -> _Written:
        """What a merge writes into the weight of a layer."""
        weight = self._weight(name)
        rows, cols, values = pool.coo()
        places = torch.unravel_index(rows * pool.matrix_shape[1] + cols, weight.shape)
        before = weight[places]
        wide = torch.promote_types(before.dtype, values.dtype)
        return _Written(places, before, (before.to(wide) + values.to(wide)).to(before.dtype))

    def _as_merged(self, name: str, written: _Written) -> bool:
        """Whether a layer is as `merge` has left it."""
        weight, now = self._weight(name), written.now
        same = (weight.dtype, weight.device) == (now.dtype, now.device)
        dense = type(_module(self.model, name)) in ADAPTED
        return dense and same and torch.equal(weight[written.places], now)

    def _weight(self, name: str) -> Tensor:
        return self.model.get_parameter(join(name, "weight"))

    def _check(self, state: str) -> None:
        if self._state != state:
            wanted = {"beside": "call unmerge() first", "merged": "call merge() first"}[state]
            raise RuntimeError(
                f"the adapter is {self._state}"
                + ("" if self._state == "detached" else f": {wanted}")
            )

    def _refuse_leaving(self, call: str) -> None:
        """Raise ValueError if a difference cannot leave its layer."""
        prefix = f"{DIFFERENCE}.weight"
        refuse_rewired({join(n, prefix): pool for n, pool in self.differences.items()}, call)
        for name, difference in self._differences.items():
            fitting.refuse_changed(name, _module(self.model, name), difference)


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def load_adapter(model: nn.Module, path: str | Path, *, check_base: bool = True) -> Adapter:
    """Put the adapter in a file beside the layers of ``model``, its base.

    Args:
        model: the dense model that the adapter was trained beside, with the same values.
            `Adapter.load` exchanges the adapter of a model that has one.
        path: a file that `Adapter.save` wrote.
        check_base: refuse a model with other values or dtypes than the base had, by checksums (for
            which the model is read once, about a second for a gigabyte). False checks names and
            shapes of what the file changes only, for a base in another precision, say.

    Returns an adapter that can be trained on. Raises OSError if there is no such file; ValueError
    for one that is of another kind, damaged or changed, or belongs to another base, and as
    `rewire.adapt` for layers that cannot be adapted. Then nothing has changed. O(K) memory.
    """
    refuse_adapted(model)
    fitting.refuse_wrapped(model)
    saved = files.read(Path(path))
    base = Base(model)
    differences = fitting.differences(base, saved, str(path), check_base)
    base.freeze()
    adapter = Adapter(base, differences)
    adapter._fill(saved)
    return adapter
