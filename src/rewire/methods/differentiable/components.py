"""Single weights, attention heads and branches, as what differentiable sparsification can switch
off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from rewire.methods.differentiable.gates import BranchGate, Elementwise, Gate
from rewire.methods.differentiable.targets import (
    GATE,
    Columns,
    Cutting,
    Target,
    bake_parametrization,
    fitting,
    last_affine,
    make_gate,
    parametrization,
    place_of,
    scale_affine,
    take_off,
    weight_of,
)
from rewire.nn.convert.cut import to_sparse
from rewire.nn.layers.absent import Absent

__all__ = ["Branches", "Heads", "Weights"]


class Weights(Target):
    """Single weights of one layer, under a parametrization."""

    gate: Elementwise

    order = 3

    def __init__(self, model: nn.Module, name: str, kind: Any, options: Mapping[str, Any]) -> None:
        self.model, self.name = model, name
        self.module = model.get_submodule(name)
        weight = weight_of(self.module)
        self.count = weight.numel()
        there = parametrization(self.module)
        if isinstance(there, Elementwise):
            self.gate = fitting(there, name, kind, there.kind)
        else:
            self.gate = Elementwise(weight, kind, **options)
            parametrize.register_parametrization(self.module, "weight", self.gate)

    def parameters(self) -> list[nn.Parameter]:
        return [self.gate.beta]

    def values(self) -> Tensor:
        return weight_of(self.module)

    def bake(self) -> None:
        bake_parametrization(self.module)

    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        there = place_of(self.model, self.module)
        if there is not None:  # not in a branch that is gone
            to_sparse(self.model, {f"{there}.weight": weight_of(self.module) != 0}, optimizers)


class Heads(Target):
    """Heads of a `torch.nn.MultiheadAttention`."""

    order = 4

    def __init__(self, model: nn.Module, name: str, kind: Any, options: Mapping[str, Any]) -> None:
        self.model, self.name = model, name
        module = model.get_submodule(name)
        assert isinstance(module, nn.MultiheadAttention)
        self.module, self.count = module, module.num_heads
        weight = module.out_proj.weight
        there = parametrization(module.out_proj)
        if isinstance(there, Columns):
            self.gate = fitting(there.gate, name, kind, there.gate.kind)
        else:
            self.gate = Gate(
                self.count, kind, keep_one=True, device=weight.device, dtype=weight.dtype, **options
            )
            parametrize.register_parametrization(
                module.out_proj, "weight", Columns(self.gate, module.head_dim)
            )

    def bake(self) -> None:
        self.alive = self.gate() != 0
        bake_parametrization(self.module.out_proj)

    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        there = place_of(self.model, self.module)
        if there is None or bool(self.alive.all()):
            return
        rows = self.alive.repeat_interleave(self.module.head_dim)
        embed, dims = (
            self.module.embed_dim,
            (self.module.embed_dim, self.module.kdim, self.module.vdim),
        )
        masks = {
            f"{there}.{letter}_proj_weight": rows.unsqueeze(1).expand(embed, int(width or embed))
            for letter, width in zip("qkv", dims, strict=True)
        }
        masks[f"{there}.out_proj.weight"] = rows.unsqueeze(0).expand(embed, embed)
        to_sparse(self.model, masks, optimizers)


class Branches(Target):
    """Whole modules, whose outputs are multiplied by the entries of one gate."""

    name = "branches"
    order = 1

    def __init__(
        self, model: nn.Module, names: Sequence[str], kind: Any, options: Mapping[str, Any]
    ) -> None:
        self.model, self.names, self.count = model, list(names), len(names)
        self.modules = [model.get_submodule(name) for name in names]
        like = next(self.modules[0].parameters())
        options = {**options, "device": like.device, "dtype": like.dtype}
        self.gate = make_gate(model, self.name, self.count, kind, options, BranchGate)
        for module in self.modules:
            take_off(module, _gate_branch)
        self._handles = [
            module.register_forward_hook(partial(_gate_branch, self.gate, i))
            for i, module in enumerate(self.modules)
        ]

    def bake(self) -> None:
        self.a = self.gate()
        for handle in self._handles:
            handle.remove()
        delattr(self.model, GATE)
        for module, a in zip(self.modules, self.a, strict=True):
            last = last_affine(module)
            assert last is not None  # `chosen` looked
            scale_affine(last, a)

    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        for name, a in zip(self.names, self.a.tolist(), strict=True):
            if a == 0:
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, Absent())
        left = {id(parameter) for parameter in self.model.parameters()}
        lost = [p for module in self.modules for p in module.parameters() if id(p) not in left]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if all(p is not x for x in lost)]
            for parameter in lost:
                optimizer.state.pop(parameter, None)


def _gate_branch(gate: Gate, number: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    a: Tensor = gate()
    return output * a[number]


# --- choosing -------------------------------------------------------------------------------------
