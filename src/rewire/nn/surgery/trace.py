"""Finds coupled layers: traces torch-pruning's dependency graph on copies, and reads it out."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from rewire.nn.forward.modes import rehearsing
from rewire.nn.forward.tensors import map_tensors, rows, tensors_in
from rewire.nn.surgery.sides import RECURRENT, Side, why_not
from rewire.nn.weight.pool import SparseWeight

__all__ = [
    "Arguments",
    "Reached",
    "Trace",
    "call",
    "in_words",
    "mode_name",
    "torch_pruning",
    "twin_of",
]


def torch_pruning() -> Any:
    """The package torch-pruning; raises ImportError, which says how to install it."""
    try:
        import torch_pruning as package
    except ImportError:
        raise ImportError(
            "removing units needs torch-pruning, which finds the coupled layers: pip install "
            "'torch-rewire[prune]'"
        ) from None
    return package


@dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``: a tuple or list gives the arguments, a dict the keyword arguments,
    `Arguments` both.
    """
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
    return model(*inputs) if several else model(inputs)


def in_words(error: BaseException) -> str:
    """An exception as part of a sentence."""
    text = " ".join(str(error).split())
    return (text if len(text) < 300 else f"{text[:300]} ...") or type(error).__name__


def mode_name(train: bool) -> str:
    return "training mode" if train else "eval mode"


def twin_of(model: nn.Module) -> nn.Module:
    """A deepcopy of the model, even if the model keeps tensors of its last forward pass.

    Raises ValueError if it cannot be copied.
    """
    kept: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if plain or key in ("_parameters", "_modules"):
                continue
            for tensor in tensors_in(value):
                if not tensor.is_leaf:
                    kept[id(tensor)] = tensor.detach().clone()
    try:
        twin = copy.deepcopy(model, kept)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied, so no cut can be tried on a copy: {in_words(error)}"
        ) from None
    for module in twin.modules():
        # With such an eps the layer does not run in training mode, and coupling does not depend on
        # it.
        if isinstance(module, _BatchNorm) and module.eps <= 0:
            module.eps = 1e-5
    return twin


def _two_rows(inputs: Any) -> Any:
    """The example with at least two samples, which BatchNorm needs in training mode."""
    if rows(inputs) != 1 or isinstance(inputs, PackedSequence):
        return inputs
    return map_tensors(lambda x: torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x, inputs)


@dataclass(frozen=True)
class Reached:
    """One side of a module that a layer's units reach: positions, and the unit of each."""

    module: str
    side: Side
    positions: Tensor
    units: Tensor


class _Node(torch.autograd.Function):
    """One node of the graph for everything that a layer computes: ``count`` outputs, then the
    tensors that they depend on.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("this node is for tracing only")


def _node(outputs: list[Tensor], sources: list[Tensor]) -> tuple[Tensor, ...]:
    # Without this leaf there is no node if nothing else needs gradients.
    leaf = torch.zeros((), requires_grad=True)
    made: tuple[Tensor, ...] = _Node.apply(len(outputs), *outputs, *sources, leaf)  # type: ignore[no-untyped-call]
    return made


def _stand_in(module: Any, input: Any, hx: Any = None) -> Any:
    """The forward of a recurrent layer in the traced copy: output and last states, from one
    node.
    """
    data: Tensor = input.data if isinstance(input, PackedSequence) else input
    width = module.hidden_size
    if isinstance(input, PackedSequence):
        batch: tuple[int, ...] = (int(input.batch_sizes[0]),)
    else:
        batch = (data.shape[0 if module.batch_first else 1],) if data.dim() == 3 else ()
    outputs = [data.new_ones(*data.shape[:-1], width), data.new_ones(1, *batch, width)]
    out, states = _node(outputs, [data])
    made: Any = out
    if isinstance(input, PackedSequence):
        made = PackedSequence(out, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    lstm = isinstance(module, nn.LSTM)
    return made, (states, torch.zeros_like(states).detach()) if lstm else states


def _sealed(forward: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    """The forward of a layer that cannot be cut, as one node of the graph, which is given to
    ``note``.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            result = forward(*args, **kwargs)
        given = [t for t in tensors_in(result) if t.is_floating_point()]
        if not given:
            return result
        made = _node(given, [t for t in tensors_in((args, kwargs)) if t.requires_grad])
        note(made[0].grad_fn)
        replaced = {id(old): new for old, new in zip(given, made, strict=True)}
        return map_tensors(lambda t: replaced.get(id(t), t), result)

    return run


