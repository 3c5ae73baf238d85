"""`RowSharded`: a linear layer whose outputs are divided among the ranks of a process group."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rewire import budget, random
from rewire.nn.layers.initial import Init
from rewire.nn.layers.linear import SparseLinear
from rewire.nn.weight.pool import SparseWeight
from rewire.topology import Positions, Prior

__all__ = ["RowSharded", "clip_grad_norm_", "told_by_all"]


def told_by_all(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What each rank of ``group`` says, in their order; this one says ``mine``, pickled."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


class RankRows:
    """The process group of a layer, and which rows its ranks have. Copies of a layer share it."""

    def __init__(self, group: dist.ProcessGroup | None, rows: int) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        #: Where the rows of each rank begin, and the number of all of them.
        self.bounds = [rows * rank // self.count for rank in range(self.count + 1)]

    @property
    def mine(self) -> tuple[int, int]:
        """First and last row (exclusive) of this rank."""
        return self.bounds[self.rank], self.bounds[self.rank + 1]

    def collect(self, mine: Tensor, lengths: list[int] | None = None) -> Tensor:
        """The tensors of all ranks, one behind the other along dimension 0. ``lengths`` are their
        sizes along it; without it the ranks tell each other.
        """
        if lengths is None:
            own = torch.tensor([len(mine)], device=mine.device)
            found = [torch.empty_like(own) for _ in range(self.count)]
            dist.all_gather(found, own, group=self.group)
            lengths = [int(length) for length in found]
        # Backends ask for parts of one size.
        padded = mine.new_zeros((max(lengths), *mine.shape[1:]))
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def refuse_different(self, weight: SparseWeight) -> None:
        """ValueError, on all ranks, unless theirs are equal."""
        mine = (
            tuple(weight.shape),
            weight.connections,
            str(weight.limits),
            weight.prior and weight.prior.digest(),
            weight.fingerprint() if weight.drawn else None,
        )
        everyone = told_by_all(mine, self.group)
        if any(theirs != everyone[0] for theirs in everyone):
            raise ValueError(
                "the layers differ between ranks (shape, connections, limits, hashes of prior and "
                f"topology): {everyone}; make the same layer on all ranks, or make it on the meta "
                "device"
            )

    def refuse_any(self, problem: str) -> None:
        """ValueError, on all ranks, if one has a ``problem``."""
        for rank, theirs in enumerate(told_by_all(problem, self.group)):
            if theirs:
                raise ValueError(f"rank {rank} of {self.count}: {theirs}")

    def __deepcopy__(self, memo: object) -> RankRows:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer that is divided among ranks cannot be pickled: save its state_dict"
        )


class _Spread(torch.autograd.Function):
    """x as it is; its gradient is the sum of what all ranks send back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: RankRows) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.ranks.group)
        return total, None


