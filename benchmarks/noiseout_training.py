"""The networks of `noiseout.py`, and how they train: shifts of images, rates by progress, means of
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

#: Images and their labels.
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stage:
    """How a network, or a part of it, is pruned.

    The rate falls from ``lr`` to ``lr_end`` over ``cycle`` epochs; a check that merges takes
    ``back`` of that way back. The stage ends at the lowest rate, or after ``most`` epochs.
    ``every``: steps between checks; ``before``: epochs without checks; ``shift``: pixels (of maps
    behind the first pooling: theirs) that the input moves by at most; ``average``: share of the
    steps since the last check whose weights a check sees the mean of.
    """

    cycle: float
    back: float
    most: int
    lr: float
    lr_end: float = 1e-4
    before: int = 0
    batch: int = 200
    every: int = 125
    shift: int = 0
    average: float = 0.5
    dropout: float = 0.0
    overshoot: str = "train"


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Sequential:
    """The first convolution, and all behind it; pooling comes before ReLU, which is the same and
    takes less time.
    """
    first = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU()
    )
    rest = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(1152, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    return nn.Sequential(first, rest).to(memory_format=torch.channels_last)


class Shifts:
    """Moves each image of a batch by up to ``most`` pixels along each axis (MNIST's borders are
    empty).
    """

    def __init__(self, most: int, generator: torch.Generator) -> None:
        pixels = torch.arange(784).view(28, 28)
        moves = range(-most, most + 1)
        self._tables = torch.stack(
            [pixels.roll((a, b), (0, 1)).flatten() for a in moves for b in moves]
        )
        self._most, self._generator = most, generator

    def __call__(self, x: Tensor) -> Tensor:
        if self._most == 0:
            return x
        if (
            x.dim() == 4
            # maps behind the first pooling: one of their pixels is two of the image's, a quarter at
            # a time
        ):
            return torch.cat([part.roll(self._draw(1, 2), (1, 2)) for part in x.chunk(4)])
        return x.gather(
            1, self._tables[torch.randint(len(self._tables), (len(x),), generator=self._generator)]
        )

    def _draw(self, most: int, count: int) -> list[int]:
        return torch.randint(-most, most + 1, (count,), generator=self._generator).tolist()


@torch.no_grad()
def error(model: nn.Sequential, x: Tensor, y: Tensor, half: bool = False) -> float:
    """Percent of images that are classified wrongly."""
    training = model.training
    model.eval()
    parts = zip(x.split(2000), y.split(2000), strict=True)
    wrong = sum(int((outputs(model, a, half).argmax(1) != b).sum()) for a, b in parts)
    model.train(training)
    return 100 * wrong / len(y)


def base(seed: int, epochs: int, train: Split, cache: Path | None) -> nn.Sequential:
    """lenet-5, trained in bfloat16 on images shifted by up to two pixels (the last epoch: not
    shifted).
    """
    torch.manual_seed(seed)
    model = lenet_5()
    file = None if cache is None else cache / f"lenet-5-{epochs}-{seed}.pt"
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    x, y = train
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = len(y) // 100 * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.15
    )
    generator = torch.Generator().manual_seed(seed)
    shifts, still = Shifts(2, generator), Shifts(0, generator)
    for epoch in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(100):
            with torch.autocast("cpu", torch.bfloat16):
                out = model((shifts if epoch < epochs - 1 else still)(x[index]))
            optimizer.zero_grad()
            nn.functional.cross_entropy(out.float(), y[index]).backward()
            optimizer.step()
            schedule.step()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model


@torch.no_grad()
def through(model: nn.Module, x: Tensor) -> Tensor:
    """What the first convolution makes of the images, (images, rows, columns, channels), in
    bfloat16.
    """
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model(part).permute(0, 2, 3, 1).bfloat16() for part in x.split(1000)])


def seen(x: Tensor) -> Tensor:
    """Images as they are, maps as convolutions take them."""
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


class Anneal:
    """The learning rate by progress: ``at`` goes from 0 to 1 over a cycle, and back a bit when
    units were merged.
    """

    def __init__(self, stage: Stage, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.stage, self.at = stage, 0.0
        self._optimizer, self._step, self._merges = optimizer, 1 / (stage.cycle * steps), 0

    def step(self, merges: int) -> None:
        """After a step; how many units were merged so far."""
        self.at = (
            self.at + self._step if merges == self._merges else max(0.0, self.at - self.stage.back)
        )
        self._merges = merges
        for group in self._optimizer.param_groups:
            group["lr"] = self.stage.lr * (self.stage.lr_end / self.stage.lr) ** min(1.0, self.at)


class Average:
    """Before every check the weights become their mean over the last steps, and training goes on
    from there.

    So a check sees about the network that a lower rate would have led to, while the rate stays
    high.
    """

    def __init__(self, stage: Stage, model: nn.Module) -> None:
        self._every, self._window = stage.every, max(1, round(stage.average * stage.every))
        self._weights = list(model.parameters())
        self._sums: list[Tensor] = []
        self._at = 0

    @torch.no_grad()
    def step(self) -> None:
        """After the optimizer's step, before the method's."""
        self._at += 1
        left = (self._every - self._at % self._every) % self._every
        if self._window == 1 or left >= self._window:
            return
        if not self._sums:
            self._sums = [torch.zeros_like(w) for w in self._weights]
        torch._foreach_add_(self._sums, self._weights)
        if not left:
            torch._foreach_div_(self._sums, self._window)
            torch._foreach_copy_(self._weights, self._sums)
            self._sums = []


def outputs(model: nn.Sequential, x: Tensor, half: bool) -> Tensor:
    """What the network says of images or maps; with ``half`` all before the dense layers is done in
    bfloat16.
    """
    if not half:
        return model(x)
    with torch.autocast("cpu", torch.bfloat16):
        x = model[:5](x)
    return model[5:](x.float())
