"""Optimizers whose numbers of a connection cannot be told apart are refused when a method is made,
by name.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

from rewire import methods
from rewire.nn import SparseLinear
from wrappers import Lookahead, LookaheadNested, Several, Wrapper


def model() -> nn.Sequential:
    return nn.Sequential(
        SparseLinear(12, 16, connections=40), nn.ReLU(), SparseLinear(16, 6, connections=30)
    )


class Keeps(optim.SGD):
    """SGD that keeps numbers under a name which says nothing of the parameter they are for."""

    def __init__(self, params: Any, numbers: int, where: str) -> None:
        super().__init__(params, 0.1)
        if where == "attribute":
            self.history = torch.zeros(numbers)
        elif where == "group":
            self.param_groups[0]["history"] = torch.zeros(numbers)
        else:
            self.state["all"] = {"history": torch.zeros(numbers)}


class Master(Wrapper):
    """Trains copies of the parameters and hands them back, as mixed precision does."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        Optimizer.__init__(self, params, {"lr": 0.1})
        self.base = optim.SGD([nn.Parameter(p.detach().clone()) for p in params], 0.1)


@pytest.mark.parametrize("where", ["attribute", "group", "state"])
@pytest.mark.parametrize("whose", ["one pool", "all parameters together"])
def test_numbers_of_no_known_parameter_are_refused(where: str, whose: str) -> None:
    net = model()
    total = sum(p.numel() for p in net.parameters())
    numbers, words = (
        (30, r"the values of a weight of shape \(6, 16\)")
        if whose == "one pool"
        else (total, whose)
    )
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for optimizer in (
        Keeps(net.parameters(), numbers, where),
        Wrapper(Keeps(net.parameters(), numbers, where)),
    ):
        told = f"(Keeps|Wrapper) keeps {numbers} numbers in .*history.*, as many as {words}, and"
        with pytest.raises(ValueError, match=told):
            methods.SET(net, optimizer)
    # Any other number is no state of connections, and nothing was left behind by the refusal.
    methods.SET(net, Keeps(net.parameters(), 31, where)).finalize()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_an_optimizer_that_trains_copies_is_refused() -> None:
    net = model()
    with pytest.raises(
        ValueError, match=r"Master has an optimizer inside \(SGD\) that trains a copy"
    ):
        methods.RigL(net, Master(net.parameters()))


def test_lbfgs_is_refused_wherever_it_is() -> None:
    net = model()
    lbfgs = optim.LBFGS(net.parameters())
    with pytest.raises(ValueError, match=r"^LBFGS cannot train sparse weights: its history"):
        methods.SET(net, lbfgs)
    for outer, name in ((Wrapper(lbfgs), "Wrapper"), (Lookahead(lbfgs), "Lookahead")):
        for optimizer in (outer, LookaheadNested(outer)):
            title = name if optimizer is outer else "LookaheadNested"
            with pytest.raises(
                ValueError, match=rf"LBFGS cannot train sparse weights \({title} has it inside\)"
            ):
                methods.SET(net, optimizer)
    # For dense parameters it may: the biases here.
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    values = [p for name, p in net.named_parameters() if name.endswith("values")]
    with pytest.raises(ValueError, match=r"Several has it inside"):
        methods.SET(net, Several([optim.LBFGS(values), optim.SGD(biases, 0.1)]))
    methods.SET(net, [optim.SGD(values, 0.1)]).finalize()
