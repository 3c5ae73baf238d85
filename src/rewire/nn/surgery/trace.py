"""Which layers are coupled: torch-pruning's dependency graph, traced on a copy and read out as plain data."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rewire.nn.surgery.kinds import RECURRENT, Side, why_not
from rewire.nn.weight import SparseWeight

__all__ = ["Arguments", "Reached", "Trace", "call", "torch_pruning"]


def torch_pruning() -> Any:
    """The package torch-pruning; ImportError that says how to get it."""
    try:
        import torch_pruning as package
    except ImportError:
        raise ImportError(
            "removing units needs torch-pruning, which finds the coupled layers: pip install 'rewire[prune]'"
        ) from None
    return package


@dataclass(frozen=True)
class Arguments:
    """All that a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``: a tuple or list gives the arguments, a dict the keyword arguments, `Arguments` both."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
    return model(*inputs) if several else model(inputs)


@dataclass(frozen=True)
class Reached:
    """One place that a layer's units reach: a module's side and its positions, and the unit each of them belongs to."""

    module: str
    side: Side
    positions: Tensor
    units: Tensor


class _Opaque(torch.autograd.Function):
    """One node of the graph with the shape of a recurrent layer's output, in place of the hundreds it has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("this node is for tracing only")


def _stand_in(module: Any, input: Any, hx: Any = None) -> Any:
    """Forward of a recurrent layer in the traced copy: output, and last states cut out of it."""
    x = input
    data = x.data if isinstance(x, PackedSequence) else x
    weight = torch.ones(data.shape[-1], module.hidden_size, dtype=data.dtype, device=data.device, requires_grad=True)
    out = _Opaque.apply(data, weight)  # type: ignore[no-untyped-call]
    if isinstance(x, PackedSequence):
        states = out[: int(x.batch_sizes[0])].unsqueeze(0)
        out = PackedSequence(out, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    else:
        time = 1 if module.batch_first and data.dim() == 3 else 0
        last = out.narrow(time, out.shape[time] - 1, 1)
        states = last.transpose(0, 1) if time else last
    return out, ((states, torch.zeros_like(states).detach()) if isinstance(module, nn.LSTM) else states)


def _pruner(package: Any, count: Callable[[Any], int | None], read: Callable[[Any], int | None], coupled: bool) -> Any:
    """A torch-pruning handler that only counts; nothing is ever pruned by it."""

    class Handler(package.BasePruningFunc):  # type: ignore[misc, name-defined, unused-ignore]
        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            return layer

        if coupled:
            prune_in_channels = prune_out_channels
        else:

            def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
                return layer

        def get_out_channels(self, layer: nn.Module) -> int | None:
            return count(layer)

        def get_in_channels(self, layer: nn.Module) -> int | None:
            return read(layer)

    return Handler()


def _unknown(module: nn.Module) -> bool:
    """Whether torch-pruning would take this layer for an elementwise operation, or for the class it derives from."""
    if any(isinstance(child, SparseWeight) for child in module.children()):
        return True
    own = any(p is not None for p in module._parameters.values())
    nested = any(True for child in module.children() for _ in child.parameters())
    return own and not nested and not isinstance(module, SparseWeight) and why_not(module) is not None


class Trace:
    """The graph of one forward pass in eval mode: for each layer, what its units reach.

    The model itself is not touched: tracing runs on a copy (cost: one copy and one forward pass).
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        package = torch_pruning()
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    raise ValueError(
                        f"{name} has a {key} that is computed from other tensors and kept, so the model cannot be "
                        "copied: make masks permanent (torch.nn.utils.prune.remove) and old weight norms plain first"
                    )
        twin = copy.deepcopy(model).eval().requires_grad_(True)
        names = {module: name for name, module in twin.named_modules()}
        custom: dict[Any, Any] = {}
        for module in twin.modules():
            if isinstance(module, RECURRENT) and why_not(module) is None:
                custom[type(module)] = _pruner(package, lambda m: m.hidden_size, lambda m: m.input_size, False)
                module.__dict__["forward"] = types.MethodType(_stand_in, module)
            elif module is not twin and _unknown(module):
                custom[type(module)] = _pruner(package, lambda m: None, lambda m: None, True)
        self._parameters = {id(p): name for name, p in twin.named_parameters()}
        self._graph = package.DependencyGraph()
        order: list[str] = []
        for module in names:
            module.register_forward_pre_hook(lambda m, args: order.append(names[m]))
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._graph.build_dependency(
                twin, inputs, forward_fn=lambda m, x: call(m, x), customized_pruners=custom, verbose=False
            )
        self._names = names
        self._modules = {name: module for module, name in names.items()}
        self._types = package.ops.OPTYPE
        #: Names of the modules in the order in which they were called, once for each call.
        self.order = order

    def reach(self, name: str, count: int) -> list[Reached]:
        """Where the ``count`` outputs of the layer called ``name`` go; ValueError names what is in the way."""
        module = self._modules[name]
        if module not in self._graph.module2node:
            raise ValueError(f"{name} took no part in the forward pass of the example, or nothing depends on it")
        pruner = self._graph.get_pruner_of_module(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = self._graph.get_pruning_group(module, pruner.prune_out_channels, list(range(count)))
        kinds, found = self._types, []
        passing = {kinds.CONCAT, kinds.SPLIT, kinds.ELEMENTWISE, kinds.RESHAPE, kinds.UNBIND, kinds.EXPAND, kinds.SLICE}
        for i in range(len(group)):
            node, positions, units = group[i].dep.target, group[i].idxs, group[i].root_idxs
            if node.type in passing:
                continue
            if node.type == kinds.OUTPUT:
                raise ValueError(f"the outputs of {name} are outputs of the network, which must stay")
            if node.type == kinds.PARAMETER:
                parameter = self._parameters.get(id(node.module), "a parameter")
                raise ValueError(f"the units of {name} meet {parameter}, which belongs to no layer that can be cut")
            side: Side = "in" if group[i].dep.handler.__name__ == "prune_in_channels" else "out"
            found.append(Reached(self._names[node.module], side, torch.tensor(positions), torch.tensor(units)))
        return found

    def norm_after(self, name: str) -> str | None:
        """The BatchNorm that alone reads the layer's output, directly; None if there is none."""
        node = self._graph.module2node.get(self._modules[name])
        if node is None or len(set(node.outputs)) != 1:
            return None
        after = node.outputs[0].module
        return self._names[after] if isinstance(after, nn.modules.batchnorm._BatchNorm) else None
