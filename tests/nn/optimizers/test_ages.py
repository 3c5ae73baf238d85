"""Adam's relatives on grown connections: step for step what an optimizer made at their birth
does.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from rewire.nn import SparseLinear, SparseWeight, follow_optimizer

K, SHAPE = 24, (6, 8)
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adam": [
        {},
        {"foreach": False},
        {"fused": True},
        {"amsgrad": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "AdamW": [
        {"weight_decay": 0.1},
        {"fused": True, "amsgrad": True},
        {"eps": 1e-3, "betas": (0.5, 0.9)},
    ],
    "NAdam": [
        {},
        {"foreach": False, "weight_decay": 0.1},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    "RAdam": [
        {},
        {"foreach": False, "maximize": True},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    "Adamax": [
        {},
        {"foreach": False, "weight_decay": 0.1},
        {"maximize": True, "betas": (0.8, 0.99)},
    ],
}
CASES = [
    pytest.param(n, o, id=f"{n}-{i}")
    for n, options in OPTIONS.items()
    for i, o in enumerate(options)
]


class Twin:
    """A pool whose connections are trained, each from its growth on, by an optimizer of its own as
    well.
    """

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float32, capacity: int = K, **options: Any
    ) -> None:
        self.weight = SparseWeight(
            SHAPE, K, capacity=capacity, dtype=dtype, generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            self.weight.values.copy_(torch.linspace(-1, 1, capacity) * (self.weight.rows >= 0))
        self._kind: Any = getattr(optim, name)
        self._options = {"lr": 1e-2} | options
        self.optimizer: Optimizer = self.make(self.weight.parameters())
        self.handles = follow_optimizer(self.optimizer, [self.weight])
        #: Of each growth: positions, those still there, their values and the optimizer made then.
        self.alone: list[tuple[Tensor, Tensor, nn.Parameter, Optimizer]] = []
        self.step_number = 0
        self.random = torch.Generator().manual_seed(0)

    def make(self, parameters: Any) -> Optimizer:
        made: Optimizer = self._kind(parameters, **self._options)
        return made

    def gradient(self, position: Tensor) -> Tensor:
        wave = torch.sin(position.double() * 7.3 + self.step_number * 1.3) + 0.4
        return (wave * (1 + position % 3) * 0.1).to(self.weight.dtype)

    def position(self) -> Tensor:
        return self.weight.rows.long() * SHAPE[1] + self.weight.cols.long()

    def step(self, closure: bool = False) -> None:
        position = self.position()

        def gradients() -> float:
            self.weight.values.grad = self.gradient(position) * (position >= 0)
            return 0.0

        if closure:
            self.weight.values.grad = None
            self.optimizer.step(gradients)
        else:
            gradients()
            self.optimizer.step()
        for at, _, parameter, optimizer in self.alone:
            parameter.grad = self.gradient(at)
            optimizer.step()
        self.step_number += 1

    def grow(self, count: int = 5) -> None:
        slots = self.weight.active()[torch.randperm(K, generator=self.random)[:count]]
        for at, there, _, _ in self.alone:
            there &= ~torch.isin(at, self.position()[slots])
        taken = set(self.position().tolist())
        new = torch.tensor([at for at in range(math.prod(SHAPE)) if at not in taken][:count])
        values = torch.linspace(-0.2, 0.3, count, dtype=self.weight.dtype)
        self.weight.rewire(slots, new // SHAPE[1], new % SHAPE[1], values)
        parameter = nn.Parameter(values.clone())
        self.alone.append(
            (new, torch.ones(count, dtype=torch.bool), parameter, self.make([parameter]))
        )

    def error(self) -> float:
        """The largest difference between a connection and its twin, over all that have grown and
        are there.
        """
        found = torch.zeros(math.prod(SHAPE), dtype=self.weight.dtype)
        active = self.weight.rows >= 0
        found[self.position()[active]] = self.weight.values.detach()[active]
        errors = [
            float((found[at] - p.detach()).abs()[there].max())
            for at, there, p, _ in self.alone
            if there.any()
        ]
        assert errors
        return max(errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_as_an_optimizer_made_at_birth(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    twin, worst = Twin(name, dtype, **options), 0.0
    for step in range(120):
        if step in (3, 20, 21, 60):
            twin.grow()
        twin.step()
        worst = max(worst, twin.error() if twin.alone else 0.0)
    assert worst < EXACT[dtype]


@pytest.mark.parametrize("name", OPTIONS)
def test_without_it_the_first_update_is_far_off(name: str) -> None:
    """That the test above can fail, and by how much Adam is off: (1 - beta1) / sqrt(1 - beta2) =
    3.16 rates.
    """
    twin = Twin(name)
    for handle in twin.handles:
        handle.remove()
    follow_optimizer(twin.optimizer, [twin.weight], moments="cleared")
    for _ in range(2500 if name == "Adam" else 30):
        twin.step()
    twin.grow()
    at, _, _, _ = twin.alone[-1]
    slots = torch.isin(twin.position(), at).nonzero().flatten()
    born = twin.weight.values.detach()[slots].clone()
    twin.step()
    assert twin.error() > 1e-4
    if name == "Adam":
        assert 0.029 < float((twin.weight.values.detach()[slots] - born).abs().max()) < 0.0325


@pytest.mark.parametrize("name", OPTIONS)
def test_beyond_the_horizon_connections_are_old_and_go_on_exactly(name: str) -> None:
    """With small betas the correction is over soon; from then on nothing is done for them."""
    fast = (
        {"betas": (0.5, 0.7), "momentum_decay": 4.0} if name == "NAdam" else {"betas": (0.5, 0.7)}
    )
    twin = Twin(name, torch.float64, **fast)
    for _ in range(10):
        twin.step()
    twin.grow()
    age = twin.optimizer.state[twin.weight.values]["age"]
    assert (int((age == 0).sum()), int((age == -1).sum())) == (5, K - 5)
    for _ in range(400):
        twin.step()
    assert (age == -1).all()
    assert twin.error() < 1e-12


def test_the_end_of_nadams_schedule_does_not_matter() -> None:
    """16 bits end before NAdam's mu does; what it changes then averages out."""
    twin = Twin("NAdam", torch.float64, betas=(0.9, 0.99), momentum_decay=0.5)
    for _ in range(3):
        twin.step()
    twin.grow()
    age = twin.optimizer.state[twin.weight.values]["age"]
    # 0.5 * 0.96 ** (0.5 * 130) is 0.035 there; 0.5 * 0.96 ** (0.004 * 65534) is 1.1e-5
    for _ in range(130):
        twin.step()
    slots = (age >= 0).nonzero().flatten()
    own, before = float(age[slots][0]), twin.error()
    age[slots] = -1  # as if 16 bits had ended
    for _ in range(400):
        twin.step()
    cut = 0.5 * 0.96 ** (0.5 * own)
    assert before < 1e-12
    assert twin.error() / cut * (0.5 * 0.96 ** (0.004 * 65534)) < 1e-6


