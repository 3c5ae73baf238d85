"""What a run is made of before its first step: batches, network, optimizer, method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rewire import methods
from rewire.app.data import Dataset
from rewire.app.errors import TrainError
from rewire.app.importing import foreign
from rewire.app.models import Signature
from rewire.app.train import baselines
from rewire.app.train.batches import Batches, Inputs, Pieces, derive_seed
from rewire.app.train.config import TrainConfig, check_name, method_options
from rewire.app.train.metrics import evaluate
from rewire.app.train.model import (
    Network,
    check_limits,
    layer_connections,
    make_optimizer,
    start_connections,
)
from rewire.app.train.prepared import Prepared, prepare
from rewire.app.train.ranks import Ranks
from rewire.app.train.remaining import layer_counts, structure
from rewire.app.train.task import Task
from rewire.distributed import prepare as prepare_for_ranks
from rewire.nn.forward.modes import evaluating
from rewire.nn.layers.perceptron import ONE_THREAD

#: Samples at a time, where a method looks at activations.
ROWS = 1000


@dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
        config: the options, with the number of threads.
        task: loss and score.
        data: the samples, as the network reads them.
        network: what the model is made of.
        dense: whether the method starts from a dense network.
        starts_with: connections of each weight at the start.
        whole: connections that the network could have, of which a small dense one is a part.
        info: what the files of the run say about it.
    """

    config: TrainConfig
    task: Task
    data: Prepared
    batches: Batches
    network: Network
    dense: bool
    starts_with: list[int]
    whole: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: methods.Method
    info: dict[str, Any]
    #: What reads batches in training: the model, or DistributedDataParallel around it.
    forward: nn.Module

    @property
    def held_out(self) -> tuple[Tensor | Inputs, Tensor]:
        """The samples to validate on."""
        return self.data.validation

    @property
    def possible(self) -> list[int]:
        """Potential connections of each weight."""
        return [math.prod(shape) for shape in self.network.shapes]

    def connections(self) -> dict[str, int]:
        """Connections of each weight now, by name."""
        if self.dense:
            found = structure(self.model, self.method, stack=self.network.is_stack).connections
            return self._in_order(found)
        return self.method.count_connections()

    def units(self) -> list[int]:
        """Outputs of each weight that take part now."""
        found = structure(self.model, self.method, stack=self.network.is_stack).units
        return list(self._in_order(found).values())

    def _in_order(self, found: dict[str, int]) -> dict[str, int]:
        return {name: found[name] for name in self.network.names if name in found}

    def left(self, model: nn.Module) -> dict[str, int]:
        """Connections of each weight of the finished network."""
        return self._in_order(layer_counts(model, self.network.names))

    def counts(self) -> dict[str, dict[str, int]]:
        """Connections "dropped" and "grown" of each weight since the start."""
        if self.dense:
            found = self.connections().items()
            gone = {n: m - k for (n, k), m in zip(found, self.possible, strict=True)}
            return {"dropped": gone, "grown": dict.fromkeys(gone, 0)}
        stats = self.method.stats()
        return {"dropped": dict(stats["dropped"]), "grown": dict(stats["grown"])}

    def start_model(self, *, dense: bool) -> nn.Module:
        """The network that training begins with, made anew, or its ``dense`` twin."""
        return self.network.make(None if dense else self.starts_with)


