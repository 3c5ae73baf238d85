"""What the method tests share: small models of every layer type, a training loop, exact
snapshots.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rewire import methods
from rewire.nn import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseGRU,
    SparseLinear,
    SparseLSTM,
    SparseMultiheadAttention,
    SparseRNN,
    sparse_weights,
)

Build = Callable[[torch.dtype, int], nn.Module]


def linear(dtype: torch.dtype, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    return nn.Sequential(
        SparseLinear(12, 16, connections=40, generator=g, dtype=dtype),
        nn.ReLU(),
        SparseLinear(16, 6, connections=30, bias=False, generator=g, dtype=dtype),
    )


def conv(dtype: torch.dtype, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (2, 6)),
        SparseConv1d(2, 4, 3, padding=1, connections=16, generator=g, dtype=dtype),
        nn.ReLU(),
        nn.Unflatten(2, (2, 3)),
        SparseConv2d(
            4,
            6,
            (1, 3),
            padding=(0, 1),
            stride=(1, 2),
            groups=2,
            connections=24,
            generator=g,
            dtype=dtype,
        ),
        nn.ReLU(),
        nn.Unflatten(2, (1, 2)),
        SparseConv3d(6, 6, (1, 2, 2), connections=40, bias=False, generator=g, dtype=dtype),
        nn.Flatten(),
    )


class Sequence(nn.Module):
    """Reads (batch, 12) as a sequence of 3 positions with 4 features each, and sums what comes out
    over them.
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 4)
        y = (
            self.body(x, x, x)
            if isinstance(self.body, (SparseMultiheadAttention, nn.MultiheadAttention))
            else self.body(x)
        )
        out: Tensor = self.head(y[0].sum(1))
        return out


