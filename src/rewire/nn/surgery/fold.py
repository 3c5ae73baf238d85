"""Moves the contribution of units into another unit's columns and into biases, before removal."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from rewire.nn.surgery.graph import Group, Site, UnitGraph

__all__ = ["fold", "takes_constants", "why_no_constants"]


def why_no_constants(graph: UnitGraph, group: Group) -> str | None:
    """Why a unit's constant output cannot go into the biases of the group's consumers; None if it
    can.

    A consumer needs a bias, or a BatchNorm directly behind it, whose running mean serves as well.
    At the borders of a convolution that pads with zeros, and at the first step of a recurrent
    layer, where the state is 0, the input is not that constant, so no bias can replace it.
    """
    for site in group.producers:
        if isinstance(site.module, nn.RNN | nn.LSTM | nn.GRU):
            return f"{site.name} starts from states of 0"
    for site in group.consumers:
        module = site.module
        if isinstance(module, _ConvTransposeNd):
            return (
                f"{site.name} is a transposed convolution, to whose borders fewer inputs contribute"
            )
        if isinstance(module, _ConvNd) and module.padding_mode == "zeros" and _pads(module):
            return f"{site.name} pads with zeros"
        if _bias(module) is None and graph.norm_after(site.name) is None:
            return f"{site.name} has no bias"
    return None


def takes_constants(graph: UnitGraph, group: Group) -> bool:
    """Whether constants fold exactly into the consumers' biases, see `why_no_constants`."""
    return why_no_constants(graph, group) is None


def _pads(module: _ConvNd) -> bool:
    return module.padding == "same" or (not isinstance(module.padding, str) and any(module.padding))


def _bias(module: nn.Module) -> Tensor | None:
    name = "bias_ih_l0" if isinstance(module, nn.RNN | nn.LSTM | nn.GRU) else "bias"
    return module._parameters.get(name)


@torch.no_grad()
def fold(
    graph: UnitGraph,
    group: Group,
    site: Site,
    unit: Tensor,
    constant: Tensor | float = 0.0,
    into: Tensor | None = None,
    factor: Tensor | float = 0.0,
) -> None:
    """Make ``unit`` unnecessary for ``site``, a consumer of ``group``.

    The unit's output must be factor * output of ``into`` + constant. Then factor times the columns
    of ``unit`` is added to those of ``into``, and constant times their sum to the bias. Call
    `UnitGraph.remove` afterwards to remove the unit.

    A recurrent producer is a site as well, with its recurrent columns. Units are 0-dim int64
    tensors, numbered as traced. Raises ValueError, before anything changes, for a constant that
    cannot be folded exactly.
    """
    has_constant = bool(torch.as_tensor(constant).abs().max() > 0)
    if has_constant and (reason := why_no_constants(graph, group)) is not None:
        raise ValueError(f"a constant cannot be folded for the units of {group.name}: {reason}")
    module = site.module
    weight, dim = _columns(module, recurrent=site in group.producers)
    source = graph.positions(site, unit.reshape(1))[0]
    columns = weight.index_select(dim, source)
    if into is not None:
        target = graph.positions(site, into.reshape(1))[0]
        weight.index_add_(dim, target, columns * factor)
    if not has_constant:
        return
    others = [d for d in range(columns.dim()) if d != _rows(module)]
    given = columns.double().sum(dim=others) * constant
    bias = _bias(module)
    if bias is not None:
        bias += given.to(bias.dtype)
        return
    norm = graph.norm_after(site.name)
    assert norm is not None  # why_no_constants
    # Without running statistics, the norm subtracts the constant with the batch's mean.
    if norm.running_mean is not None:
        norm.running_mean -= given.to(norm.running_mean.dtype)


def _rows(module: nn.Module) -> int:
    return 1 if isinstance(module, _ConvTransposeNd) else 0


def _columns(module: nn.Module, *, recurrent: bool) -> tuple[Tensor, int]:
    """The weight that reads incoming units, and the dimension that counts them."""
    if isinstance(module, nn.RNN | nn.LSTM | nn.GRU):
        return module.get_parameter("weight_hh_l0" if recurrent else "weight_ih_l0"), 1
    return module.get_parameter("weight"), 0 if isinstance(module, _ConvTransposeNd) else 1
