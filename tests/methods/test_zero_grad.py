"""``zero_grad`` may stand anywhere in the loop, and a layer may be left out of a step: the same for
all methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense_harness
import harness
from rewire import methods
from rewire.nn import SparseLinear

Case = tuple[str, dict[str, Any]]
Early = Callable[[nn.Module, torch.optim.Optimizer], Any]

#: What stands straight after ``optimizer.step()``.
EARLY: dict[str, Early] = {
    "optimizer.zero_grad": lambda net, o: o.zero_grad(),
    "set_to_none=False": lambda net, o: o.zero_grad(set_to_none=False),
    "by hand": lambda net, o: [setattr(p, "grad", None) for p in net.parameters()],
}


def trained(
    case: Case, early: Early | None, amp: bool, fused: bool = False
) -> tuple[list[tuple[str, Tensor]], Any]:
    """Three epochs of four steps; without ``early`` gradients are zeroed before backward, as
    documented.
    """
    name, settings = case
    info = methods.info(name)
    torch.manual_seed(3)
    model = dense_harness.mlp() if info.cls.starts_dense else harness.linear(torch.float32, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
    data: dict[str, Any] = (
        {"data": [(torch.randn(16, 12), torch.zeros(16))]} if info.takes_data else {}
    )
    if "evaluate" in info.services and "every" in settings:
        data["evaluate"] = lambda net: 0.0
    method = methods.create(name, model, optimizer, seed=7, **data, **settings)
    scaler = torch.amp.GradScaler("cpu", enabled=amp, init_scale=2.0**12, growth_interval=10**6)
    for step in range(1, 13):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        if early is None:
            optimizer.zero_grad()
        loss = (model(x) - x[:, :6]).square().mean() + method.penalty()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if early is not None:
            early(model, optimizer)
        method.step()
        if not step % 4:
            method.end_epoch(lambda net: 0.0)
    model = method.finalize()
    return list(model.state_dict().items()), method.stats()


CASES = [*harness.CASES, *dense_harness.CASES]


@pytest.mark.parametrize("case", CASES, ids=harness.case_id)
def test_zero_grad_may_stand_anywhere(case: Case) -> None:
    """In every way, with and without a GradScaler: the same bits as in the documented order."""
    model, stats = trained(case, None, False)
    for number, (name, early) in enumerate(EARLY.items()):
        for amp in (False, True) if number == 0 else (CASES.index(case) % 2 == 0,):
            other, counts = trained(case, early, amp)
            assert counts == stats, (name, amp)
            for (key, tensor), (_, found) in zip(model, other, strict=True):
                assert tensor.shape == found.shape, (name, amp, key)
                assert torch.equal(tensor, found), (name, amp, key)


@pytest.mark.parametrize(
    "case", [c for c in CASES if methods.info(c[0]).needs == "gradients"], ids=harness.case_id
)
def test_a_fused_optimizer_unscales_by_itself(case: Case) -> None:
    """Its gradients are scaled when it steps; what methods make of them is not."""
    model, stats = trained(case, None, False, fused=True)
    other, counts = trained(case, EARLY["optimizer.zero_grad"], True, fused=True)
    assert counts == stats
    for (key, tensor), (_, found) in zip(model, other, strict=True):
        assert torch.equal(tensor, found), key


class Branches(nn.Module):
    """(batch, 12) to (batch, 6) by two layers side by side, or (``both`` is False) by the first of
    them alone.
    """

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.a, self.b = (SparseLinear(12, 6, density=0.5, generator=g) for _ in range(2))
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x) if self.both else self.a(x)
        return y


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("case", harness.CASES, ids=harness.case_id)
def test_a_layer_that_takes_no_part_for_a_while(case: Case, to_none: bool) -> None:
    """No method minds, and those that decide by gradients leave such a layer's connections as they
    are.
    """
    name, settings = case
    info = methods.info(name)
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(8, 12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = {"data": [x]} if info.takes_data else {}
    settings = settings | ({"l1": 1e-2} if isinstance(settings.get("l1"), dict) else {})
    method = methods.create(name, model, optimizer, seed=0, **data, **settings)
    for epoch in range(5):
        model.both = epoch in (0, 4)
        before = model.b.weight.fingerprint()
        for step in range(4):
            optimizer.zero_grad(set_to_none=to_none)
            (model(x).square().mean() + method.penalty()).backward()
            optimizer.step()
            method.step()
            # an update that was due at the end of the epoch before has been made
            if step == 0 and epoch == 1:
                before = model.b.weight.fingerprint()
        method.end_epoch(lambda net: 0.0)
        random = settings.get("growth") == "random" or settings.get("soft")
        if name in ("rigl", "srigl", "itop") and not random and epoch in (1, 2, 3):
            assert model.b.weight.fingerprint() == before
        if name == "mest" and epoch in (2, 3) and to_none and not random:
            assert model.b.weight.fingerprint() == before
    method.finalize()
