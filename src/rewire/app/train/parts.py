"""What a run is made of before its first step: batches, network, optimizer, method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewire import methods
from rewire.app.data import Dataset
from rewire.app.errors import TrainError
from rewire.app.train.batches import Batches, derive_seed, make_generator, split
from rewire.app.train.config import TrainConfig, check_name
from rewire.app.train.metrics import evaluate
from rewire.app.train.model import (
    Shape,
    build,
    build_dense,
    check_limits,
    layer_connections,
    layer_shapes,
    limits_of,
    make_optimizer,
    start_connections,
)
from rewire.app.train.remaining import structure

#: Samples at a time, where a method looks at activations.
ROWS = 1000
#: Products in a step: a millisecond of work, below which threads cost more than they bring.
ONE_THREAD = 1_000_000


@dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
        config: the options, with the number of threads.
        dense: whether the method starts from a dense network.
        starts_with: connections of each layer at the start.
        info: what the files of the run say about it.
    """

    config: TrainConfig
    batches: Batches
    held_out: tuple[Tensor, Tensor]
    shapes: list[Shape]
    dense: bool
    starts_with: list[int]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: methods.Method
    info: dict[str, Any]

    @property
    def possible(self) -> list[int]:
        """Potential connections of each layer."""
        return [rows * cols for rows, cols in self.shapes]

    def connections(self) -> dict[str, int]:
        """Connections of each layer now, by name."""
        if self.dense:
            return structure(self.model, self.method).connections
        return self.method.count_connections()

    def counts(self) -> dict[str, dict[str, int]]:
        """Connections "dropped" and "grown" of each layer since the start."""
        if self.dense:
            found = self.connections().items()
            gone = {n: m - k for (n, k), m in zip(found, self.possible, strict=True)}
            return {"dropped": gone, "grown": dict.fromkeys(gone, 0)}
        stats = self.method.stats()
        return {"dropped": dict(stats["dropped"]), "grown": dict(stats["grown"])}

    def start_model(self, *, dense: bool) -> nn.Module:
        """The network that training begins with, made anew, or its ``dense`` twin."""
        return _start_model(self.config, self.shapes, None if dense else self.starts_with)


def assemble(config: TrainConfig, dataset: Dataset) -> Parts:
    """Make all parts from the options and the data. Raises `TrainError`."""
    torch.manual_seed(
        derive_seed(config.seed, "torch")
    )  # for code that draws from torch's global generator
    (train_x, train_y), held_out = split(
        dataset.train_x, dataset.train_y, config.validation, config.seed
    )
    if not len(train_y):
        raise TrainError(f"--validation: {config.validation} leaves no sample to train on")
    if config.validation and not len(held_out[1]):
        raise TrainError(
            f"--validation: {config.validation} of {len(train_y)} samples is less than one; "
            "0 turns it off"
        )
    batches = Batches(train_x, train_y, config.batch_size, config.seed)
    shapes = layer_shapes(dataset.features, config.hidden, len(dataset.classes))
    check_name("--method", config.method, methods.available())
    entry = methods.info(config.method)
    dense = entry.cls.starts_dense
    if dense:
        budgets = connections = [rows * cols for rows, cols in shapes]
    else:
        budgets = layer_connections(config, shapes)
        check_limits(config, shapes, budgets)
        connections = start_connections(config, entry, shapes, budgets)
    # one thread where several would mostly wait
    few = sum(connections) * config.batch_size < ONE_THREAD
    threads = config.threads or (1 if few else torch.get_num_threads())
    torch.set_num_threads(threads)
    config = config.model_copy(update={"threads": threads})
    model = _start_model(config, shapes, None if dense else connections)
    optimizer = make_optimizer(config, model)
    provided = {
        # Methods that look at activations see the training part, never what is held out.
        "data": train_x.split(ROWS),
        "connections": budgets,
        "total_steps": config.epochs * len(batches),
        "total_epochs": config.epochs,
        "evaluate": lambda model: evaluate(model, *held_out)[1],
    }
    if "evaluate" in entry.services and not len(held_out[1]):
        raise TrainError(
            f"--validation: {entry.name} decides by the validation accuracy, so it must not be 0"
        )
    settings = {name: value for name, value in provided.items() if name in entry.services}
    settings |= config.method_options
    if dense and config.density is not None:
        settings["density"] = config.density[0]
    try:
        method = methods.create(
            config.method, model, optimizer, seed=derive_seed(config.seed, "method"), **settings
        )
    # ImportError: removing units needs a package of its own
    except (ValueError, TypeError, ImportError) as error:
        decays = config.weight_decay and "weight decay" in str(error)
        hint = "; leave out --weight-decay" if decays else ""
        raise TrainError(f"--method {config.method}: {error}{hint}") from None
    info = {
        "starts_dense": dense,
        "layers": [],
        "image_shape": list(dataset.image_shape) if dataset.image_shape else None,
        "classes": list(dataset.classes),
        "samples": {
            "train": len(train_y),
            "validation": len(held_out[1]),
            "test": len(dataset.test_y),
        },
        "data_sha256": dict(dataset.sha256),
    }
    parts = Parts(
        config, batches, held_out, shapes, dense, connections, model, optimizer, method, info
    )
    info["layers"] = [
        {"name": name, "outputs": rows, "inputs": cols, "connections": count, "budget": budget}
        for name, (rows, cols), count, budget in zip(
            parts.connections(), shapes, connections, budgets, strict=True
        )
    ]
    return parts


def _start_model(
    config: TrainConfig, shapes: list[Shape], connections: list[int] | None
) -> nn.Module:
    """The network at the start; dense without ``connections``."""
    generator = make_generator(config.seed, "model")
    if connections is None:
        return build_dense(shapes, config.bias, generator)
    limits = limits_of(config)
    return build(shapes, connections, config.bias, generator, config.init, limits)