class _Gather(torch.autograd.Function):
    """The outputs of all ranks beside each other; a rank's gradient is that of its own outputs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: RankRows) -> Tensor:
        ctx.ranks = ranks
        lengths = [last - first for first, last in pairwise(ranks.bounds)]
        # By feature, as the products write it: then a rank's part is one piece of memory.
        whole = ranks.collect(y.reshape(-1, y.shape[-1]).t(), lengths)
        return whole.t().view(*y.shape[:-1], ranks.bounds[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        first, last = ctx.ranks.mine
        return gradient[..., first:last], None


class RowSharded(nn.Module):
    """A `SparseLinear` whose rows (outputs) are divided among the ranks of a process group; made by
    `rewire.distributed.shard_rows`.

    ``shard`` is the `SparseLinear` of this rank's rows. Every rank reads the same batch and gets
    all outputs: y = x W^T + b, (..., in_features) -> (..., out_features).

    Cost: O(K / ranks) memory besides activations; a forward pass gathers outputs, a backward pass
    sums the gradients of x over the ranks.
    """

    rows: Tensor

    def __init__(self, shard: SparseLinear, ranks: RankRows) -> None:
        super().__init__()
        self.in_features, self.out_features = shard.in_features, ranks.bounds[-1]
        self.shard, self.ranks = shard, ranks
        #: First and last row (exclusive) of this rank, and all rows; saved, so that a state is not
        #: loaded by another rank.
        self.register_buffer("rows", torch.tensor([*ranks.mine, ranks.bounds[-1]]))

    def forward(self, input: Tensor) -> Tensor:
        """y for x; all ranks must call this with the same x."""
        y: Tensor = _Gather.apply(self.shard(_Spread.apply(input, self.ranks)), self.ranks)  # type: ignore[no-untyped-call]
        return y.contiguous() if self.shard.contiguous_output else y

    def whole(self) -> SparseLinear:
        """The layer in one piece, on every rank, with the connections and values of now. All ranks
        must call this. O(K) memory.
        """
        rows, cols, values = self.shard.weight.coo()
        parts = rows + self.ranks.mine[0], cols, values.detach()
        rows, cols, values = (self.ranks.collect(part.contiguous()) for part in parts)
        shape = self.out_features, self.in_features
        weight = SparseWeight.from_coo(shape, rows, cols, values)
        weight.restrict(self.shard.weight.limits)
        weight.expect(self._whole_prior())
        bias = self.shard.bias
        return SparseLinear.from_weight(
            weight,
            None if bias is None else self.ranks.collect(bias.detach()),
            contiguous_output=self.shard.contiguous_output,
        )

    def _whole_prior(self) -> Prior | None:
        prior = self.shard.weight.prior
        said = torch.zeros(2, dtype=torch.int64)
        if prior is not None:
            said += torch.tensor([prior.allowed is not None, prior.frozen is not None])
        # Another rank may have frozen connections where this one has no such.
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.ranks.group)
        own = (
            [None, None] if prior is None else [prior.allowed and prior.allowed.keys, prior.frozen]
        )
        shift, none = self.ranks.mine[0] * self.in_features, torch.empty(0, dtype=torch.int64)
        keys = [
            self.ranks.collect(none if part is None else part + shift) if known else None
            for part, known in zip(own, said.tolist(), strict=True)
        ]
        return Prior.of(self.out_features, self.in_features, *keys)

    def extra_repr(self) -> str:
        first, last = self.ranks.mine
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rows {first} to "
            f"{last - 1} on rank {self.ranks.rank} of {self.ranks.count}"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        saved = state_dict.get(prefix + "rows")
        if saved is not None and not torch.equal(saved.cpu(), self.rows.cpu()):
            raise ValueError(
                f"{prefix}rows: the state has rows {saved.tolist()} (first, last, all), and this "
                f"rank has {self.rows.tolist()}: load the file that this rank saved, or whole() of "
                "the layer before shard_rows"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_` (2-norm) for a model with layers that `shard_rows` has
    divided: all ranks' parts count, so all ranks scale alike. Returns the norm before. All ranks
    must call this after backward.
    """
    groups: dict[int, tuple[RankRows, list[Tensor]]] = {}
    divided: set[int] = set()
    for module in model.modules():
        if isinstance(module, RowSharded):
            own = groups.setdefault(id(module.ranks.group), (module.ranks, []))[1]
            own.extend(p.grad for p in module.parameters() if p.grad is not None)
            divided.update(id(p) for p in module.parameters())
    found = [p for p in model.parameters() if p.grad is not None]
    total = torch.zeros((), dtype=torch.float64)
    for p in found:
        if id(p) not in divided and p.grad is not None:
            total += p.grad.double().square().sum().cpu()
    for ranks, gradients in groups.values():
        part = torch.zeros((), dtype=torch.float64)
        for gradient in gradients:
            part += gradient.double().square().sum().cpu()
        dist.all_reduce(part, group=ranks.group)
        total += part
    norm = total.sqrt()
    scale = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
    for p in found:
        if p.grad is not None:
            p.grad.mul_(scale)
    return norm


