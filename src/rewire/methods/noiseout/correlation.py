"""How units of a network depend on each other: moments of their outputs, the best pair, and the
merge of two into one.

NoiseOut's step (Babaeizadeh, Smaragdis, Campbell, arXiv 1611.06211): a unit u that is an affine
function of another, h_u = alpha h_v + beta, can be removed if its readers take alpha times its
columns to v's and beta to their biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from rewire.nn.forward.modes import evaluating, rehearsing
from rewire.nn.forward.tensors import first_input
from rewire.nn.surgery import Group, Site, UnitGraph, fold, takes_constants
from rewire.nn.surgery.trace import call

__all__ = ["Merge", "UnitMoments", "measure"]

_TILE = 2**16  # positions that are turned to float64 at a time
_CONSTANT = 1e-10  # variance beside the mean square, below which a unit counts as constant


class _Moments:
    """Sums over all positions seen by one reader: first and second moments around the first tile's
    mean, in float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.first = self.second = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Add observations, (units, positions)."""
        for tile in x.split(_TILE, 1):
            t = tile.double()
            if not self.count:
                self.shift = t.mean(1, keepdim=True)
                self.first = torch.zeros_like(self.shift)
                self.second = torch.zeros(len(t), len(t), dtype=t.dtype, device=t.device)
            t = t - self.shift
            self.first += t.sum(1, keepdim=True)
            self.second.addmm_(t, t.T)
            self.count += t.shape[1]

    def result(self, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Means, the matrix of (centred or plain) second moments, and which units are constant."""
        offset = self.first / self.count
        covariance = self.second / self.count - offset @ offset.T
        mean = (offset + self.shift).flatten()
        plain = covariance + torch.outer(mean, mean)
        variance, square = covariance.diagonal(), plain.diagonal()
        constant = variance <= _CONSTANT * square if centred else square <= 0
        return mean, covariance if centred else plain, constant


@dataclass(frozen=True)
class Merge:
    """Remove ``unit`` of layer ``name``: into unit ``into``, or into the biases where that is None
    (a constant unit).

    Units are numbered as traced. correlation: the smallest |rho| over the readers. damage: the mean
    square error it brings to the readers' pre-activations, sum over readers of |w_u|^2 Var(h_u) (1
    - rho^2).
    """

    name: str
    unit: int
    into: int | None
    correlation: float
    damage: float


class UnitMoments:
    """Moments of one group's units as each reader sees them; rows and columns of removed units are
    deleted.

    Where constants cannot be folded (`rewire.nn.surgery.why_no_constants`) dependence is through
    the origin: beta = 0 and second moments take the place of covariances; a merge is then exact for
    units that are proportional.
    """

    def __init__(self, graph: UnitGraph, group: Group) -> None:
        self.graph, self.group = graph, group
        self.centred = takes_constants(graph, group)
        recurrent = [s for s in group.producers if isinstance(s.module, nn.RNN | nn.LSTM | nn.GRU)]
        self.readers: list[Site] = [*group.consumers, *recurrent]
        self.units = group.alive.clone()
        self._sums = [_Moments() for _ in self.readers]

    def hooks(self) -> list[Any]:
        """Hooks that add what the readers see that have seen nothing yet, until they are
        removed.
        """
        handles = []
        for site, sums in zip(self.readers, self._sums, strict=True):
            if not sums.count:
                table = self.graph.positions(site, self.units)
                handles.append(_watch(site, table, sums.add, own=site in self.group.producers))
        return handles

    def unseen(self) -> list[str]:
        """The readers that were not called."""
        return [
            site.name for site, sums in zip(self.readers, self._sums, strict=True) if not sums.count
        ]

    def finish(self) -> None:
        """All data were seen: compute means, moments and correlations."""
        results = [sums.result(self.centred) for sums in self._sums]
        self._means = [mean for mean, _, _ in results]
        self._second = [matrix for _, matrix, _ in results]
        self.constant = torch.stack([constant for _, _, constant in results]).all(0)
        self._correlation = self._correlations()

    def _correlations(self) -> Tensor:
        """The smallest |rho| over readers, (units, units); -1 on the diagonal and where a unit is
        constant.
        """
        least = torch.ones(())
        for matrix in self._second:
            scale = matrix.diagonal().clamp(min=0).sqrt()
            rho = (matrix / torch.outer(scale, scale)).abs().clamp(max=1)
            least = torch.minimum(least.to(rho), torch.nan_to_num(rho, nan=-1.0, posinf=-1.0))
        least = least.clone()
        least.fill_diagonal_(-1)
        least[self.constant] = -1
        least[:, self.constant] = -1
        return least

    def _norms(self) -> list[Tensor]:
        """Squared norm of each unit's columns, one entry per unit, for each reader."""
        found = []
        for site in self.readers:
            weight, dim = _columns(site, own=site in self.group.producers)
            squares = weight.detach().double().square()
            squares = squares.sum([d for d in range(squares.dim()) if d != dim])
            found.append(squares[self.graph.positions(site, self.units).to(squares.device)].sum(1))
        return found

    def _damages(self) -> Tensor:
        """damage[u, v] of merging u into v, (units, units)."""
        total = torch.zeros_like(self._correlation)
        for matrix, norms in zip(self._second, self._norms(), strict=True):
            own = matrix.diagonal().clamp(min=0)
            left = own[:, None] - matrix.square() / own[None, :]
            total += norms[:, None] * torch.nan_to_num(left, nan=torch.inf, posinf=torch.inf).clamp(
                min=0
            )
        return total

    def best(self, criterion: str) -> Merge | None:
        """The next merge: constant units first, then the pair with the largest |rho| (or the least
        damage).
        """
        if len(self.units) < 2:
            return None
        if bool(self.constant.any()):
            u = int(self.constant.nonzero()[0])
            return Merge(self.group.name, int(self.units[u]), None, 1.0, 0.0)
        damages = self._damages()
        if criterion == "damage":
            damages = damages.masked_fill(self._correlation < 0, torch.inf)
            flat = int(damages.argmin())
        else:
            flat = int(self._correlation.argmax())
        u, v = divmod(flat, len(self.units))
        if float(damages[v, u]) < float(damages[u, v]):
            u, v = v, u
        if float(self._correlation[u, v]) < 0:
            return None
        rho, damage = float(self._correlation[u, v]), float(damages[u, v])
        return Merge(self.group.name, int(self.units[u]), int(self.units[v]), rho, damage)

    def coefficients(self, merge: Merge) -> list[tuple[float, float]]:
        """(alpha, beta) for each reader: the least-squares fit of the unit by the one it merges
        into.
        """
        u = int(torch.searchsorted(self.units, merge.unit))
        if merge.into is None:
            return [(0.0, float(mean[u])) for mean in self._means]
        v = int(torch.searchsorted(self.units, merge.into))
        found = []
        for mean, matrix in zip(self._means, self._second, strict=True):
            alpha = float(matrix[u, v] / matrix[v, v])
            found.append((alpha, float(mean[u] - alpha * mean[v]) if self.centred else 0.0))
        return found

    def fold(self, merge: Merge) -> None:
        """Let all readers do without the unit; `UnitGraph.remove` and `forget` come after."""
        unit = torch.tensor(merge.unit)
        into = None if merge.into is None else torch.tensor(merge.into)
        for site, (alpha, beta) in zip(self.readers, self.coefficients(merge), strict=True):
            fold(self.graph, self.group, site, unit, beta, into, alpha)

    def forget(self, unit: int) -> None:
        """Delete a removed unit's row and column; nothing else changes in its layer."""
        keep = self.units != unit
        self.units, self.constant = self.units[keep], self.constant[keep.to(self.constant.device)]
        self._correlation = self._correlation[keep][:, keep]
        self._means = [mean[keep] for mean in self._means]
        self._second = [matrix[keep][:, keep] for matrix in self._second]


