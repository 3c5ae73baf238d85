"""The network behind the command line: how many connections each layer gets, and the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import rewire
from rewire import budget, methods
from rewire.app import models
from rewire.app.errors import TrainError
from rewire.app.models import Signature
from rewire.app.train.batches import derive_seed, make_generator
from rewire.app.train.config import TrainConfig, check_name
from rewire.budget import Limits
from rewire.nn import sparse_weights
from rewire.nn.convert.counts import chosen
from rewire.nn.convert.cut import dense_weights
from rewire.nn.layers.perceptron import perceptron

Shape = tuple[int, ...]  # (outputs, inputs), as in the weight, and those of a kernel


def layer_shapes(
    inputs: int, hidden: Sequence[int], outputs: int, width: float = 1.0
) -> list[tuple[int, int]]:
    """Weight shapes of a multi-layer perceptron; ``width`` is a factor on its hidden layers."""
    sizes = [inputs, *(max(1, round(n * width)) for n in hidden), outputs]
    return [(after, before) for before, after in pairwise(sizes)]


def layer_connections(config: TrainConfig, shapes: Sequence[Shape]) -> list[int]:
    """Connections of each layer: at least one, at most as many as it has room for."""
    possible = [math.prod(shape) for shape in shapes]
    densities = config.density
    if densities is not None and len(densities) > 1:
        if len(densities) != len(shapes):
            raise TrainError(
                f"--density: given {len(densities)} numbers for {len(shapes)} weights; allowed is "
                f"one number for the whole network or {len(shapes)}"
            )
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
        given, final = sum(round(density * math.prod(shape)) for shape in shapes), sum(budgets)
        if given < final:
            raise TrainError(
                f"--start-density: {density} is {given} connections, and the network is to end "
                f"with {final}; "
                f"{entry.name} only comes down: begin with more, or choose a smaller --density or "
                "--connections"
            )
    return budget.starting(density, shapes, budgets, limits_of(config))


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
        most = limits.maximum(shape[0], math.prod(shape[1:]))
        if count > most:
            raise TrainError(
                f"--fan-in, --fan-out, --block: layer {number} ({_shown(shape)}) gets {count} "
                "connections, and at most "
                f"{most} fit within {limits}"
            )


def _shown(shape: Shape) -> str:
    return f"{math.prod(shape[1:])} inputs, {shape[0]} outputs"


@dataclass(frozen=True)
class Network:
    """The network that the options mean, and its weights that can be sparse.

    Attributes:
        config: the options.
        signature: what it reads and gives.
        width: a factor on the units of hidden layers.
        names, shapes: of the weights that the budget is for, as far as they are dense.
        is_sparse: whether the network of one's own has sparse layers already: then it decides
            itself how many connections they have.
    """

    config: TrainConfig
    signature: Signature
    width: float
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    is_sparse: bool = False

    @classmethod
    def of(cls, config: TrainConfig, signature: Signature, width: float = 1.0) -> Network:
        """Look at the network once. Raises `TrainError` if it cannot be made or has no weight."""
        if config.model == "mlp" and (signature.tokens or signature.each_step):
            raise TrainError(
                "--model: mlp reads numbers and gives one answer for a sample; choose gpt:4x256 "
                "for tokens, or lstm:200 where each step has a class"
            )
        if config.model == "mlp" and not _has_patterns(config):
            sizes = layer_shapes(signature.features, config.hidden, signature.outputs, width)
            known = tuple(f"{2 * i}.weight" for i in range(len(sizes)))
            return cls(config, signature, width, known, tuple(sizes))
        model = cls(config, signature, width, (), ()).dense()
        sparse = [(name, tuple(weight.shape)) for name, weight in sparse_weights(model)]
        found = sparse or [
            (name, tuple(weight.shape))
            for name, layer, _, weight in dense_weights(model)
            if weight.requires_grad and chosen(layer, config.only, config.exclude)
        ]
        if not found:
            raise TrainError(
                "--model: no layer to make sparse: it needs trainable layers of torch.nn (Linear, "
                "convolutions, RNN, LSTM, GRU, MultiheadAttention), and --only and --exclude must "
                "leave some of them"
            )
        names, shapes = zip(*found, strict=True)
        return cls(config, signature, width, names, shapes, bool(sparse))

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of linear layers."""
        return self.config.model == "mlp"

    def make(self, connections: Sequence[int] | None) -> nn.Module:
        """The network at the start, made anew by the seed; dense without ``connections``."""
        config = self.config
        if self.is_stack and not _has_patterns(config):
            return perceptron(
                [(rows, cols) for rows, cols in self.shapes],
                connections,
                make_generator(config.seed, "model"),
                bias=config.bias,
                limits=limits_of(config),
                init=config.init,
            )
        model = self.dense()
        if connections is None or self.is_sparse:
            return model
        try:
            return rewire.sparsify(
                model,
                connections=dict(zip(self.names, connections, strict=True)),
                limits=limits_of(config),
                generator=make_generator(config.seed, "topology"),
                init=config.init,
            )
        except ValueError as error:
            raise TrainError(f"--model {config.model}: {error}") from None

    def dense(self) -> nn.Module:
        """The network as it is without a budget; torch's own random numbers stay as they are."""
        config = self.config
        if config.model == "mlp":
            sizes = layer_shapes(
                self.signature.features, config.hidden, self.signature.outputs, self.width
            )
            return perceptron(sizes, None, make_generator(config.seed, "model"), bias=config.bias)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "model"))
            return models.build(config.model, self.signature, self.width)


def _has_patterns(config: TrainConfig) -> bool:
    return config.only is not None or config.exclude is not None


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the options ask for."""
    assert config.lr is not None  # make_config filled it in
    lr, decay = config.lr, config.weight_decay
    parameters: Any = list(model.parameters())
    if decay:  # biases and norms have none
        groups = rewire.nn.param_groups(model, decay)
        parameters = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
