"""Inputs and targets with mean 0 and variance 1, as the training part has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewire.app.data import Dataset
from rewire.app.data.rows import ByteRows, Rows, SparseRows

__all__ = ["Scaling", "apply", "fit", "fit_targets"]


@dataclass(frozen=True)
class Scaling:
    """``(x - mean) * factor``; both float32 (features,)."""

    mean: Tensor
    factor: Tensor


def _of(mean: Tensor, variance: Tensor) -> Scaling:
    """What never changes is only shifted."""
    deviation = variance.clamp_min(0).sqrt()
    constant = deviation <= 1e-7 * mean.abs().clamp_min(1e-30)
    factor = torch.where(constant, torch.ones_like(deviation), 1 / deviation)
    return Scaling(mean.float(), factor.float())


def fit(dataset: Dataset, train_x: Rows) -> Scaling:
    """What standardises the inputs, fitted on the training part alone.

    Of images each channel has one mean and variance, of sequences each number of a step has,
    padding left out; else each feature. Sparse matrices keep their zeros: they are only scaled.
    """
    if isinstance(train_x, SparseRows):
        matrix, n = train_x.matrix.astype("float64"), len(train_x)
        mean = torch.from_numpy(matrix.sum(0).ravel() / n)
        square = torch.from_numpy(matrix.multiply(matrix).sum(0).ravel() / n)
        found = _of(mean, square - mean.square())
        return Scaling(torch.zeros_like(found.mean), found.factor)
    sums = torch.zeros(2, dataset.features, dtype=torch.float64)
    used = torch.zeros(dataset.features, dtype=torch.float64)
    for first in range(0, len(train_x), 4096):
        block = train_x[first : first + 4096].double()
        sums += torch.stack([block.sum(0), block.square().sum(0)])
        if dataset.padded:
            steps = (block.view(-1, *dataset.shape) != 0).any(2)
            used += steps.sum(0).double().repeat_interleave(dataset.shape[1])
        else:
            used += len(block)
    shape = dataset.shape
    if dataset.image_shape is not None:
        together = (1, -1) if len(shape) == 2 else (shape[0], -1)  # one for a channel
        sums, used = (t.view(*t.shape[:-1], *together).sum(-1) for t in (sums, used))
        repeat = dataset.features // together[0]
    elif len(shape) == 2:
        sums, used = sums.view(2, *shape).sum(1), used.view(shape).sum(0)
        repeat = 0
    else:
        repeat = 1
    mean = sums[0] / used.clamp_min(1)
    found = _of(mean, sums[1] / used.clamp_min(1) - mean.square())

    def spread(t: Tensor) -> Tensor:
        return t.repeat(shape[0]) if repeat == 0 else t.repeat_interleave(repeat)

    return Scaling(spread(found.mean), spread(found.factor))


def apply(scaling: Scaling, x: Rows, dataset: Dataset) -> Rows:
    """The scaled rows; padding stays 0."""
    if isinstance(x, SparseRows):
        from scipy import sparse

        return SparseRows(x.matrix @ sparse.diags_array(scaling.factor.numpy()))
    if isinstance(x, ByteRows):
        # (v - a) b scaled is (v - (a + mean / b)) b factor
        return ByteRows(x.values, x.shift + scaling.mean / x.scale, x.scale * scaling.factor)
    scaled = (x - scaling.mean) * scaling.factor
    if dataset.padded:
        steps = (x.view(-1, *dataset.shape) != 0).any(2, keepdim=True)
        scaled = (scaled.view(-1, *dataset.shape) * steps).view(x.shape)
    return scaled


def fit_targets(y: Tensor) -> Scaling:
    """What gives each target of a regression mean 0 and variance 1; ``y`` is (samples, targets)."""
    variance, mean = torch.var_mean(y.double(), 0, correction=0)
    return _of(mean, variance)