def test_wider_ages_where_a_beta_fades_slowly() -> None:
    twin = Twin("Adam", torch.float64, betas=(0.9, 0.9999))
    twin.step()
    twin.grow()
    age = twin.optimizer.state[twin.weight.values]["age"]
    assert age.dtype == torch.int32
    age[age == 0] = 0  # newborn
    for _ in range(30):
        twin.step()
    assert twin.error() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["load first", "follow first"])
def test_a_resumed_run_goes_on_to_the_bit(dtype: torch.dtype, order: str) -> None:
    """`optimizer.load_state_dict` turns state into the parameter's dtype, 16 bits too, and ages
    survive it.
    """
    twin = Twin("AdamW", dtype)
    for step in range(700):  # beyond what bfloat16 counts exactly
        if step in (3, 690):
            twin.grow()
        if step in (5, 690):
            twin.alone.clear()
        twin.step()
    saved = copy.deepcopy((twin.weight.state_dict(), twin.optimizer.state_dict()))
    other = Twin("AdamW", dtype)
    other.weight.load_state_dict(saved[0])
    if order == "load first":
        for handle in other.handles:
            handle.remove()
    other.optimizer.load_state_dict(saved[1])
    if order == "load first":
        other.handles = follow_optimizer(other.optimizer, [other.weight])
    other.step_number = twin.step_number
    other.random.set_state(twin.random.get_state())
    for step in range(20):
        for one in (twin, other):
            if step == 10:
                one.grow()
                one.alone.clear()
            one.step()
        assert torch.equal(twin.weight.values, other.weight.values)
    ages = [t.optimizer.state[t.weight.values]["age"] for t in (twin, other)]
    assert torch.equal(ages[0].view(torch.int16), ages[1].view(torch.int16))
    assert ages[1].element_size() == 2


