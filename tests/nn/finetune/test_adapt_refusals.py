"""What `rewire.adapt` refuses by name, before anything changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rewire
from rewire.nn import SparseLinear


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Own(nn.Linear):
    pass


class Rounded(Tensor):
    """As the tensors of libraries that quantize or shard."""


def rounded(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(8, 6).as_subclass(Rounded))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2), nn.LSTM(2, 2))


def forward(model: nn.Sequential) -> None:
    own = model[0].forward
    model[0].forward = lambda x: own(x) + 1  # type: ignore[method-assign]


REFUSED: dict[str, tuple[Callable[[nn.Sequential], Any], dict[str, Any], str]] = {
    "no budget": (lambda m: m, {"density": None}, "exactly one of density= and connections="),
    "two budgets": (lambda m: m, {"connections": 3}, "exactly one of density= and connections="),
    "too much": (lambda m: m, {"density": 1.5}, "density"),
    "nothing matches": (lambda m: m, {"only": "encoder.*"}, "no layer to adapt"),
    "a pattern of the budget": (
        lambda m: m,
        {"density": {"x": 0.1}},
        "pattern 'x' matches no layer",
    ),
    "distribution": (lambda m: m, {"distribution": "x"}, "unknown distribution 'x'"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m[0], "weight", Doubled()),
        {},
        r"^0 has a parametrization of weight \(Doubled\)",
    ),
    "weight norm": (lambda m: parametrizations.weight_norm(m[2]), {}, "^2 has a parametrization"),
    "old weight norm": (lambda m: nn.utils.weight_norm(m[0]), {}, "^0 computes its weight"),
    "prune mask": (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), {}, "^0 has a prune mask"),
    "lazy": (lambda m: m.insert(0, nn.LazyLinear(6)), {}, "^0 is a LazyLinear"),
    "quantized": (
        lambda m: m.append(torch.ao.nn.quantized.dynamic.Linear(8, 2)),
        {},
        "^4 is a quantized Lin",
    ),
    "tensor": (rounded, {}, r"^0\.weight is a Rounded \(sharded, quantized or the like\)"),
    "forward": (forward, {}, "^0 has a forward of its own"),
    "compiled": (lambda m: m[0].compile(), {}, "^0 was compiled"),
    "gradient hook": (
        lambda m: m[2].weight.register_hook(lambda g: g),
        {},
        r"^2\.weight has a hook",
    ),
    "complex": (lambda m: m.to(torch.complex64), {}, r"^0\.weight is torch\.complex64"),
    "meta": (lambda m: m.to("meta"), {}, r"^0\.weight is on the meta device"),
    "no numbers": (
        lambda m: m.insert(0, nn.Linear(0, 6)),
        {},
        r"^0\.weight has the shape \(6, 0\)",
    ),
    "name": (lambda m: setattr(m[0], "difference", 1), {}, "^0 was given 'difference'"),
    "subclass": (lambda m: m.append(Own(2, 2)), {"only": "4"}, "^4 is a Own, whose forward may"),
    "recurrent": (lambda m: m, {"only": "*"}, r"^3 is a LSTM: only torch\.nn\.Linear, "),
    "recurrent, by its budget": (lambda m: m, {"density": {"3": 0.5}}, "^3 is a LSTM"),
    "attention": (
        lambda m: m.append(nn.MultiheadAttention(4, 2)),
        {"only": "4"},
        "^4 is a Multihe",
    ),
    "sparse": (
        lambda m: m.append(SparseLinear(2, 2, density=0.5)),
        {"only": "4"},
        "^4 is sparse al",
    ),
    "adapted": (lambda m: rewire.adapt(m, density=0.5), {}, r"^0 has a difference beside its weig"),
    "trained base": (
        lambda m: m,
        {"train": "2.weight"},
        r"^2\.weight cannot be trained as a whole",
    ),
    "trained nothing": (
        lambda m: m,
        {"train": ["*.bias", "x"]},
        "pattern 'x' of train= matches no",
    ),
    "dtype": (
        lambda m: m,
        {"dtype": torch.bfloat16},
        r"dtype must be .*torch\.float32, not torch\.b",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name_before_anything_changes(case: str) -> None:
    prepare, arguments, message = REFUSED[case]
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(model)
    kinds = [type(module) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        rewire.adapt(model, **{"density": 0.3} | arguments)
    assert kinds == [type(module) for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


def test_what_no_pattern_means_is_not_refused() -> None:
    model = plain()
    prune.l1_unstructured(model[2], "weight", 0.5)
    forward(model)
    model.append(nn.Linear(2, 2))
    assert list(rewire.adapt(model, density={"4": 0.5}).differences) == ["4"]


def test_layers_of_other_classes_that_nobody_names_stay_frozen() -> None:
    model = plain()
    model.append(nn.MultiheadAttention(4, 2)).append(Own(2, 2))
    model.append(SparseLinear(2, 2, density=0.5))
    adapter = rewire.adapt(model, density=0.3)
    assert sorted(adapter.differences) == ["0", "2"]
    assert not any(p.requires_grad for i in (3, 4, 5, 6) for p in model[i].parameters())
