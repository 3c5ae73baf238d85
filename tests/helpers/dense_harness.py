"""What the tests of methods that start dense share: small dense models, a training loop, exact
snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rewire import methods


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 6))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 8, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 12),
        nn.ReLU(),
        nn.Linear(12, 6),
    )


class Recurrent(nn.Module):
    """Reads (batch, 12) as three positions with four features, and classifies the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.middle, self.head = (
            nn.LSTM(4, 10, batch_first=True),
            nn.Linear(10, 8),
            nn.Linear(8, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.body(x.view(-1, 3, 4))[0][:, -1]).relu())
        return out


#: Each builds a small dense model that maps (batch, 12) to (batch, 6).
MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "lstm": Recurrent}

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
}

#: Settings under which each method is tested; one without an entry runs with its defaults.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "differentiable": [{}, {"initial": 0.9, "strength": 0.05}],
    "halo": [{"density": 1.0}, {"density": 0.3}, {"density": 0.3, "after_epochs": 2}],
    "noiseout": [  # the threshold is always met, so that units are merged
        {"required_score": -100.0, "at_once": 2},
        {
            "required_score": -100.0,
            "at_once": 1,
            "every": 3,
            "targets": "binomial",
            "criterion": "damage",
            "samples": None,
        },
        {"targets": "none", "at_once": 3, "slack": 5.0, "warmup": 1},
    ],
    "ternary": [{"after_epochs": 1}],
}


def cuts_at_the_end(name: str, settings: dict[str, Any]) -> bool:
    """Whether `finalize` is itself the cut, so that outputs change in it (unless all stays:
    density=1).
    """
    return name == "halo" and "after_epochs" not in settings and settings.get("density") != 1.0


CASES = [
    (name, settings)
    for name in methods.available()
    if methods.info(name).cls.starts_dense
    for settings in SETTINGS.get(name, [{}])
]

DATA = [
    (torch.randn(16, 12, generator=torch.Generator().manual_seed(i)), torch.zeros(16))
    for i in range(3)
]


@torch.no_grad()
def score(model: nn.Module) -> float:
    """Larger is better: minus the cross-entropy on fixed data."""
    mode = model.training
    g = torch.Generator().manual_seed(77)
    x, y = torch.randn(64, 12, generator=g), torch.randint(0, 6, (64,), generator=g)
    value = -float(nn.functional.cross_entropy(model.eval()(x), y))
    model.train(mode)
    return value


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    return case[0] + "".join(f"-{k}={v}" for k, v in case[1].items())


class DenseRun:
    """A dense model in training: ``steps_per_epoch`` steps make an epoch; data depend on the step
    alone.
    """

    steps_per_epoch = 4

    def __init__(
        self,
        case: tuple[str, dict[str, Any]],
        model: str = "mlp",
        optimizer: str = "adam",
        seed: int = 3,
        method_seed: int = 7,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.case = MODELS[model](), case
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.method = self.make(method_seed)
        self.time = 0

    def make(self, seed: int) -> methods.Method:
        """A method for this model and optimizer."""
        entry = methods.info(self.case[0])
        services = {"data": DATA} if entry.takes_data else {}
        services |= {"evaluate": score} if "evaluate" in entry.services else {}
        return methods.create(
            self.case[0], self.model, self.optimizer, seed=seed, **services, **self.case[1]
        )

    def batch(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1000 + self.time)
        return torch.randn(8, 12, generator=g), torch.randint(0, 6, (8,), generator=g)

    def backward(self) -> None:
        x, y = self.batch()
        loss = nn.functional.cross_entropy(self.model(x), y) + self.method.penalty()
        self.optimizer.zero_grad()
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.method.step()
        self.time += 1
        if self.time % self.steps_per_epoch == 0:
            self.method.end_epoch(score)

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that must come out bit-identical."""
        found = {f"model.{k}": v.clone() for k, v in self.model.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {
                f"optimizer.{i}.{k}": v.clone() for k, v in state.items() if isinstance(v, Tensor)
            }
        return found
