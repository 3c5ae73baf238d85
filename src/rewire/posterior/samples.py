"""Samples of a model's weights and topology, and predictions averaged over them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewire.nn import SparseWeight, sparse_weights
from rewire.posterior.scores import entropy
from rewire.storage import reading
from rewire.storage import tensors as tensor_file

__all__ = ["Inclusion", "Posterior", "Prediction"]

#: From what the model returns to what is averaged.
Link = Callable[[Tensor], Tensor]


def _softmax(outputs: Tensor) -> Tensor:
    return torch.softmax(outputs, dim=-1)


@dataclass(frozen=True)
class Prediction:
    """The prediction of all samples together.

    mean, std: over samples, of the model's outputs after the link (probabilities); in their shape.
    expected_entropy: mean over samples of the entropy of each; in the outputs' shape without the
        last dimension.
    count: the number of samples.
    """

    mean: Tensor
    std: Tensor
    expected_entropy: Tensor
    count: int

    @property
    def entropy(self) -> Tensor:
        """Entropy of the averaged prediction, in nats: the whole uncertainty."""
        return entropy(self.mean)

    @property
    def mutual_information(self) -> Tensor:
        """The part of `entropy` from the disagreement between samples about the network, in
        nats.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)


class Inclusion(NamedTuple):
    """The connections of one weight that any sample has, sorted by (row, col).

    rows, cols: int64.
    probability: share of the samples that have the connection.
    mean, std: of its value in these samples.
    """

    rows: Tensor
    cols: Tensor
    probability: Tensor
    mean: Tensor
    std: Tensor


# --- the samples ----------------------------------------------------------------------------------