def _pruner(
    package: Any, count: Callable[[Any], int | None], read: Callable[[Any], int | None]
) -> Any:
    """A torch-pruning handler that counts channels and prunes nothing."""

    class Handler(package.BasePruningFunc):  # type: ignore[misc, name-defined, unused-ignore]
        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            return layer

        def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            return layer

        def get_out_channels(self, layer: nn.Module) -> int | None:
            return count(layer)

        def get_in_channels(self, layer: nn.Module) -> int | None:
            return read(layer)

    return Handler()


def _unknown(module: nn.Module) -> bool:
    """Whether the layer is to be one node of the graph, because no units can be cut from it."""
    if isinstance(module, parametrize.ParametrizationList):
        return False
    if isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module):
        return True
    if any(isinstance(child, SparseWeight) for child in module.children()):
        return True
    own = any(p is not None for p in module._parameters.values())
    nested = any(True for child in module.children() for _ in child.parameters())
    leaf = own and not nested and not isinstance(module, SparseWeight)
    return leaf and why_not(module) is not None


class _Walk:
    """The graph of one forward pass in one mode; empty if no output depends on the weights."""

    def __init__(self, package: Any, model: nn.Module, inputs: Any, train: bool) -> None:
        self._mode = mode_name(train)
        twin = twin_of(model)
        for parameter in twin.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        self._names = {module: name for name, module in twin.named_modules()}
        self._modules = {name: module for module, name in self._names.items()}
        self._parameters = {id(p): name for name, p in twin.named_parameters()}
        self._types = package.ops.OPTYPE
        self._unknown: dict[Any, str] = {}  # node of the graph -> the layer that it replaces
        #: Names of the modules in the order in which they were called, once for each call.
        self.order: list[str] = []
        custom: dict[Any, Any] = {}
        sealed: list[nn.Module] = []

        def note(name: str, node: Any) -> None:
            self._unknown[node] = name

        def called(module: nn.Module, args: Any) -> None:
            self.order.append(self._names[module])

        for module, name in self._names.items():
            if isinstance(module, RECURRENT) and why_not(module) is None:
                custom[type(module)] = _pruner(
                    package, lambda m: m.hidden_size, lambda m: m.input_size
                )
                module.__dict__["forward"] = types.MethodType(_stand_in, module)
            elif name and _unknown(module):
                sealed.append(module)
                module.__dict__["forward"] = _sealed(module.forward, partial(note, name))
            module.register_forward_pre_hook(called)
        self._graph = package.DependencyGraph()
        failed: list[str] = []

        def forward(twin: nn.Module, inputs: Any) -> list[Tensor]:
            twin.train(train)  # torch-pruning asks for eval mode
            try:
                result = call(twin, inputs)
            except Exception as error:
                failed.append(in_words(error))
                raise
            return [t for t in tensors_in(result) if t.requires_grad]

        try:
            with rehearsing(twin, train=train), torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph.build_dependency(
                    twin,
                    inputs,
                    forward_fn=forward,
                    customized_pruners=custom,
                    ignored_layers=[inner for module in sealed for inner in module.modules()],
                    verbose=False,
                )
        except Exception as error:
            if failed:
                raise ValueError(
                    f"the network does not run in {self._mode} on the example ({failed[0]}): give "
                    "data (or an example) with all arguments that it needs, a dict of them where "
                    "there are several"
                ) from None
            raise ValueError(
                f"no unit can be cut: torch-pruning cannot follow this network in {self._mode} "
                f"({type(error).__name__}: {in_words(error)})"
            ) from None

    def has(self, name: str) -> bool:
        """Whether the outputs of the layer are part of the graph."""
        return self._modules[name] in self._graph.module2node

    def reach(self, name: str, count: int) -> list[Reached]:
        """The places that the ``count`` outputs of a layer reach.

        Raises ValueError, with the reason, if they cannot be cut there.
        """
        module = self._modules[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruner = self._graph.get_pruner_of_module(module)
                group = self._graph.get_pruning_group(
                    module, pruner.prune_out_channels, list(range(count))
                )
        except Exception as error:
            raise ValueError(
                f"the units of {name} cannot be cut: torch-pruning cannot follow them in "
                f"{self._mode} ({type(error).__name__}: {in_words(error)})"
            ) from None
        kinds, found = self._types, []
        passing = {kinds.CONCAT, kinds.SPLIT, kinds.ELEMENTWISE, kinds.RESHAPE}
        passing |= {kinds.UNBIND, kinds.EXPAND, kinds.SLICE}
        for i in range(len(group)):
            node, positions, units = group[i].dep.target, group[i].idxs, group[i].root_idxs
            there = self._unknown.get(node.grad_fn)
            if there is not None:
                reason = why_not(self._modules[there])
                raise ValueError(f"the units of {name} cannot be cut: {there} {reason}")
            if node.type in passing:
                continue
            if node.type == kinds.OUTPUT:
                raise ValueError(
                    f"the outputs of {name} are outputs of the network, which must stay"
                )
            if node.type == kinds.PARAMETER:
                parameter = self._parameters.get(id(node.module), "a parameter")
                raise ValueError(
                    f"the units of {name} meet {parameter}, which belongs to no layer that can be "
                    "cut"
                )
            side: Side = "in" if group[i].dep.handler.__name__ == "prune_in_channels" else "out"
            places = torch.tensor(positions), torch.tensor(units)
            found.append(Reached(self._names[node.module], side, *places))
        return found

    def norm_after(self, name: str) -> str | None:
        """The BatchNorm that is the only direct reader of the layer's output, if it is one."""
        node = self._graph.module2node[self._modules[name]]
        if len(set(node.outputs)) != 1:
            return None
        after = node.outputs[0].module
        return self._names[after] if isinstance(after, _BatchNorm) else None


class Trace:
    """The places that the units of each layer reach, in training or in eval mode.

    Tracing runs on copies of the model: two of them, with one forward pass each. Random factors
    have their expected values, and all random generators are as before afterwards.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        package = torch_pruning()
        #: The example, with at least two samples.
        self.inputs = _two_rows(inputs)
        evaluating = _Walk(package, model, self.inputs, train=False)
        training = _Walk(package, model, self.inputs, train=True)
        self._walks = [evaluating, training]
        #: Names of the modules in the order of their calls in eval mode, then those that only
        #: training mode calls.
        self.order = [*evaluating.order, *(n for n in training.order if n not in evaluating.order)]
        #: Those that both modes call, in the order of their first calls.
        self.shared = list(dict.fromkeys(n for n in evaluating.order if n in training.order))

    def twice(self, name: str) -> bool:
        """Whether the layer is called more than once in a forward pass."""
        return any(walk.order.count(name) > 1 for walk in self._walks)

    def reach(self, name: str, count: int) -> list[Reached]:
        """The places that the ``count`` outputs of layer ``name`` reach.

        Raises ValueError, with the reason, if they cannot be cut there.
        """
        found: dict[tuple[str, Side], Reached] = {}
        there = [walk for walk in self._walks if walk.has(name)]
        if not there:
            if name not in self.order:
                raise ValueError(f"{name} took no part in the forward pass of the example")
            raise ValueError(
                f"the outputs of {name} cannot be followed to an output of the network: nothing "
                "uses them, or autograd has no graph of them (torch.no_grad, a reentrant "
                "checkpoint)"
            )
        for walk in there:
            for one in walk.reach(name, count):
                other = found.get((one.module, one.side))
                if other is not None:
                    both = [torch.stack([part.positions, part.units]) for part in (other, one)]
                    one = Reached(one.module, one.side, *torch.cat(both, 1).unique(dim=1))
                found[one.module, one.side] = one
        return list(found.values())

    def norm_after(self, name: str) -> str | None:
        """The BatchNorm that is the only direct reader of the layer's output in both modes, if it
        is one.
        """
        found = {walk.norm_after(name) for walk in self._walks if walk.has(name)}
        return found.pop() if len(found) == 1 else None
