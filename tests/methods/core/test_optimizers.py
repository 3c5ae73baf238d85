"""Optimizers as people use them: whatever wraps what, grown connections start afresh and others
keep what they had.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewire import methods
from rewire.nn import Event, SparseLinear, SparseWeight, sparse_weights
from wrappers import OPTIMIZERS, SAM

# torch puts hooks around the `step` of a class when its first instance is made: from here on, those
# of subclasses that call it are hooked twice, one within the other.
for made in (torch.optim.SGD, torch.optim.Adam):
    made([nn.Parameter(torch.zeros(1))], 0.1)

METHODS: dict[str, dict[str, Any]] = {
    "set": {"every": 2, "fraction": 0.4},
    "set-normal": {"every": 2, "new_values": "normal"},
    "rigl": {"every": 2},
    "deep-r": {"l1": 1e-2, "noise": 0.1},
    "mest": {"every_epochs": 1, "soft": True, "milestones": (1, 2), "gradient_weight": 0.0},
    "dsr": {"every": 2, "magnitude": 0.05, "fraction": 0.2},
    "gmp": {"density": 0.1, "every": 2, "until": 7},
}


def network() -> nn.Module:
    g = torch.Generator().manual_seed(3)
    return nn.Sequential(
        SparseLinear(12, 16, connections=40, generator=g),
        nn.ReLU(),
        SparseLinear(16, 6, connections=30, bias=False, generator=g),
    )


def loss_of(model: nn.Module, time: int) -> Tensor:
    g = torch.Generator().manual_seed(1000 + time)
    return nn.functional.cross_entropy(
        model(torch.randn(8, 12, generator=g)), torch.randint(0, 6, (8,), generator=g)
    )


def step(
    model: nn.Module, optimizer: Any, method: methods.Method, time: int, *, closure: bool = False
) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, time) + method.penalty()
        loss.backward()
        return loss

    if isinstance(optimizer, SAM):
        evaluate()
        if closure:
            optimizer.step(evaluate)
        else:
            optimizer.first_step()
            evaluate()
            optimizer.second_step()
    elif closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()
    method.step()


def placed(weight: SparseWeight, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of slots, by position (row * columns + column); NaN where no connection is."""
    slots = weight.active()
    at = weight.rows[slots].long() * weight.matrix_shape[1] + weight.cols[slots].long()
    found = {}
    for key, value in numbers.items():
        assert value.numel() == weight.capacity, key
        found[key] = torch.full((weight.size,), float("nan"))
        found[key][at] = value.detach()[slots].float()
    return found


class Grown:
    """Notes where connections have grown, by position."""

    def __init__(self, model: nn.Module) -> None:
        self.at: dict[str, set[int]] = {}
        for name, weight in sparse_weights(model):
            weight.follow(lambda event, name=name: self.note(name, event))

    def note(self, name: str, event: Event) -> None:
        weight = event.weight
        slots = event.slots[weight.rows[event.slots] >= 0]
        at = weight.rows[slots].long() * weight.matrix_shape[1] + weight.cols[slots].long()
        self.at.setdefault(name, set()).update(at.tolist())


def assert_state_is_right(
    weight: SparseWeight, before: dict[str, Tensor], optimizer: Any, grown: set[int]
) -> int:
    """Returns how many numbers of grown connections were not what they start at before."""
    after = placed(weight, {"value": weight.values} | optimizer.numbers(weight.values))
    new = torch.zeros(weight.size, dtype=torch.bool)
    new[sorted(grown)] = True
    here = ~after["value"].isnan()
    new &= here
    for key in before.keys() & after.keys() - {"value"}:
        start = after["value"][new] if key.startswith("slow") else torch.zeros(int(new.sum()))
        assert torch.equal(after[key][new], start), key
        stayed = here & ~new
        assert torch.equal(after[key][stayed], before[key][stayed]), key
    return int(new.sum())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_grown_connections_start_afresh_and_survivors_keep_what_they_had(
    kind: str, name: str
) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    method = methods.create(name.removesuffix("-normal"), model, optimizer, seed=1, **METHODS[name])
    grown, count, act = Grown(model), 0, method._after_step
    weights = dict(sparse_weights(model))

    def check(call: Any, *args: Any) -> None:
        """Around what the method does, not around the optimizer's step."""
        nonlocal count
        before = {
            n: placed(w, {"value": w.values} | optimizer.numbers(w.values))
            for n, w in weights.items()
        }
        grown.at.clear()
        call(*args)
        count += sum(
            assert_state_is_right(w, before[n], optimizer, grown.at.get(n, set()))
            for n, w in weights.items()
        )

    method._after_step = lambda pools: check(act, pools)  # type: ignore[method-assign]
    for time in range(12):
        step(model, optimizer, method, time, closure=kind == "sam-closure")
        if time % 3 == 2:
            check(method.end_epoch)
    stats = method.stats()
    assert stats["steps"] == 12
    assert stats["updates"] > 0
    assert count > 0 or name == "gmp"
    method.finalize()


@pytest.mark.parametrize("name", ["set", "rigl", "deep-r", "snip", "granet", "top-kast", "srigl"])
@pytest.mark.parametrize("kind", ["plain", "wrapper", "sam-halves"])
def test_closures_change_nothing(kind: str, name: str) -> None:
    """``optimizer.step(closure)`` is the step that it is without; RigL's skipped steps and SNIP's
    measuring too.
    """
    settings: dict[str, dict[str, Any]] = {
        "snip": {"density": 0.1, "batches": 2},
        "granet": {"density": 0.1, "every": 2, "begin": 1, "until": 7},
        "top-kast": {"every": 2},
        "srigl": {"every": 2},
    }
    ends = []
    for closure in (False, True):
        model = network()
        optimizer = OPTIMIZERS[kind](model.parameters())
        method = methods.create(name, model, optimizer, seed=1, **(settings | METHODS)[name])
        for time in range(9):
            step(model, optimizer, method, time, closure=closure)
        assert method.steps == (7 if name == "snip" else 9)  # SNIP's measuring is no step
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


def test_a_skipped_step_of_rigl_moves_nothing_whoever_makes_it() -> None:
    for kind in (
        "plain",
        "wrapper",
        "lookahead-inside",
        "sam-halves",
        "sam-closure",
        "several",
        "wrapper-of-wrapper",
    ):
        model = network()
        optimizer = OPTIMIZERS[kind](model.parameters())
        method = methods.create("rigl", model, optimizer, seed=1, every=3, fraction=0.0)
        for time in range(6):
            before = [p.detach().clone() for p in model.parameters()]
            step(model, optimizer, method, time, closure=kind == "sam-closure")
            same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            if time == 2:
                assert all(same), kind
            elif time == 3:
                assert not any(same), kind
        assert method.updates == 2