def rnn(dtype: torch.dtype, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    body = SparseRNN(
        4, 8, bidirectional=True, batch_first=True, density=0.3, generator=g, dtype=dtype
    )
    return Sequence(body, SparseLinear(16, 6, connections=30, generator=g, dtype=dtype))


def lstm(dtype: torch.dtype, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    body = SparseLSTM(4, 8, proj_size=6, batch_first=True, density=0.2, generator=g, dtype=dtype)
    return Sequence(body, nn.Identity())


def gru(dtype: torch.dtype, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    return Sequence(
        SparseGRU(4, 6, batch_first=True, density=0.2, generator=g, dtype=dtype), nn.Identity()
    )


def attention(dtype: torch.dtype, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    body = SparseMultiheadAttention(
        4, 2, batch_first=True, connections=40, generator=g, dtype=dtype
    )
    return Sequence(body, SparseLinear(4, 6, connections=12, generator=g, dtype=dtype))


#: Layer types that exist: each builds a small model that maps (batch, 12) to (batch, 6).
LAYERS: dict[str, Build] = {
    "linear": linear,
    "conv": conv,
    "rnn": rnn,
    "lstm": lstm,
    "gru": gru,
    "attention": attention,
}

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
}

#: Settings under which each method is tested besides its defaults; a newly registered method needs
#: no entry.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "deep-r": [
        {},
        {"l1": 1e-3, "noise": 0.05, "signs": "redrawn"},
        {"l1": 1e-2, "noise": 0.1, "scope": "network"},
        {"l1": 1e-2, "noise": 0.1, "scope": "network", "allotment": "authors", "signs": "redrawn"},
        {"l1": 1e-3, "temperature": 1e-3, "scope": "neuron"},
        {"l1": 1e-3, "noise": 0.05, "every": 3},
        {"l1": {"*": 1e-2}, "temperature": "tied", "signs": "neuron"},
        {"l1": 1e-3, "noise": 0.05, "moments": "dense"},
    ],
    "l1": [{"l1": 0.1}, {"l1": 0.05, "every_epochs": 1}],
    "magnitude": [
        {"density": 0.1, "distribution": "uniform", "cycles": 2, "every_epochs": 1},
        {
            "density": 0.1,
            "distribution": "uniform",
            "cycles": 2,
            "every_epochs": 1,
            "scope": "network",
        },
        {"quality": 0.4, "cycles": 2, "every_epochs": 1},
    ],
    "one-shot": [
        {"density": 0.1, "distribution": "uniform", "after": 1},
        {"density": 0.1, "after": 5, "scope": "network"},
    ],
    "dsr": [{"every": 2, "magnitude": 0.05, "fraction": 0.2}],
    "gmp": [{"density": 0.1, "distribution": "uniform", "every": 2, "until": 7}],
    "granet": [
        {"density": 0.1, "every": 2, "begin": 1, "until": 7},
        {
            "density": 0.1,
            "distribution": "uniform",
            "every": 2,
            "until": 7,
            "candidates": 5,
            "scope": "layer",
        },
    ],
    "itop": [{"every": 2}, {"every": 3, "growth": "random"}],
    "mest": [{"every_epochs": 1}, {"every_epochs": 1, "soft": True, "milestones": (1, 2)}],
    "rigl": [
        {"every": 2},
        {"every": 3, "until": 9, "regrown": "keep", "skip_step": False, "candidates": 7},
    ],
    "snfs": [
        {"window": 2},
        {"every": 3, "candidates": 6},
        {"exact": True, "every_epochs": 1, "until_epochs": 2},
    ],
    "srigl": [{"every": 2, "fraction": 0.5}, {"every": 3, "gamma": 0.6, "candidates": 7}],
    "set": [{}, {"new_values": "normal", "every": 2, "fraction": 0.5}],
    "top-kast": [{"every": 3, "explore": 0.5}, {"every": 2, "l2": 0.01, "until": 6}],
    "snip": [
        {"density": 0.1},
        {"density": 0.1, "distribution": "uniform", "batches": 4, "scope": "layer"},
    ],
    "soft-deep-r": [
        {},
        {"l1": 1e-2, "noise": 0.1, "p_min": 0.3},
        {
            "l1": 1e-2,
            "temperature": "tied",
            "theta_min": -0.02,
            "boundary": "reflect",
            "start": "authors",
        },
    ],
    "copaset": [{"samples": 9, "activations": "post", "output_layer": True, "mode": "train"}],
    "corset": [{"every": 2}],
    "copacorset": [{"candidates": 3, "output_layer": True}],
    "ctre": [{}, {"variant": "seq", "patience": 1, "fraction": 0.5, "samples": 9}],
}

#: Methods that move budget between layers: it is exact in total.
SHARING = {"dsr", "snfs"}

#: Methods that start from a dense model have models and a conformance suite of their own.
SETTINGS |= {  # methods that come down to a budget and have no entry of their own
    name: [{"density": 0.1, **({"every": 2, "until": 7} if "until" in info.parameters() else {})}]
    for name in methods.available()
    if (info := methods.info(name)).takes_budget and name not in SETTINGS
}

CASES = [
    (name, settings)
    for name in methods.available()
    if not methods.info(name).cls.starts_dense
    for settings in SETTINGS.get(name, [{}])
]


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    return case[0] + "".join(f"-{k}={v}" for k, v in case[1].items())


class Run:
    """A model in training: ``steps_per_epoch`` steps make an epoch; data depend on the step
    alone.
    """

    steps_per_epoch = 4

    def __init__(
        self,
        case: tuple[str, dict[str, Any]],
        layer: str = "linear",
        optimizer: str = "sgd",
        dtype: torch.dtype = torch.float32,
        seed: int = 3,
        method_seed: int = 7,
    ) -> None:
        self.model = LAYERS[layer](dtype, seed)
        self.dtype, self.case = dtype, case
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.method = self.make(method_seed)
        self.time = 0

    def make(self, seed: int) -> methods.Method:
        """Another method for the same model, with training data if it looks at activations."""
        name, settings = self.case
        data = {"data": self.data()} if methods.info(name).takes_data else {}
        return methods.create(name, self.model, self.optimizer, seed=seed, **data, **settings)

    def data(self) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(17)
        x = torch.randn(20, 12, generator=g, dtype=self.dtype)
        return list(zip(x.split(8), torch.randint(0, 6, (20,), generator=g).split(8), strict=True))

    def score(self, model: nn.Module) -> float:
        """Accuracy on the training data, for methods that turn by it."""
        with torch.no_grad():
            return sum(float((model(x).argmax(1) == y).sum()) for x, y in self.data())

    def weights(self) -> dict[str, Any]:
        return dict(sparse_weights(self.model))

    def backward(self) -> None:
        g = torch.Generator().manual_seed(1000 + self.time)
        x = torch.randn(8, 12, generator=g, dtype=self.dtype)
        y = torch.randint(0, 6, (8,), generator=g)
        loss = nn.functional.cross_entropy(self.model(x), y) + self.method.penalty()
        self.optimizer.zero_grad()
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.method.step()
        self.time += 1
        if self.time % self.steps_per_epoch == 0:
            self.method.end_epoch(self.score)

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that must come out bit-identical."""
        found = {f"model.{k}": v.clone() for k, v in self.model.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {
                f"optimizer.{i}.{k}": v.clone() for k, v in state.items() if isinstance(v, Tensor)
            }
        return found


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        # Bits, not values: -0.0 and 0.0 differ, NaN equals itself.
        assert a[key].numpy().tobytes() == b[key].numpy().tobytes(), key


def check_resume(
    begin: Callable[..., Any],
    stop: int,
    steps: int,
    *,
    model_first: bool,
    remake: bool = False,
    load: Callable[[nn.Module, dict[str, Tensor]], object] = nn.Module.load_state_dict,
) -> tuple[Any, Any]:
    """A run that is saved after ``stop`` of ``steps`` and goes on elsewhere is bit-identical to one
    that was not.

    ``begin`` starts one, of other weights and seeds if given ``seed`` and ``method_seed``. ``load``
    restores a model that is loaded before the method's state; ``remake`` makes the method anew
    between them. Returns both runs.
    """
    whole, first = begin(), begin()
    for _ in range(steps):
        whole.step()
    for _ in range(stop):
        first.step()
    saved = copy.deepcopy(
        [first.model.state_dict(), first.optimizer.state_dict(), first.method.state_dict()]
    )
    second = begin(seed=99, method_seed=1234)
    if model_first:
        load(second.model, saved[0])
        second.optimizer.load_state_dict(saved[1])
        if remake:
            second.method = second.make(5)
        second.method.load_state_dict(saved[2])
    else:
        second.method.load_state_dict(saved[2])
        second.optimizer.load_state_dict(saved[1])
        second.model.load_state_dict(saved[0])
    second.time = stop
    for _ in range(steps - stop):
        second.step()
    assert_identical(whole.snapshot(), second.snapshot())
    assert whole.method.stats() == second.method.stats()
    return whole, second


def assert_plain(value: object) -> None:
    """Tensors, numbers, strings, dicts and lists only: what any file format can hold."""
    if isinstance(value, dict):
        assert all(isinstance(k, str) for k in value)
        for v in value.values():
            assert_plain(v)
    elif isinstance(value, list):
        for v in value:
            assert_plain(v)
    else:
        assert isinstance(value, (Tensor, int, float, str, bool, type(None))), value