def test_ages_move_with_connections() -> None:
    """Through reorder and resize, and with empty slots, which have no age."""
    twin = Twin("Adam", torch.float64, capacity=K + 4)
    weight = twin.weight
    changes = [
        weight.reorder,
        lambda: weight.resize(40),
        lambda: weight.resize(K + 1),
        weight.reorder,
    ]
    for change in changes:
        twin.step()
        twin.grow()
        for _ in range(5):
            twin.step()
        change()
        for _ in range(5):
            twin.step()
        assert twin.error() < 1e-12
        age = twin.optimizer.state[twin.weight.values]["age"]
        assert age.numel() == twin.weight.capacity
        assert (age[twin.weight.rows < 0] == -1).all()


def test_a_closure_a_skipped_step_and_a_tensor_rate() -> None:
    """What a step is, is seen by the optimizer's counter."""
    twin = Twin("Adam", torch.float64, lr=torch.tensor(0.01, dtype=torch.float64), foreach=False)
    for _ in range(5):
        twin.step(closure=True)
    twin.grow()
    for _ in range(5):
        twin.step(closure=True)
        twin.weight.values.grad = None
        before = twin.weight.values.detach().clone()
        twin.optimizer.step()  # the pool takes no part
        assert torch.equal(before, twin.weight.values)
    assert twin.error() < 1e-12


def test_a_step_that_a_fused_optimizer_skips_is_none() -> None:
    twin = Twin("Adam", torch.float64, fused=True)
    for _ in range(3):
        twin.step()
    twin.grow()
    twin.step()
    before = twin.weight.values.detach().clone()
    optimizer: Any = twin.optimizer
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    twin.optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert torch.equal(before, twin.weight.values)
    for _ in range(5):
        twin.step()
    assert twin.error() < 1e-12


def test_growth_before_the_first_step_needs_no_age() -> None:
    twin = Twin("Adam", torch.float64)
    twin.grow()
    for _ in range(5):
        twin.step()
    assert twin.error() < 1e-12
    assert "age" not in twin.optimizer.state[twin.weight.values]


class Renamed(optim.Adam):
    """Keeps Adam's step."""


class OwnStep(optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def grown(optimizer: Optimizer, weight: SparseWeight, dormant: Any) -> None:
    weight.values.grad = torch.ones_like(weight.values)
    optimizer.step()
    weight.rewire(torch.tensor([1]), *dormant(weight, 1))


def test_which_optimizers_can(dormant: Any) -> None:
    def pool() -> SparseWeight:
        return SparseLinear(8, 6, connections=K, bias=False).weight

    weight = pool()
    renamed = Renamed(weight.parameters())
    follow_optimizer(renamed, [weight], moments="aged")
    grown(renamed, weight, dormant)
    assert int((renamed.state[weight.values]["age"] == 0).sum()) == 1

    makers: list[tuple[Any, str, bool]] = [
        (OwnStep, "OwnStep has a step\\(\\) of its own", True),
        (lambda p: optim.Adam(p, differentiable=True), "differentiable=True", True),
        (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), "the rule of SGD is not known", False),
        (lambda p: optim.RMSprop(p), "the rule of RMSprop is not known", False),
    ]
    for make, why, warns in makers:
        weight = pool()
        optimizer = make(weight.parameters())
        with pytest.raises(ValueError, match=f"moments='aged' is for Adam.*{why}.*moments='auto'"):
            follow_optimizer(optimizer, [weight], moments="aged")
        follow_optimizer(optimizer, [weight])
        if why == "differentiable=True":
            continue
        if warns:
            with pytest.warns(UserWarning, match=f"{why}.*moments='cleared'"):
                grown(optimizer, weight, dormant)
        grown(optimizer, weight, dormant)
        assert "age" not in optimizer.state[weight.values]

    weight = pool()
    adam = optim.Adam(weight.parameters())
    follow_optimizer(adam, [weight], moments="cleared")
    grown(adam, weight, dormant)
    assert "age" not in adam.state[weight.values]
    with pytest.raises(ValueError, match="moments must be 'auto', 'aged' or 'cleared', not 'none'"):
        follow_optimizer(adam, [weight], moments="none")  # type: ignore[arg-type]


def test_hooks_end_with_the_last_handle() -> None:
    twin = Twin("Adam")
    more = follow_optimizer(twin.optimizer, [twin.weight])
    assert len(twin.optimizer._optimizer_step_post_hooks) == 1
    twin.handles[0].remove()
    assert len(twin.optimizer._optimizer_step_post_hooks) == 1
    more[0].remove()
    assert not twin.optimizer._optimizer_step_post_hooks
    assert not twin.optimizer._optimizer_step_pre_hooks
