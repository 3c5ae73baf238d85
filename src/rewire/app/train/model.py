"""The network behind the command line: how many connections each layer gets, and the layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

import rewire
from rewire import budget, methods
from rewire.app.errors import TrainError
from rewire.app.train.config import TrainConfig, check_name
from rewire.budget import Limits
from rewire.nn.layers.initial import Init

Shape = tuple[int, int]  # (outputs, inputs), as in the weight


def layer_shapes(inputs: int, hidden: Sequence[int], outputs: int) -> list[Shape]:
    """Weight shapes of a multi-layer perceptron."""
    sizes = [inputs, *hidden, outputs]
    return [(after, before) for before, after in pairwise(sizes)]


def layer_connections(config: TrainConfig, shapes: Sequence[Shape]) -> list[int]:
    """Connections of each layer: at least one, at most as many as it has room for."""
    possible = [rows * cols for rows, cols in shapes]
    densities = config.density
    if densities is not None and len(densities) > 1:
        counts = [round(d * m) for d, m in zip(densities, possible, strict=True)]
        for number, (count, density, m) in enumerate(
            zip(counts, densities, possible, strict=True), start=1
        ):
            if not 1 <= count <= m:
                raise TrainError(
                    f"--density: {density} gives layer {number} ({_shown(shapes[number - 1])}) "
                    f"{count} connections; "
                    f"allowed are 1 to {m}, that is a density of at least {1 / m:.3g}"
                )
        return counts
    assert config.distribution is not None  # make_config filled it in
    check_name("--distribution", config.distribution, budget.DISTRIBUTIONS)
    total = config.connections if densities is None else round(densities[0] * sum(possible))
    assert total is not None  # make_config leaves one of the two
    option = f"--connections {total}" if densities is None else f"--density {densities[0]}"
    if not len(shapes) <= total <= sum(possible):
        layers = ", ".join(
            f"layer {i} ({_shown(shape)})" for i, shape in enumerate(shapes, start=1)
        )
        raise TrainError(
            f"{option}: {total} connections for {layers}; allowed are {len(shapes)} (one per "
            f"layer) to {sum(possible)}"
        )
    try:
        counts = budget.distribute(config.distribution, shapes, total)
    except ValueError as error:
        raise TrainError(f"{option} with --distribution {config.distribution}: {error}") from None
    for number, (count, m) in enumerate(zip(counts, possible, strict=True), start=1):
        if not 1 <= count <= m:
            raise TrainError(
                f"{option} with --distribution {config.distribution} gives layer {number} "
                f"({_shown(shapes[number - 1])}) {count} connections; allowed are 1 to {m}: "
                "choose another distribution or one density per layer"
            )
    return counts


def start_connections(
    config: TrainConfig, entry: methods.MethodInfo, shapes: Sequence[Shape], budgets: Sequence[int]
) -> list[int]:
    """Connections that each layer begins with: its budget, or more for methods that come down to
    it.

    A layer whose own budget is denser than the start begins with that.
    """
    if entry.start_density is None:
        if config.start_density is not None:
            raise TrainError(
                f"--start-density: {entry.name} has its budget from the start; it is for methods "
                "that come down to it"
            )
        return list(budgets)
    density = entry.start_density if config.start_density is None else config.start_density
    if config.start_density is not None:
        given, final = sum(round(density * rows * cols) for rows, cols in shapes), sum(budgets)
        if given < final:
            raise TrainError(
                f"--start-density: {density} is {given} connections, and the network is to end "
                f"with {final}; "
                f"{entry.name} only comes down: begin with more, or choose a smaller --density or "
                "--connections"
            )
    limits = limits_of(config)
    return [
        max(
            k,
            min(
                round(density * rows * cols), limits.maximum(rows, cols) if limits else rows * cols
            ),
        )
        for k, (rows, cols) in zip(budgets, shapes, strict=True)
    ]


def limits_of(config: TrainConfig) -> Limits | None:
    """The limits that the options set for every layer."""
    if config.fan_in is None and config.fan_out is None and config.block is None:
        return None
    return Limits(config.fan_in, config.fan_out, config.block)


def check_limits(config: TrainConfig, shapes: Sequence[Shape], connections: Sequence[int]) -> None:
    """Refuse limits within which a layer's connections do not fit."""
    limits = limits_of(config)
    if limits is None:
        return
    for number, (shape, count) in enumerate(zip(shapes, connections, strict=True), start=1):
        most = limits.maximum(*shape)
        if count > most:
            raise TrainError(
                f"--fan-in, --fan-out, --block: layer {number} ({_shown(shape)}) gets {count} "
                "connections, and at most "
                f"{most} fit within {limits}"
            )


def _shown(shape: Shape) -> str:
    return f"{shape[1]} inputs, {shape[0]} outputs"


def build(
    shapes: Sequence[Shape],
    connections: Sequence[int],
    bias: bool,
    generator: torch.Generator,
    init: Init = "auto",
    limits: Limits | None = None,
) -> nn.Sequential:
    """Sparse layers with ReLU between them; topology and weights come from `generator` alone.

    `init` is how large the first values are, see `rewire.nn.layers.initial.draw_values`.
    """
    modules: list[nn.Module] = []
    for (outputs, inputs), count in zip(shapes, connections, strict=True):
        if modules:
            modules.append(nn.ReLU())
        layer = rewire.nn.SparseLinear(
            inputs,
            outputs,
            bias=bias,
            connections=count,
            limits=limits,
            generator=generator,
            init=init,
        )
        modules.append(layer)
    return nn.Sequential(*modules)


def build_dense(shapes: Sequence[Shape], bias: bool, generator: torch.Generator) -> nn.Sequential:
    """`nn.Linear` layers with ReLU between them, initialised as PyTorch's default does."""
    modules: list[nn.Module] = []
    for outputs, inputs in shapes:
        if modules:
            modules.append(nn.ReLU())
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        modules.append(layer)
    return nn.Sequential(*modules)


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the options ask for."""
    parameters = list(model.parameters())
    assert config.lr is not None  # make_config filled it in
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