def assemble(
    config: TrainConfig,
    dataset: Dataset,
    ranks: Ranks | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Parts:
    """Make all parts from the options and the data. Raises `TrainError` and `DataError`.

    ``state`` of the model is loaded before several ``ranks`` are tied together: a weight that has
    shrunk cannot be loaded afterwards.
    """
    torch.manual_seed(
        derive_seed(config.seed, "torch")
    )  # for code that draws from torch's global generator
    check_name("--method", config.method, baselines.available())
    entry = baselines.info(config.method)
    dense = entry.cls.starts_dense
    data = prepare(config, dataset)
    signature = Signature(dataset.shape, dataset.outputs, dataset.each_step, dataset.tokens)
    network = Network.of(config, signature)
    whole = sum(math.prod(shape) for shape in network.shapes)
    if config.method == baselines.SMALL_DENSE:
        network = _smaller(config, network)
    budgets, connections = _connections(config, entry, network)
    # one thread where several would mostly wait
    few = sum(connections) * config.batch_size < ONE_THREAD and network.is_stack
    threads = config.threads or (1 if few else torch.get_num_threads())
    torch.set_num_threads(threads)
    x, y = data.train
    batches = Batches(x, y, config.batch_size, config.seed, data.augment, dataset.image_shape)
    steps = config.epochs * len(batches)
    options = method_options(config, steps)
    config = config.model_copy(update={"threads": threads, "method_options": options})
    model = network.make(None if dense else connections)
    if dense and network.is_sparse:
        raise TrainError(
            f"--method {config.method} starts from a dense network, and {config.model} has sparse "
            "layers already"
        )
    if not network.is_stack:
        _try_out(config, model, x, signature)
    forward = model
    if ranks is not None and ranks.several:
        if state is not None:
            model.load_state_dict(state)
        prepare_for_ranks(model, seed=derive_seed(config.seed, "method"))
        forward = DistributedDataParallel(model)
    optimizer = make_optimizer(config, model)
    held_out = data.validation
    if "evaluate" in entry.services and not len(held_out[1]):
        raise TrainError(
            f"--validation: {entry.name} decides by the validation accuracy, so it must not be 0"
        )
    provided = {
        # Methods that look at activations see the training part, never what is held out.
        "data": Pieces(x, ROWS),
        "connections": budgets,
        "total_steps": steps,
        "total_epochs": config.epochs,
        "evaluate": lambda model: evaluate(model, *held_out, data.task)[1],
    }
    settings = {name: value for name, value in provided.items() if name in entry.services}
    settings |= _of_method(config, entry)
    try:
        method = baselines.create(
            config.method, model, optimizer, seed=derive_seed(config.seed, "method"), **settings
        )
    # ImportError: removing units needs a package of its own; RuntimeError: not for several ranks
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        decays = config.weight_decay and "weight decay" in str(error)
        hint = "; leave out --weight-decay" if decays else ""
        raise TrainError(f"--method {config.method}: {error}{hint}") from None
    info = {
        "starts_dense": dense,
        "layers": [],
        "image_shape": list(dataset.image_shape) if dataset.image_shape else None,
        "classes": list(dataset.classes),
        "samples": {"train": len(y), "validation": len(held_out[1]), "test": len(data.test[1])},
        "data_sha256": dict(dataset.sha256),
        "data": dataset.name,
        "model": config.model,
        "score": data.task.score,
        "signature": {
            "shape": list(signature.shape),
            "outputs": signature.outputs,
            "each_step": signature.each_step,
            "tokens": signature.tokens,
        },
        "width": network.width,
    }
    parts = Parts(
        config=config,
        task=data.task,
        data=data,
        batches=batches,
        network=network,
        dense=dense,
        starts_with=connections,
        whole=whole,
        model=model,
        optimizer=optimizer,
        method=method,
        info=info,
        forward=forward,
    )
    info["layers"] = [
        {
            "name": name,
            "outputs": shape[0],
            "inputs": math.prod(shape[1:]),
            "connections": count,
            "budget": budget,
        }
        for name, shape, count, budget in zip(
            parts.connections(), network.shapes, connections, budgets, strict=True
        )
    ]
    return parts


def _connections(
    config: TrainConfig, entry: methods.MethodInfo, network: Network
) -> tuple[list[int], list[int]]:
    """Connections of each weight: its budget, and what it begins with."""
    if entry.cls.starts_dense:
        every = [math.prod(shape) for shape in network.shapes]
        return every, every
    if network.is_sparse:
        own = list(layer_counts(network.make(None), network.names).values())
        return own, own
    budgets = layer_connections(config, network.shapes)
    check_limits(config, network.shapes, budgets)
    return budgets, start_connections(config, entry, network.shapes, budgets)


def _of_method(config: TrainConfig, entry: methods.MethodInfo) -> dict[str, Any]:
    """Hyper-parameters: those that were given, and options that some methods have as well."""
    settings: dict[str, Any] = dict(config.method_options)
    known = entry.parameters()
    if entry.cls.starts_dense:
        if config.density is not None and "density" in known:
            settings["density"] = config.density[0]
        for name in ("only", "exclude"):
            patterns = getattr(config, name)
            if patterns is not None and name in known:
                settings.setdefault(name, list(patterns))
    return settings


def _smaller(config: TrainConfig, network: Network) -> Network:
    """The widest network with at most the parameters of the sparse one, biases and all."""
    total = sum(math.prod(shape) for shape in network.shapes)
    if config.connections is not None:
        budget = config.connections
    else:
        assert config.density is not None  # make_config filled it in
        budget = round(config.density[0] * total)
    others = sum(p.numel() for p in network.dense().parameters()) - total
    signature = network.signature

    def make(width: float) -> nn.Module:
        return Network(config, signature, width, (), ()).dense()

    return Network.of(config, signature, baselines.largest_width(make, budget + others))


def _try_out(config: TrainConfig, model: nn.Module, x: Tensor | Inputs, sample: Signature) -> None:
    """Raise TrainError for a network that cannot read the samples, or answers in another shape."""
    wanted = (*sample.shape[: int(sample.each_step)], sample.outputs)
    with evaluating(model):
        few = x[:2]
        what = f"--model: {config.model} does not read samples of {tuple(few.shape[1:])}"
        with foreign(lambda said: TrainError(f"{what}: {said}")):
            output = model(few)
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found != (len(few), *wanted):
        raise TrainError(
            f"--model: {config.model} gives {found} for {len(few)} samples, and needed is a tensor "
            f"of {(len(few), *wanted)}"
        )
