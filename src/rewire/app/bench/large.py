"""The tasks of `rewire.app.bench.child`: memory in training, large layers and networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire import methods, topology
from rewire.app.bench.contenders import Layer, Linear, make
from rewire.app.bench.timing import Clock, quartiles
from rewire.app.resident import Memory, trim
from rewire.nn import SparseLinear, SparseWeight

__all__ = ["contender_memory", "million", "point", "training_memory", "wide_epoch"]


def _optimizer(kind: str, parameters: Any) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=1e-4, fused=True)
    return torch.optim.SGD(
        parameters, lr=1e-4, momentum=0.9 if kind == "momentum" else 0.0, fused=True
    )


def _layer(size: int, connections: int) -> SparseLinear:
    generator = torch.Generator().manual_seed(0)
    return SparseLinear(size, size, bias=False, connections=connections, generator=generator)


def _pair(size: int, batch: int) -> tuple[Tensor, Tensor]:
    """x, whose gradient is wanted, and the gradient of the output; both feature-major."""
    return torch.randn(size, batch).t().requires_grad_(), torch.randn(size, batch).t()


def _step_of(
    layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, g: Tensor
) -> Callable[[], None]:
    """A training step, with the gradient of x."""

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        layer(x).backward(g)
        optimizer.step()

    return step


def _warm(kind: str = "rewire") -> None:
    """Have all code loaded that the measurement will use: its pages are memory as well."""
    make(kind, Linear(Layer(64, 64, 500, 8))).run()
    x, g = _pair(64, 8)
    for name in ("sgd", "momentum", "adam"):
        layer = SparseLinear(64, 64, bias=False, connections=500)
        optimizer = _optimizer(name, layer.parameters())
        for make_method in (methods.SET, methods.DeepR):
            method = make_method(layer, optimizer)
            layer(x).backward(g)
            optimizer.step()
            method.step()
            method.end_epoch()
            method.finalize()
        layer.weight.reorder()


def training_memory(
    memory: Memory, clock: Clock, *, optimizer: str, size: int, connections: int, batch: int
) -> dict[str, Any]:
    """Peaks of training a layer, over the process with x and gradient but without it; and of what
    changes its index.

    Everything that grows with the batch (x, its gradient, the output) is in ``activations`` and not
    in ``training``.
    """
    _warm()
    trim()
    x, g = _pair(size, batch)
    base = memory.now()
    memory.reset()
    layer = _layer(size, connections)
    built = memory.peak() - base
    trainer = _optimizer(optimizer, layer.parameters())
    step = _step_of(layer, trainer, x, g)
    step()
    step()
    training = memory.peak_of(step, base)
    activations = 4 * batch * size * 2  # output and gradient of x
    weight = layer.weight
    trim()
    resting = memory.now()
    rebuild = memory.peak_of(
        lambda: topology.build_index(
            weight.rows, weight.cols, *weight.matrix_shape, out=weight.index
        ),
        resting,
    )
    reorder = memory.peak_of(weight.reorder, resting)
    evolution = methods.SET(layer, trainer, seed=0)
    step()
    trim()
    resting = memory.now()
    update = memory.peak_of(evolution.end_epoch, resting)
    evolution.finalize()
    result = {
        "built": built,
        "training": training - activations,
        "rebuild": rebuild,
        "reorder": reorder,
        "set": update,
    }
    if optimizer == "sgd":
        walk = methods.DeepR(layer, trainer, seed=0)
        step()
        trim()
        result["deep_r"] = memory.peak_of(walk.step, memory.now())
    return {"connections": connections, "activations": activations} | result


def contender_memory(
    memory: Memory,
    clock: Clock,
    *,
    kind: str,
    inputs: int,
    outputs: int,
    connections: int,
    batch: int,
) -> dict[str, Any]:
    """Peak of forward + backward of one way to compute a layer, over the process without its
    weight.

    Weight, gradient, everything kept and all temporaries count, x and the output's gradient do not.
    """
    _warm(kind)
    trim()
    base = memory.now()
    # keeps what it needs of the problem
    contender = make(kind, Linear(Layer(inputs, outputs, connections, batch)))
    trim()
    contender.run()
    peak = memory.peak_of(contender.run, base)
    return {"kind": kind, "bytes": max(0, peak - 4 * batch * (inputs + outputs))}


def point(
    memory: Memory,
    clock: Clock,
    *,
    size: int,
    connections: int,
    batch: int,
    steps: int,
    seconds: float,
) -> dict[str, Any]:
    """Build a size x size layer, train it with SGD, and measure time and memory of a step."""
    _warm()
    trim()
    base = memory.now()
    memory.reset()
    start = clock()
    layer = _layer(size, connections)
    build = clock() - start
    built = memory.peak() - base
    x, g = _pair(size, batch)
    step = _step_of(layer, torch.optim.SGD(layer.parameters(), lr=1e-4, fused=True), x, g)
    step()
    trim()
    memory.reset()
    took: list[float] = []
    start = clock()
    while len(took) < steps or (clock() - start < seconds and len(took) < 200):
        before = clock()
        step()
        took.append(clock() - before)
    low, middle, high = quartiles(took)
    return {
        "connections": connections,
        "seconds": middle,
        "low": low,
        "high": high,
        "best": min(took),
        "steps": len(took),
        "build_seconds": build,
        "build_bytes": built,
        "bytes": memory.peak() - base,
    }


def million(
    memory: Memory,
    clock: Clock,
    *,
    size: int,
    connections: int,
    batch: int,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """P11: build, steps with SGD and DEEP R rewiring; and how fast rows of x can be read at random,
    side by side.

    The ceiling is `embedding_bag` over the layer's own topology: it reads one row of the (features,
    batch) array per connection, adds up, and does nothing else; torch's kernel for it prefetches. A
    step reads a row per connection three times (forward, and both gradients), so its ceiling is
    three such passes.
    """
    memory.reset()
    start = clock()
    layer = _layer(size, connections)
    # about 1 % of connections flip a step
    optimizer = torch.optim.SGD(layer.parameters(), lr=3e-6, fused=True)
    method = methods.DeepR(layer, optimizer, l1=1e-4, noise=1e-3, seed=0)
    build = clock() - start
    x, g = _pair(size, batch)
    passes: list[float] = []
    rewiring: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        x.grad = None
        start = clock()
        layer(x).backward(g)
        passes.append(clock() - start)
        optimizer.step()
        start = clock()
        method.step()
        rewiring.append(clock() - start)
    peak = memory.total()
    rewired = sum(method.stats()["dropped"].values())
    method.finalize()
    x.grad = None
    optimizer.zero_grad()

    table = x.detach().t()  # (features, batch), contiguous
    by_row, by_col = (
        (layer.weight.index.row_cols, layer.weight.index.row_ptr[:-1]),
        (layer.weight.index.col_rows, layer.weight.index.col_ptr[:-1]),
    )
    gradient = g.t()
    ratios: list[float] = []
    ceiling: list[float] = []
    both: list[float] = []
    for _ in range(rounds):
        x.grad = None
        start = clock()
        with torch.no_grad():
            F.embedding_bag(by_row[0], table, by_row[1], mode="sum")
            F.embedding_bag(by_col[0], gradient, by_col[1], mode="sum")
            F.embedding_bag(by_row[0], table, by_row[1], mode="sum")
        ceiling.append(clock() - start)
        start = clock()
        layer(x).backward(g)
        both.append(clock() - start)
        optimizer.zero_grad()
        ratios.append(ceiling[-1] / both[-1])
    low, middle, high = quartiles(ratios)
    return {
        "peak": peak,
        "build_seconds": build,
        "pass_seconds": quartiles(passes)[1],
        "rewire_seconds": quartiles(rewiring)[1],
        "rewired": rewired,
        "ceiling_seconds": quartiles(ceiling)[1],
        "share": middle,
        "share_low": low,
        "share_high": high,
        "share_of_best": min(ceiling) / min(both),
        "nanoseconds_per_row": 1e9 * min(ceiling) / (3 * connections),
    }


def one_update(
    memory: Memory,
    clock: Clock,
    *,
    method: str,
    size: int,
    connections: int,
    batch: int,
    most_steps: int = 20,
) -> dict[str, Any]:
    """Build a size x size layer, train it with a method that updates as soon as it can, and stop
    after one update.

    SGD with momentum. Methods that look at activations look at one batch. Epochs are one step long.
    """
    memory.reset()
    about = methods.info(method)
    start = clock()
    layer = _layer(size, connections)
    optimizer = _optimizer("momentum", layer.parameters())
    x, g = _pair(size, batch)
    options: dict[str, Any] = {"data": [x.detach()]} if about.takes_data else {}
    every = about.parameters().get("every")
    if every is not None and (every.default is None or isinstance(every.default, int)):
        options["every"] = 1
    made = methods.create(method, layer, optimizer, seed=0, **options)
    build = clock() - start
    training: list[float] = []
    acting: list[float] = []

    def timed(call: Callable[[], object], into: list[float]) -> None:
        start = clock()
        call()
        into.append(clock() - start)

    train = _step_of(layer, optimizer, x, g)
    for _ in range(most_steps):
        timed(train, training)
        timed(made.step, acting)
        if not made.stats()["updates"]:
            timed(made.end_epoch, acting)
        if made.stats()["updates"]:
            break
    stats = made.stats()
    return {
        "updates": stats["updates"],
        "replaced": sum(stats["grown"].values()),
        "connections": layer.weight.connections,
        "build_seconds": build,
        "step_seconds": min(training),
        "update_seconds": max(acting),
        "peak": memory.total(),
    }


class _Chain(nn.Module):
    """Sparse layers with ReLU between them, as the SET authors' demonstration has them."""

    def __init__(self, sizes: Sequence[int], epsilon: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            SparseLinear(i, o, connections=min(i * o, round(epsilon * (i + o))))
            for i, o in pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = F.relu(layer(x))
        result: Tensor = self.layers[-1](x)
        return result


def wide_epoch(
    memory: Memory,
    clock: Clock,
    *,
    inputs: int,
    classes: int,
    samples: int,
    hidden: Sequence[int],
    epsilon: float,
    batch: int,
    most_steps: int | None = None,
) -> dict[str, Any]:
    """One epoch of a perceptron with SET on synthetic data, as the SET authors' demonstration does
    it.

    ReLU, sigmoid and squared error, SGD of rate 0.01, momentum 0.9 and weight decay 2e-4, epsilon
    (in + out) connections a layer, a fraction 0.3 rewired at the end of the epoch.
    """
    torch.manual_seed(0)
    memory.reset()
    x = torch.randn(samples, inputs)
    y = torch.randint(0, classes, (samples,))
    target = F.one_hot(y, classes).to(x.dtype)
    start = clock()
    model = _Chain((inputs, *hidden, classes), epsilon)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4, fused=True
    )
    method = methods.SET(model, optimizer, fraction=0.3, seed=0)
    build = clock() - start
    steps, planned = 0, -(-samples // batch)
    start = clock()
    for at in torch.randperm(samples).split(batch):
        loss = F.mse_loss(torch.sigmoid(model(x[at])), target[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.step()
        steps += 1
        if steps == most_steps:
            break
    training = clock() - start
    start = clock()
    method.end_epoch()
    update = clock() - start
    pools = [m for m in model.modules() if isinstance(m, SparseWeight)]
    return {
        "neurons": inputs + sum(hidden) + classes,
        "connections": sum(w.connections for w in pools),
        "steps": steps,
        "planned_steps": planned,
        "build_seconds": build,
        "training_seconds": training * planned / steps,
        "update_seconds": update,
        "epoch_seconds": training * planned / steps + update,
        "peak": memory.total(),
    }