def _columns(site: Site, *, own: bool) -> tuple[Tensor, int]:
    module = site.module
    if isinstance(module, nn.RNN | nn.LSTM | nn.GRU):
        return module.get_parameter("weight_hh_l0" if own else "weight_ih_l0"), 1
    return module.get_parameter("weight"), 0 if isinstance(
        module, nn.modules.conv._ConvTransposeNd
    ) else 1


def _watch(site: Site, table: Tensor, add: Callable[[Tensor], None], *, own: bool) -> Any:
    """A hook that hands on what a reader sees, as (units, positions)."""

    def see(x: Any) -> None:
        data: Tensor = x.data if isinstance(x, PackedSequence) else x
        if isinstance(site.module, _ConvNd):
            channels = data.dim() - len(site.module.kernel_size) - 1
            data = data.movedim(channels, -1)
        # (units, places of each, positions)
        picked = data.reshape(-1, data.shape[-1]).T[table.to(data.device)]
        add(picked.reshape(len(table), -1))

    if own:
        return site.module.register_forward_hook(lambda module, args, out: see(out[0]))
    return site.module.register_forward_pre_hook(
        lambda module, args, kwargs: see(first_input(module, args, kwargs)), with_kwargs=True
    )


def measure(
    graph: UnitGraph, names: Iterable[str], batches: Iterable[Any]
) -> dict[str, UnitMoments]:
    """Moments of the units of the named layers over ``batches`` of inputs, in eval mode; of layers
    with readers that only training calls (an auxiliary head), what these read in training mode,
    with random factors at their expectation.

    Layers of which some reader is never called with these batches are left out. ``batches`` is gone
    through twice where a reader was not called in eval mode. Cost: a forward pass over the data,
    and O(units^2) for each position; memory O(units^2).
    """
    found = {name: UnitMoments(graph, graph.group(name)) for name in names}
    with evaluating(graph.model):
        _pass(graph.model, found.values(), batches)
    if any(moments.unseen() for moments in found.values()):
        with rehearsing(graph.model, train=True), torch.no_grad():
            _pass(graph.model, found.values(), batches)
    found = {name: moments for name, moments in found.items() if not moments.unseen()}
    for moments in found.values():
        moments.finish()
    return found


def _pass(model: nn.Module, found: Iterable[UnitMoments], batches: Iterable[Any]) -> None:
    handles = [handle for moments in found for handle in moments.hooks()]
    try:
        for batch in batches:
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
