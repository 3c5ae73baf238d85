"""torch.compile and torch.export, before and after a rewire."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn, optim
from torch._dynamo.testing import CompileCounterWithBackend

from interpreter import run_python
from rewire.nn import SparseConv2d, SparseLinear, sparse_weights


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while tracing
        yield
    torch._dynamo.reset()


def make() -> nn.Sequential:
    return nn.Sequential(
        SparseLinear(12, 16, connections=60, capacity=64),
        nn.ReLU(),
        SparseLinear(16, 5, density=0.5, bias=False),
    )


def gradients(model: Any, parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    return [*torch.autograd.grad(model(x).pow(2).sum(), [x, *parameters])]


def rewire_all(model: nn.Module, dormant: Any, step: int) -> None:
    for _, weight in sparse_weights(model):
        slots = torch.arange(step, step + 6)
        weight.rewire(slots, *dormant(weight, 6, step), torch.randn(6))


def test_fullgraph_follows_rewiring_without_recompiling(dormant: Any) -> None:
    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    parameters = list(model.parameters())
    x = torch.randn(7, 12, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            torch.testing.assert_close(
                gradients(compiled, parameters, x), gradients(model, parameters, x)
            )
            before = compiled(x).detach().clone()
            torch.testing.assert_close(before, model(x))
            rewire_all(model, dormant, step)
            assert not torch.allclose(compiled(x), before)
            if step == 2:  # one slot emptied: K changes, and nothing else
                model[0].weight.rewire(*torch.tensor([[1], [-1], [-1]]))
        model[0].weight.reorder()
        model.load_state_dict(make().state_dict())
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_training_compiled_equals_training_eagerly(dormant: Any) -> None:
    results = []
    for compiles in (False, True):
        torch.manual_seed(3)
        model = make()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            run(torch.randn(8, 12)).pow(2).mean().backward()
            optimizer.step()
            rewire_all(model, dormant, step)
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key])


CHANGES: dict[str, Any] = {
    "rewire": lambda layer, dormant: layer.weight.rewire(
        torch.tensor([0]), *dormant(layer.weight, 1), 0.1
    ),
    "reorder": lambda layer, dormant: layer.weight.reorder(),
    "grow": lambda layer, dormant: layer.weight.resize(layer.weight.capacity + 8),
    "load": lambda layer, dormant: layer.load_state_dict(make()[0].state_dict()),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("needs", ["values", "x only"])
def test_a_change_between_forward_and_backward_is_never_silently_wrong(
    name: str, needs: str, dormant: Any
) -> None:
    layer = SparseLinear(12, 16, connections=60, capacity=64)
    layer.weight.requires_grad_(needs == "values")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(7, 12, requires_grad=True)
        right = torch.autograd.grad(layer(x).sum(), x)[0]
        y = compiled(x)
        CHANGES[name](layer, dormant)
        if needs == "values":  # whose gradient could only go to slots that hold something else now
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            with contextlib.suppress(RuntimeError):
                y.sum().backward()
                torch.testing.assert_close(x.grad, right)


def test_resizing_compiles_once_more_and_is_right(dormant: Any) -> None:
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 12)
    compiled(x)
    model[0].weight.resize(70)
    rewire_all(model, dormant, 0)
    parameters = list(model.parameters())
    torch.testing.assert_close(gradients(compiled, parameters, x), gradients(model, parameters, x))


@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12)])
def test_dynamic_batch(shape: tuple[int, ...]) -> None:
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    parameters = list(model.parameters())
    for n in (shape[0], 9, 5):
        x = torch.randn(n, *shape[1:])
        torch.testing.assert_close(
            gradients(compiled, parameters, x), gradients(model, parameters, x)
        )


def test_inductor(dormant: Any) -> None:
    """The layouts that inductor demands of our operators, forward and backward. In one graph and
    without vector instructions, since compiling its C++ takes the time, and what that computes is
    not ours to test.
    """
    model = nn.Sequential(
        SparseConv2d(3, 4, 3, density=0.5), nn.Flatten(2), SparseLinear(4, 5, density=0.5)
    )
    parameters = list(model.parameters())
    x = torch.randn(7, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        compiled = torch.compile(model, fullgraph=True)
        for step in range(2):
            torch.testing.assert_close(compiled(x), model(x))
            torch.testing.assert_close(
                gradients(compiled, parameters, x), gradients(model, parameters, x)
            )
            rewire_all(model, dormant, step)
        torch.testing.assert_close(compiled(x), model(x))


def test_autocast_compiled() -> None:
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(x), model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, dormant: Any) -> None:
    model = make().eval()
    batch = torch.export.Dim("batch", min=2, max=100)
    x = torch.randn(7, 12)
    for step in range(2):  # the second time after a rewire
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
        again = exported.module()
        for n in (7, 3):
            inputs = torch.randn(n, 12)
            torch.testing.assert_close(again(inputs), model(inputs))
        rewire_all(model, dormant, step)


def test_a_model_rewired_after_export_keeps_the_exported_one_consistent(dormant: Any) -> None:
    """It shares values and index with the model or has copies of all: never a mixture."""
    model = make().eval()
    x = torch.randn(7, 12)
    before = model(x).detach().clone()
    exported = torch.export.export(model, (x,)).module()
    rewire_all(model, dormant, 0)
    after = model(x)
    y = exported(x)
    assert torch.allclose(y, after) or torch.allclose(y, before)


def test_export_of_sequences_with_a_dynamic_batch(tmp_path: Any) -> None:
    """(batch, time, features): the batch must not become a constant; and another process can load
    the program.
    """
    model = make().eval()
    exported = torch.export.export(
        model, (torch.randn(4, 7, 12),), dynamic_shapes=({0: torch.export.Dim("b")},)
    )
    x = torch.randn(9, 7, 12)
    torch.testing.assert_close(exported.module()(x), model(x))
    torch.export.save(exported, tmp_path / "model.pt2")
    path = str(tmp_path / "model.pt2")
    code = (
        "import torch, rewire; "
        f"print(torch.export.load({path!r}).module()(torch.ones(3, 7, "
        "12)).shape)"
    )
    done = run_python(code)
    assert done.stdout.strip() == f"torch.Size([3, 7, {model(x).shape[-1]}])", done.stderr