def cut(
    layer: SparseLinear, group: dist.ProcessGroup | None, seed: int | None, init: Init
) -> tuple[SparseLinear, RankRows]:
    """This rank's rows as a layer, and which rows each rank has; arguments and errors as in
    `rewire.distributed.shard_rows`.
    """
    refuse_limits(layer.weight.limits)
    ranks = RankRows(group, layer.out_features)
    ranks.refuse_different(layer.weight)
    drawn = torch.tensor([random.seed_from() if seed is None else seed])
    dist.broadcast(drawn, dist.get_global_rank(group, 0) if group else 0, group=group)
    own = random.bits(int(drawn), 0, 0, torch.tensor(ranks.rank))
    problem, shard = "", None
    try:
        shard = _rows(layer, ranks, torch.Generator().manual_seed(int(own)), init)
        if not shard.weight.connections:
            problem = "it would have no connection: use fewer ranks, or more connections"
    except ValueError as error:
        problem = str(error)
    ranks.refuse_any(problem)
    assert shard is not None
    shard.weight.part = ranks.rank
    return shard, ranks


def _rows(
    layer: SparseLinear, ranks: RankRows, generator: torch.Generator, init: Init
) -> SparseLinear:
    """The rows of this rank. Of a layer on the meta device they are drawn, on the CPU, so that no
    rank holds the whole.
    """
    weight = layer.weight
    first, last = ranks.mine
    n_cols = layer.in_features
    prior = _rows_of(weight.prior, first, last, n_cols)
    shape = last - first, n_cols
    limits = weight.limits
    if weight.device.type == "meta":
        bounds = _shares(weight, ranks)
        count = bounds[ranks.rank + 1] - bounds[ranks.rank]
        spare = weight.capacity - weight.connections
        own = SparseWeight(
            shape,
            count,
            capacity=min(count + spare // ranks.count, shape[0] * shape[1]),
            limits=limits,
            prior=prior,
            generator=generator,
            dtype=weight.dtype,
        )
        bias = None if layer.bias is None else torch.zeros(shape[0], dtype=weight.dtype)
        made = SparseLinear.from_weight(own, bias, contiguous_output=layer.contiguous_output)
        made.reset_parameters(generator, init=init)
        return made
    rows, cols, values = weight.coo()
    mine = (rows >= first) & (rows < last)
    spare = (weight.capacity - weight.connections) // ranks.count
    own = SparseWeight.from_coo(
        shape,
        rows[mine] - first,
        cols[mine],
        values.detach()[mine],
        capacity=min(int(mine.sum()) + spare, shape[0] * shape[1]),
    )
    own.restrict(limits)
    own.expect(prior)
    bias = None if layer.bias is None else layer.bias.detach()[first:last]
    return SparseLinear.from_weight(own, bias, contiguous_output=layer.contiguous_output)


def _shares(weight: SparseWeight, ranks: RankRows) -> list[int]:
    """How many connections the ranks before each one have together, in proportion to the positions
    of their rows; the last is K.
    """
    prior, n_cols = weight.prior, weight.matrix_shape[1]
    if prior is None or prior.allowed is None:
        before = [bound * n_cols for bound in ranks.bounds]
    else:
        before = [int(prior.allowed.row_ptr[bound]) for bound in ranks.bounds]
    return [weight.connections * positions // before[-1] for positions in before]


def _rows_of(prior: Prior | None, first: int, last: int, n_cols: int) -> Prior | None:
    """What a prior says of some rows."""
    if prior is None:
        return None
    low, high = first * n_cols, last * n_cols

    def inside(keys: Tensor) -> Tensor:
        return keys[(keys >= low) & (keys < high)] - low

    frozen = None if prior.frozen is None else inside(prior.frozen)
    if frozen is not None and not frozen.numel():
        frozen = None
    if prior.allowed is None:
        return None if frozen is None else Prior(None, frozen)
    return Prior(Positions.of(inside(prior.allowed.keys), last - first, n_cols), frozen)


def refuse_limits(limits: budget.Limits | None) -> None:
    """ValueError for limits that no rank can keep for itself."""
    broken = [] if limits is None else [kind for kind in limits.kinds if kind != "fan-in"]
    if broken:
        raise ValueError(
            f"the layer is limited to {limits}, and ranks that have some of its rows do not see "
            f"{' and '.join(broken)}: only a limit on fan-in can be kept"
        )
