"""Modes come back as they were: of every module for itself, and after an error too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewire.app.train.metrics import evaluate
from rewire.nn.forward.modes import evaluating


def half_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_all_evaluate_and_each_module_gets_its_own_mode_back() -> None:
    first, second = half_frozen(), half_frozen().eval()
    before = modes(first), modes(second)
    with evaluating(first, second):
        assert not any(modes(first) + modes(second))
        assert not first(torch.ones(2, 4)).requires_grad
    assert (modes(first), modes(second)) == before
    assert torch.is_grad_enabled()


def test_after_an_error() -> None:
    model = half_frozen()
    before = modes(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), evaluating(model):
        model(torch.ones(2, 5))
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_accuracy_of_a_model_with_a_frozen_layer() -> None:
    model = half_frozen()
    before = modes(model)
    evaluate(model, torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))
    assert modes(model) == before
