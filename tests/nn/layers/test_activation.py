"""SReLU against its definition, piece by piece."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewire.nn import SparseLinear, SReLU


def by_cases(x: float, tl: float, al: float, tr: float, ar: float) -> float:
    t_r = tl + abs(tr)
    if x <= tl:
        return tl + al * (x - tl)
    return t_r + ar * (x - t_r) if x >= t_r else x


def srelu(shape: int | tuple[int, ...]) -> SReLU:
    made = SReLU(shape, dtype=torch.float64)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


def test_values_are_the_definitions() -> None:
    torch.manual_seed(0)
    layer, x = srelu(7), 3 * torch.randn(50, 7, dtype=torch.float64)
    y = layer(x)
    for b in range(50):
        for i in range(7):
            numbers = [
                float(p.detach()[i])
                for p in (layer.t_left, layer.a_left, layer.t_right, layer.a_right)
            ]
            assert float(y[b, i].detach()) == pytest.approx(
                by_cases(float(x[b, i]), *numbers), abs=1e-12
            )


def test_gradients() -> None:
    torch.manual_seed(1)
    layer = srelu((2, 3))
    x = (3 * torch.randn(4, 2, 3, dtype=torch.float64)).requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        out: Tensor = torch.func.functional_call(layer, named, (x,))
        return out

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_starts_as_in_the_authors_code_and_keeps_the_layout() -> None:
    layer = SReLU(2000, generator=torch.Generator().manual_seed(0))
    assert not layer.t_left.any()
    assert (layer.a_right == 1).all()
    assert 0 <= layer.a_left.min() < 0.01 < 0.99 < layer.a_left.max() <= 1
    assert 0 <= layer.t_right.min() < 0.05 < 4.95 < layer.t_right.max() <= 5
    y = SparseLinear(5, 2000, connections=4000)(torch.randn(8, 5))
    assert layer(y).stride() == y.stride() == (1, 8)


@pytest.mark.parametrize("shape", [0, (), (3, 0)])
def test_a_shape_without_units_is_refused(shape: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SReLU(shape)
