"""P5, P6, P7, P12: what a method costs over training, and whole steps of small networks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire import methods
from rewire.app.bench.contenders import Layer, Linear, make
from rewire.app.bench.curves import Setting
from rewire.app.bench.networks import MaskedLinear, mlp
from rewire.app.bench.timing import Contender, Timings, quartiles, timed
from rewire.app.bench.verdict import Figure, Measured, at_least, at_most, info
from rewire.nn import SparseLinear

__all__ = ["deep_r_share", "lenet", "small", "update_share"]

#: The authors' setting of DEEP R on MNIST: 3552 connections of 266,200, that is 1.33 %.
LENET, LENET_DENSITIES = (784, 300, 100, 10), (0.01, 0.03, 0.3)

#: Batches of the data that LeNet-300-100 trains on.
BATCHES = 200

#: The CosineSET methods that P6 measures: without and with a random choice.
COSINE = ("codacorset", "copacorset")
#: Rows of data that similarities come from in P6, which allows 1,000.
SIMILARITY_ROWS = 128


def _layer(case: Layer) -> tuple[SparseLinear, Tensor, Tensor]:
    """A layer without bias, with x and gradient feature-major: the fastest step there is."""
    problem = Linear(case)
    layer = SparseLinear.from_weight(problem.weight)
    x, g = (t.t().contiguous().t() for t in (problem.x, problem.g))
    return layer, x, g


def _train(layer: nn.Module, x: Tensor, g: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(x).backward(g)
    optimizer.step()


def deep_r_share(
    setting: Setting,
    size: int = 4096,
    connections: int = 1_000_000,
    batch: int = 128,
    flips: Sequence[float] = (0.001, 0.01),
    targets: tuple[float, float] = (15.0, 35.0),
) -> Measured:
    """P5: time of `method.step()` over that of forward, backward and `optimizer.step()`, without
    and with noise.

    The share that flips is held by construction: learning rate times l1 is 1e-6, everything else
    that moves a weight is far below, and weights are 0 (they flip) or at least 0.5. A connection
    grows at 0, so it flips in the next step.
    """
    figures = []
    for noise, target in zip((0.0, 1e4), targets, strict=True):
        for share in flips:
            layer, x, g = _layer(Layer(size, size, connections, batch))
            x.requires_grad_()
            values, flipping = layer.weight.values, max(1, round(share * connections))
            optimizer = torch.optim.SGD(layer.parameters(), lr=1e-12)
            with torch.no_grad():
                values.copy_(torch.where(values < 0, -1.0, 1.0) * (0.5 + torch.rand_like(values)))
                values[torch.randperm(connections)[:flipping]] = 0.0
            method = methods.DeepR(layer, optimizer, l1=1e6, noise=noise, seed=0)
            base: list[float] = []
            step: list[float] = []
            for _ in range(3):
                _train(layer, x, g, optimizer)
                method.step()
            before, start = method.stats()["dropped"], time.perf_counter()
            while (
                len(base) < 3 * setting.rounds or time.perf_counter() - start < setting.seconds / 2
            ):
                x.grad = None
                base.append(timed(setting.clock, lambda: _train(layer, x, g, optimizer)))  # noqa: B023  # called at once
                step.append(timed(setting.clock, method.step))
            dropped = sum(method.stats()["dropped"].values()) - sum(before.values())
            seen = dropped / len(base) / connections
            note = (
                f"{seen:.2%} flipped a step, "
                f"{1e3 * quartiles(step)[1]:.3g} / "
                f"{1e3 * quartiles(base)[1]:.3g} ms"
            )
            kind = "with noise" if noise else "T = 0"
            name = f"{kind}, {share:.1%} flipping"
            percent = Timings({"method": [100 * s for s in step], "training": base}).ratio(
                "method", "training"
            )
            figures.append(at_most(name, percent, target, "%", note))
            method.finalize()
    return figures, {}


def update_share(
    setting: Setting,
    size: int = 4096,
    batch: int = 128,
    densities: Sequence[float] = (0.10, 0.05, 0.01),
    epoch: int = 391,
) -> Measured:
    """P6: share of training time that updates take, in epochs of 391 steps (CIFAR-10)."""
    figures = []
    for density in densities:
        case = Layer.of(size, size, density, batch)
        figures.append(_per_epoch("set", 10.0, case, epoch, setting))
        figures.append(_per_steps("rigl", 10.0 if density >= 0.05 else 25.0, case, setting))
        figures += [
            _per_epoch(name, 10.0, case, epoch, setting, rows=SIMILARITY_ROWS) for name in COSINE
        ]
        # similarities from all rows of an epoch, as the authors compute them: no target
        rows = {"rows": 16 * batch, "of": epoch * batch}
        figures.append(_per_epoch("codacorset", None, case, epoch, setting, **rows))
    return figures, {}


def _prepared(
    name: str, case: Layer, rows: int | None = None
) -> tuple[methods.Method, Callable[[], None]]:
    """A method and a training step; ``rows`` of data are for methods that look at them."""
    layer, x, g = _layer(case)
    x.requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4, momentum=0.9, fused=True)
    data = {} if rows is None else {"data": [torch.randn(rows, case.inputs)]}
    method = methods.create(name, layer, optimizer, seed=0, **data)

    def train() -> None:
        x.grad = None
        _train(layer, x, g, optimizer)

    return method, train


def _per_epoch(
    name: str,
    target: float | None,
    case: Layer,
    epoch: int,
    setting: Setting,
    rows: int | None = None,
    of: int | None = None,
) -> Figure:
    """A method that rewires after an epoch, of which only some steps are made.

    It looks at ``rows`` of data; with ``of`` its time is scaled to that many rows.
    """
    method, train = _prepared(name, case, rows)
    steps: list[float] = []
    updates: list[float] = []
    for _ in range(max(3, setting.rounds // 2)):
        steps.extend(timed(setting.clock, train, method.step) for _ in range(5))
        updates.append(timed(setting.clock, method.end_epoch))
    method.finalize()
    step, update = quartiles(steps)[1], quartiles(updates)[1]
    where = "" if rows is None else f", {rows} rows"
    if rows is not None and of is not None:
        where, update = f", {of} rows (from {rows})", update * of / rows
    note = f"{1e3 * update:.3g} ms after {epoch} steps of {1e3 * step:.3g} ms"
    share = 100 * update / (update + epoch * step)
    name = f"{name}, {case.density:.0%}, every epoch{where}"
    return (
        info(name, share, "%", note) if target is None else at_most(name, share, target, "%", note)
    )


def _per_steps(name: str, target: float, case: Layer, setting: Setting) -> Figure:
    """A method that rewires within an epoch, by its own default frequency: windows of 100 steps."""
    method, train = _prepared(name, case)
    shares: list[float] = []
    for _ in range(1 if setting.quick else 3):
        training = acting = 0.0
        for _ in range(100):
            training += timed(setting.clock, train)
            acting += timed(setting.clock, method.step)
        shares.append(100 * acting / (training + acting))
    updates = method.stats()["updates"]
    method.finalize()
    note = f"{updates} updates in {100 * len(shares)} steps"
    return at_most(f"{name}, {case.density:.0%}", quartiles(shares)[1], target, "%", note)


def _classifier(
    model: nn.Module, batch: int, deep_r: bool, threads: int | None = None
) -> Callable[[], None]:
    """A whole training step: forward, cross-entropy, backward, SGD, and DEEP R.

    The data can be learned but not memorised: noisy pictures of ten prototypes, a tenth with a
    random label. On one batch again and again the loss would vanish, and with nothing to hold them
    all connections shrink and flip; here about as many flip as in the authors' run on MNIST (30 a
    step).
    """
    generator = torch.Generator().manual_seed(1)
    classes, shape = LENET[-1], (BATCHES, batch)
    y = torch.randint(0, classes, shape, generator=generator)
    prototypes = torch.rand(classes, LENET[0], generator=generator).round()
    x = (prototypes[y] + 2 * torch.rand(*shape, LENET[0], generator=generator)) / 3
    y = torch.where(
        torch.rand(shape, generator=generator) < 0.1,
        torch.randint(0, classes, shape, generator=generator),
        y,
    )
    batches = itertools.cycle(list(zip(x.unbind(), y.unbind(), strict=True)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = methods.DeepR(model, optimizer, l1=1e-5, noise=1e-5, seed=0) if deep_r else None

    def run() -> None:
        inputs, labels = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        if method is not None:
            method.step()

    return run


def _steps(batch: int) -> list[Contender]:
    def masked(inputs: int, outputs: int, number: int) -> nn.Module:
        return MaskedLinear(inputs, outputs, LENET_DENSITIES[number])

    def sparse(inputs: int, outputs: int, number: int) -> nn.Module:
        return SparseLinear(inputs, outputs, bias=False, density=LENET_DENSITIES[number])

    return [
        Contender("masked dense", _classifier(mlp(LENET, masked), batch, deep_r=False)),
        Contender("rewire with DEEP R", _classifier(mlp(LENET, sparse), batch, deep_r=True)),
        Contender("rewire, fixed", _classifier(mlp(LENET, sparse), batch, deep_r=False)),
    ]


def _whole_step(setting: Setting, batch: int, target: float) -> list[Figure]:
    timings = setting.contest(_steps(batch))
    us = {name: f"{1e6 * timings.median(name):.0f}" for name in timings.seconds}
    dense, fixed, ours = "masked dense", "rewire, fixed", "rewire with DEEP R"
    name, note = f"LeNet-300-100, batch {batch}", f"{us[dense]} / {us[ours]} us"
    speedup = timings.ratio(dense, ours)
    return [
        at_least(f"{name}, masked dense over rewire with DEEP R", speedup, target, note=note),
        info(f"{name}, without a method", timings.ratio(dense, fixed), note=f"{us[fixed]} us"),
    ]


def lenet(setting: Setting, batch: int = 128, target: float = 3.0) -> Measured:
    """P7: a whole step with DEEP R against the masked dense step (which has no DEEP R)."""
    return _whole_step(setting, batch, target), {}


def small(setting: Setting, batch: int = 10, targets: tuple[float, float] = (1.0, 1.2)) -> Measured:
    """P12: the same at batch 10, and forward + backward of an 8 x 8 layer on one thread."""
    figures = _whole_step(setting, batch, targets[0])
    problem = Linear(Layer(8, 8, 16, 8))
    kinds = ("dense", "masked", "rewire")
    timings = setting.contest([make(kind, problem, threads=1) for kind in kinds])
    us = {kind: f"{1e6 * timings.median(kind):.1f}" for kind in kinds}
    note = f"{us['rewire']} / {us['dense']} us, masked {us['masked']}"
    name = "8 x 8 layer, batch 8, forward + backward, one thread, over nn.Linear"
    ratio = timings.ratio("rewire", "dense")
    return [*figures, at_most(name, ratio, targets[1], "x", note)], {}
