"""Scores of predicted probabilities, given the labels: pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or not labels.numel():
        raise ValueError(
            "probabilities must be (samples, classes) and labels (samples,), at least one, not "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    last = probabilities.shape[1] - 1
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) > last:
        raise ValueError(f"labels must be integers between 0 and {last}")


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of the samples whose most probable class is right, for (N, C) and (N,)."""
    _check(probabilities, labels)
    return float((probabilities.argmax(1) == labels).double().mean())


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean of -ln p(right class), in nats, for (N, C) and (N,); infinite if a right class has
    probability 0.
    """
    _check(probabilities, labels)
    return float(-probabilities.double().gather(1, labels.long()[:, None]).log().mean())


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities to the one-hot label, summed over classes (0 to
    2), for (N, C) and (N,).
    """
    _check(probabilities, labels)
    right = nn.functional.one_hot(labels.long(), probabilities.shape[1])
    return float((probabilities.double() - right).square().sum(1).mean())


class Bins(NamedTuple):
    """A reliability diagram: mean confidence, accuracy and number of samples of each bin.

    Confidence and accuracy of an empty bin are 0.
    """

    confidence: Tensor
    accuracy: Tensor
    number: Tensor


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Bins:
    """Sort samples by confidence (the largest probability) into ``bins`` bins of equal width, which
    include their upper ends.
    """
    _check(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    confidence, chosen = probabilities.double().max(1)
    at = (torch.ceil(confidence * bins).long() - 1).clamp(0, bins - 1)
    zero = torch.zeros(bins, dtype=torch.float64, device=at.device)
    count = zero.index_add(0, at, torch.ones_like(confidence))
    sums = (zero.index_add(0, at, v) for v in (confidence, (chosen == labels).double()))
    mean_confidence, right = (s / count.clamp(min=1) for s in sums)
    return Bins(mean_confidence, right, count.long())


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over the bins of `reliability`, weighted by numbers.

    Naeini, Cooper, Hauskrecht, AAAI 2015; Guo et al., ICML 2017 (15 bins).
    """
    confidence, right, number = reliability(probabilities, labels, bins)
    return float(((confidence - right).abs() * number).sum() / number.sum())


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy over the last dimension, in nats: (..., C) -> (...)."""
    found: Tensor = torch.special.entr(probabilities).sum(-1)
    return found


def scores(probabilities: Tensor, labels: Tensor, bins: int = 15) -> dict[str, float]:
    """accuracy, nll, ece and brier of (N, C) probabilities for (N,) labels."""
    return {
        "accuracy": accuracy(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels, bins),
        "brier": brier_score(probabilities, labels),
    }
