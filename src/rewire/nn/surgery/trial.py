"""Tries a cut on copies: the cut network must compute what it does when nothing reads the units."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn.forward.modes import rehearsing
from rewire.nn.forward.tensors import map_tensors, tensors_in
from rewire.nn.surgery.trace import call, in_words, mode_name, twin_of

__all__ = ["Different", "try_cut"]

#: How much outputs may differ, relative to the largest, by the coarsest dtype of the computation.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Change = Callable[[nn.Module], None]


class Different(ValueError):
    """The cut network computes something else; the message says how, as the end of a sentence."""


@torch.no_grad()
def try_cut(model: nn.Module, inputs: Any, cut: Change, silence: Change, readers: str) -> None:
    """Compare copies of ``model`` with random weights, one changed by ``cut``, the other by
    ``silence``.

    They run in training and in eval mode in the model's dtype and, if the network can, once in
    float64, which shows differences that rounding may hide. Raises `Different`; ``model`` does not
    change.
    """
    twin = twin_of(model)
    _randomize(twin)
    less = twin_of(twin)
    with warnings.catch_warnings():  # the model may warn of two samples, or of copies
        warnings.simplefilter("ignore")
        try:
            cut(less)
        except Exception as error:
            raise Different(
                f"the network cannot be made with fewer of them ({in_words(error)})"
            ) from None
        silence(twin)
        for train in (False, True):
            _compare(twin, less, inputs, train, readers, must_run=True)
        if any(p.is_floating_point() and p.dtype != torch.float64 for p in twin.parameters()):
            twin, less = twin.double(), less.double()
            double = map_tensors(lambda x: x.double() if x.is_floating_point() else x, inputs)
            _compare(twin, less, double, False, readers, must_run=False)


def _run(model: nn.Module, inputs: Any, train: bool) -> tuple[list[Tensor], torch.dtype]:
    with rehearsing(model, train=train) as expected, torch.set_grad_enabled(train):
        found = [x.detach() for x in tensors_in(call(model, inputs))]
    return found, expected.coarsest


def _compare(
    twin: nn.Module, less: nn.Module, inputs: Any, train: bool, readers: str, *, must_run: bool
) -> None:
    mode = mode_name(train)
    try:
        here, dtype = _run(twin, inputs, train)
    except Exception as error:
        if not must_run:
            return  # forward makes tensors of another dtype
        raise Different(
            f"the network does not run in {mode} with random weights ({in_words(error)})"
        ) from None
    try:
        there, _ = _run(less, inputs, train)
    except Exception as error:
        raise Different(
            f"the network does not run with fewer of them in {mode} ({in_words(error)})"
        ) from None
    if [x.shape for x in here] != [x.shape for x in there]:
        raise Different(f"the shape of the network's output depends on them in {mode}")
    for a, b in zip(here, there, strict=True):
        numbers = a.is_floating_point() or a.is_complex()
        if numbers and not _close(a, b, _TOLERANCE.get(dtype, 1e-1)):
            raise Different(
                f"something between it and {readers or 'the output'} mixes them or uses weights "
                f"outside their layer (in {mode})"
            )


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not a.numel():
        return True
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    a, b = a[finite], b[finite]
    if not a.numel():
        return True
    return float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), 1e-6)


def _randomize(model: nn.Module) -> None:
    """Draw weights that hide no difference: no weight is 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            fan_in = max(parameter[0].numel() if parameter.dim() > 1 else 4, 1)
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameter.copy_(noise.to(parameter) * (3 / fan_in) ** 0.5)