class Posterior:
    """Samples of a model's weights and topology, taken while it trains.

    A sample is the model's ``state_dict``, on the CPU, with the K connections of each sparse weight
    only. The model itself does not change: predictions run on a copy.

    Args:
        model: with at least one sparse weight.
        burn_in: calls of `update` (optimizer steps) before the first sample.
        every: calls between samples.
        limit: the most samples to keep, at least 2; None for no limit. When there are more, every
            second sample is dropped and ``every`` doubles, so that the samples stay evenly spread.

    Raises ValueError for a model without sparse weights or numbers out of range.

    Cost: O(parameters) memory per sample, nothing per step in between.
    """

    def __init__(
        self, model: nn.Module, *, burn_in: int = 0, every: int = 1, limit: int | None = None
    ) -> None:
        whole = [("burn_in", burn_in, 0), ("every", every, 1)]
        whole += [] if limit is None else [("limit", limit, 2)]
        for name, number, low in whole:
            if isinstance(number, bool) or not isinstance(number, int) or number < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, not {number!r}")
        if not any(True for _ in sparse_weights(model)):
            raise ValueError(
                "the model has no sparse weights: build it of rewire.nn layers or call "
                "rewire.sparsify first"
            )
        self.model = model
        self.burn_in, self.every, self.limit = burn_in, every, limit
        self.steps = 0
        self.samples: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __bool__(self) -> bool:
        return True  # even without samples yet: ``if posterior`` is like ``is not None``

    def update(self) -> bool:
        """Count one step, and take a sample if it is time; returns whether it did.

        Call it after the method's step.
        """
        self.steps += 1
        past = self.steps - self.burn_in
        if past <= 0 or past % self.every:
            return False
        self.collect()
        return True

    @torch.no_grad()
    def collect(self) -> None:
        """Take a sample of the model as it is now."""
        pools = _pools(self.model)
        inside = tuple(f"{name}." if name else "" for name in pools)
        sample = {
            key: value.detach().to("cpu", copy=True)
            for key, value in self.model.state_dict().items()
            if not any(key == prefix + part for prefix in inside for part in _PARTS)
        }
        for name, weight in pools.items():
            prefix = f"{name}." if name else ""
            rows, cols, values = weight.coo()
            kind = weight.rows.dtype
            parts = zip(_PARTS, (values, rows.to(kind), cols.to(kind)), strict=True)
            for part, tensor in parts:
                sample[prefix + part] = tensor.detach().to("cpu", copy=True)
        self.samples.append(sample)
        if self.limit is not None and len(self.samples) > self.limit:
            self.samples = self.samples[1::2]
            self.every *= 2

    # --- predicting -------------------------------------------------------------------------------

    def networks(self) -> Iterator[nn.Module]:
        """Each sample as a model in eval mode.

        It is the same object each time, with the values of one sample after the other.
        """
        self._check_any()
        network = copy.deepcopy(self.model).eval()
        for sample in self.samples:
            network.load_state_dict(sample)
            yield network

    @torch.no_grad()
    def predict(self, x: Tensor | Iterable[Tensor], *, link: Link = _softmax) -> Prediction:
        """Predict with the average over the samples.

        Args:
            x: one batch of inputs, or several in a list (or another iterable that can be iterated
                once per sample), whose predictions are joined.
            link: from the model's output to what is averaged; by default softmax over the last
                dimension. For regression give ``lambda y: y`` (the entropies then mean nothing).

        Memory: four times one prediction, for any number of samples. Raises ValueError without
        samples.
        """
        mean = square = own = torch.empty(0)
        for n, network in enumerate(self.networks(), start=1):
            batches = [x] if isinstance(x, Tensor) else x
            out = torch.cat([link(network(batch)) for batch in batches]).double()
            certain = entropy(out)
            if n == 1:
                mean, square, own = out, torch.zeros_like(out), certain
                continue
            before = out - mean  # Welford's algorithm, exact for a small spread and a large mean
            mean = mean + before / n
            square = square + before * (out - mean)
            own = own + (certain - own) / n
        std = (square / max(len(self.samples) - 1, 1)).clamp(min=0).sqrt()
        return Prediction(mean, std, own, len(self.samples))

    # --- what the samples have in common ----------------------------------------------------------

    def inclusion(self, name: str | None = None) -> Inclusion:
        """The connections of the weight ``name`` (by default the model's first) that any sample
        has, and how often.
        """
        rows, cols, values, (_, width) = self._stacked(name)
        key, at = torch.unique(rows * width + cols, return_inverse=True)
        zero = torch.zeros(key.numel(), dtype=torch.float64)
        count = zero.index_add(0, at, torch.ones_like(values))
        mean = zero.index_add(0, at, values) / count
        spread = zero.index_add(0, at, (values - mean[at]).square()) / (count - 1).clamp(min=1)
        return Inclusion(key // width, key % width, count / len(self.samples), mean, spread.sqrt())

    def inputs(self, name: str | None = None) -> Tensor:
        """Share of the samples in which each column (input) of the weight has connections;
        float64.
        """
        return self._share(name, 1)

    def outputs(self, name: str | None = None) -> Tensor:
        """Share of the samples in which each row (output) of the weight has connections;
        float64.
        """
        return self._share(name, 0)

    def _share(self, name: str | None, axis: int) -> Tensor:
        key, size = self._name(name), self._weights()[self._name(name)].matrix_shape[axis]
        found = torch.zeros(size, dtype=torch.float64)
        for sample in self.samples:
            found[sample[_key(key, ("rows", "cols")[axis])].long().unique()] += 1
        return found / len(self.samples)

    def _stacked(self, name: str | None) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        key = self._name(name)
        rows, cols, values = (
            torch.cat([s[_key(key, part)] for s in self.samples])
            for part in ("rows", "cols", "values")
        )
        return rows.long(), cols.long(), values.double(), self._weights()[key].matrix_shape

    def _name(self, name: str | None) -> str:
        self._check_any()
        known = list(self._weights())
        if name is None:
            return known[0]
        if name not in known:
            raise ValueError(
                f"the model has no sparse weight called {name!r}: it has {', '.join(known)}"
            )
        return name

    def _weights(self) -> dict[str, SparseWeight]:
        return dict(sparse_weights(self.model))

    def _check_any(self) -> None:
        if not self.samples:
            raise ValueError(
                f"there is no sample yet, after {self.steps} of {self.burn_in} steps of burn-in: "
                "train on, with update() after every step, or call collect()"
            )

    # --- saving -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write samples and counters to a safetensors file, atomically."""
        tensors = {f"{i}/{k}": v for i, s in enumerate(self.samples) for k, v in s.items()}
        numbers = {name: getattr(self, name) for name in ("burn_in", "every", "limit", "steps")}
        about = {"rewire.posterior": json.dumps(numbers | {"samples": len(self.samples)})}
        about["sha256"] = tensor_file.content_sha256(tensors, about)
        tensor_file.write(Path(path), tensors, about)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Posterior:
        """Read what `save` wrote, for the same model; collecting can go on.

        Raises OSError if there is no such file, ValueError for one that is of another kind, damaged
        or changed, or belongs to another model. Memory: twice the size of the file.
        """
        try:
            flat, metadata = tensor_file.read(Path(path))
            about = reading.parse_json(metadata["rewire.posterior"].encode(), str(path))
            self = cls(model, **{name: about[name] for name in ("burn_in", "every", "limit")})
            self.steps, count = (_natural(name, about[name]) for name in ("steps", "samples"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} holds no samples that rewire.posterior can read: "
                f"{reading.brief(repr(error))}"
            ) from None
        tensor_file.check_sum(flat, metadata, str(path))
        # Not a list of the length that the file claims, which may be wrong.
        samples: dict[str, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            number, _, name = key.partition("/")
            samples.setdefault(number, {})[name] = tensor
        if len(samples) != count or not all(str(i) in samples for i in range(count)):
            raise ValueError(f"{path} is damaged: it says {count} samples and has {len(samples)}")
        self.samples = [samples[str(i)] for i in range(count)]
        self._check_fit(path)
        return self

    @torch.no_grad()
    def _check_fit(self, path: str | Path) -> None:
        network = copy.deepcopy(self.model)
        try:
            for sample in self.samples:
                network.load_state_dict(sample)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"samples of {path} do not fit this model: {reading.brief(error)}"
            ) from None


def _natural(name: str, number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**63:
        raise ValueError(f"{name} must be a whole number of at least 0, not {number!r}")
    return number


_PARTS = ("values", "rows", "cols")


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _pools(model: nn.Module) -> Mapping[str, SparseWeight]:
    """All sparse weights by all their names (a shared one has several), as in ``state_dict``."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, SparseWeight)}
