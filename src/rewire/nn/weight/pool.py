"""`SparseWeight`: a weight of which only chosen connections exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewire import budget, random, topology
from rewire.budget import Limits
from rewire.nn.weight import loading
from rewire.nn.weight.changes import Changes
from rewire.ops import Pair
from rewire.topology import Prior, TopologyError
from rewire.topology import limits as limited

__all__ = ["SparseWeight"]


class SparseWeight(Changes):
    """A weight of which only chosen connections exist; storage, gradient and optimizer state are
    O(K).

    The weight stands for a tensor of ``shape`` (output dimension first); as a matrix it is
    ``shape[0]`` rows by ``prod(shape[1:])`` columns. Its connections live in a pool of slots: slot
    k is the connection ``(rows[k], cols[k])`` with value ``values[k]``, or empty (both -1, value
    0).

    Attributes:
        values: 1-D `torch.nn.Parameter` of length ``capacity``, an ordinary one for optimizers,
            clipping, AMP, DDP.
        rows, cols: integer buffers of length ``capacity`` (int32 while everything fits, else
            int64).
        capture: None, or a list (or anything with ``append``) to which the layer's next backward
            passes append a `rewire.ops.Pair` of input and gradient of the output, one per call.
        candidates: None, or dormant connections on trial (`rewire.nn.Candidates`), whose gradients
            the next backward passes find; None again after any change of the topology.
        traced: whether a compiled graph has used the weight; compiled layers cannot be captured.
        shared_seed: None, or the seed that all ranks agreed on (`rewire.distributed.prepare`).
        part: of a weight that is divided among ranks, the number of this part: random numbers of
            parts are independent.
        before_change: None, or a function that is called before each change of topology and may
            refuse it by raising.
        limits: None, or limits on fan-in, fan-out and blocks, which every topology of this weight
            keeps.
        prior: None, or allowed positions and frozen connections (`rewire.topology.Prior`), which
            every topology of this weight keeps; set it by `expect`.

    Args:
        shape: of the dense weight this stands for, at least two dimensions.
        connections, density: the budget, exactly one of them; 1 <= K <= M.
        capacity: slots, at least K (the default). Methods that move budget between layers need
            more.
        limits: see `rewire.budget.Limits`; they apply to the weight as a matrix.
        prior: see `rewire.topology.Prior`; the first topology has what is frozen.
        start: keys (``row * cols + col``; int64) of connections that the first topology has in any
            case.
        generator: draws the topology; torch's default generator otherwise.

    Raises ValueError for a budget or capacity out of range, or limits and positions within which K
    connections do not fit.

    Cost: construction takes O(K log K) time and O(K + rows + cols) memory. Only `to_dense`
    allocates rows x cols numbers.
    """

    def __init__(
        self,
        shape: Sequence[int],
        connections: int | None = None,
        *,
        density: float | None = None,
        capacity: int | None = None,
        limits: Limits | None = None,
        prior: Prior | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = topology.matrix_size(shape)
        connections = budget.allowed(size[0] * size[1], connections, density)
        if limits is not None:
            limits.check(*size, connections)
        if start is not None and torch.device(device or "cpu").type == "meta":
            raise ValueError(
                "a weight on the meta device has no topology, so it cannot keep given edges: make "
                "it on another device"
            )
        self._allocate(torch.Size(shape), capacity, connections, device, dtype, limits, prior)
        if self.values.device.type != "meta":
            self._fill(*self._drawn_topology(generator, start))

    @classmethod
    def from_coo(
        cls,
        shape: Sequence[int],
        rows: Tensor,
        cols: Tensor,
        values: Tensor,
        *,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SparseWeight:
        """A weight with the given connections, in this order of slots.

        Args:
            rows, cols: integers, 1-D. values: as many numbers.

        Raises `TopologyError` for a position out of range or a duplicate.
        """
        if not rows.shape == cols.shape == values.shape or rows.dim() != 1:
            raise TopologyError(
                f"rows, cols and values must be 1-D and equally long, not {tuple(rows.shape)}, "
                f"{tuple(cols.shape)} and {tuple(values.shape)}"
            )
        topology.matrix_size(shape)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        device, dtype = device or values.device, dtype or values.dtype
        self._allocate(torch.Size(shape), capacity, rows.numel(), device, dtype)
        self._fill(rows.to(self.rows.device), cols.to(self.cols.device))
        with torch.no_grad():
            self.values[: values.numel()] = values.to(self.values)
        return self

    @classmethod
    def from_dense(
        cls, dense: Tensor, *, connections: int | None = None, capacity: int | None = None
    ) -> SparseWeight:
        """A weight of the non-zero entries of ``dense``, or of the ``connections`` largest in
        magnitude (of equal ones, the first in order of position).
        """
        rows, cols = topology.matrix_size(dense.shape)
        flat = dense.detach().reshape(-1)
        if connections is None:
            keep = flat.nonzero().flatten()
        else:
            budget.allowed(rows * cols, connections)
            keep = torch.sort(torch.sort(-flat.abs(), stable=True).indices[:connections]).values
        return cls.from_coo(dense.shape, keep // cols, keep % cols, flat[keep], capacity=capacity)

    # --- reading it -------------------------------------------------------------------------------

    def active(self) -> Tensor:
        """The active slots in (row, col) order; int64, length K."""
        return self.listed().long()

    def listed(self) -> Tensor:
        """As `active`, but a view of the index, in its dtype; read-only."""
        return self._buffers["row_slots"][: self._connections]  # type: ignore[index]

    def coo(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns (int64) and values of the active connections, sorted by (row, col);
        differentiable.
        """
        self.check_positions()
        # Autograd saves this view of the index, so backward raises after a rewire, as in layers.
        slots = self.index.row_slots[: self._connections]
        return self.rows[slots].long(), self.cols[slots].long(), self.values[slots]

    def to_dense(self) -> Tensor:
        """The dense tensor of ``shape``, 0 where there is no connection; differentiable."""
        rows, cols, values = self.coo()
        dense = torch.zeros(self.matrix_shape, dtype=self.dtype, device=self.device)
        dense = dense.index_put((rows, cols), values)
        capture = None if torch.compiler.is_compiling() else self.capture
        if capture is not None and dense.requires_grad:
            # The gradient of `dense` is that of all positions: the product of it and an identity.
            eye = torch.eye(self.matrix_shape[1], dtype=self.dtype, device=self.device)
            dense.register_hook(lambda g: capture.append(Pair(eye, g.detach().t())))
        return dense.reshape(self._shape)

    def fan_in(self) -> Tensor:
        """Connections of each row (int64, length rows)."""
        return torch.diff(self.index.row_ptr).long()

    def fan_out(self) -> Tensor:
        """Connections of each column (int64, length cols)."""
        return torch.diff(self.index.col_ptr).long()

    def fingerprint(self) -> int:
        """A hash of the set of connections."""
        return topology.fingerprint(self.rows, self.cols)

    def extra_repr(self) -> str:
        limits = "".join(f", {kept}" for kept in (self.limits, self.prior) if kept is not None)
        spare = f", capacity={self.capacity}" if self.capacity != self._connections else ""
        return (
            f"{tuple(self._shape)}, connections={self._connections}, "
            f"density={self.density:.4g}{spare}{limits}"
        )

    # --- drawing a topology -----------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draw a new random topology of K connections, in the first K slots, with values 0. Frozen
        connections are among them, whatever was there before.

        A layer made on the meta device needs this after ``to_empty``; its ``reset_parameters``
        calls it then.
        """
        self.rows.fill_(-1)
        self.cols.fill_(-1)
        self.values.zero_()
        self._fill(*self._drawn_topology(generator))
        self.changed(torch.arange(self.capacity, device=self.device))
        self._set_seal(marked=True)

    def _drawn_topology(
        self, generator: torch.Generator | None, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        prior, seed = self.prior, random.seed_from(generator)
        size = *self.matrix_shape, self._connections
        frozen = None if prior is None else prior.frozen
        parts = [part.to(self.device) for part in (start, frozen) if part is not None]
        known = torch.unique(torch.cat(parts)) if parts else None
        allowed = None if prior is None else prior.allowed
        if self.limits is not None:
            return limited.sample(*size, self.limits, seed, allowed=allowed, start=known)
        return topology.sample(*size, seed, allowed=allowed, start=known)

    @torch.no_grad()
    def restrict(self, limits: Limits | None, generator: torch.Generator | None = None) -> None:
        """Keep within ``limits`` from now on (None: no limits any more).

        If the present topology exceeds them, a new one is drawn, and its connections take the
        present values in (row, col) order: this is for layers that have not been trained. Raises
        ValueError if K connections do not fit.
        """
        if limits is not None:
            limits.check(*self.matrix_shape, self._connections)
        self._limit(limits)
        if limits is None or not self._drawn or not self._broken(self.index):
            return
        values = self.values.detach()[self.active()]
        self.draw(generator)
        self.values[: values.numel()] = values

    def expect(self, prior: Prior | None) -> None:
        """Keep to ``prior`` from now on: its allowed positions and its frozen connections (None:
        nothing is known any more).

        Raises `TopologyError`, with nothing changed, if the present topology does not.
        """
        if prior is not None and self._drawn:
            prior = prior.to(self.device)
            broken = prior.violation(self.index, self.matrix_shape[1])
            if broken:
                raise TopologyError(f"the weight does not keep to {prior}: {broken}")
        self._expect(prior)

    # --- saving and loading -----------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        loading.note(destination, prefix, self._shape, self.limits, self.prior)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check everything, then replace values and topology together.

        A state with another number of slots gets new storage.
        """
        keys = loading.keys(state_dict, prefix, strict)
        missing_keys.extend(keys.missing)
        unexpected_keys.extend(keys.unexpected)
        if not keys.found:
            return
        try:
            if local_metadata.get("assign_to_params_buffers", False):
                raise TopologyError(
                    "load_state_dict(assign=True) would replace the tensors that the optimizer and "
                    "the index belong to: load without assign"
                )
            own = self._shape, self.limits, self.prior, self.device
            self._take(loading.read(state_dict, prefix, *own))
        except (ValueError, RuntimeError) as error:  # TopologyError is a ValueError
            error_msgs.append(f"{prefix[:-1]}: {error}")

    @torch.no_grad()
    def _take(self, saved: loading.Saved) -> None:
        """Become what was saved."""
        values, rows, cols, lists, limits, prior = saved
        capacity = values.numel()
        if capacity != self.capacity:
            if self.shared_seed is not None:
                raise TopologyError(
                    f"the file has {capacity} slots and this pool {self.capacity}, and under DDP a "
                    "pool cannot be resized: load before rewire.distributed.prepare"
                )
            self.values.grad = None
            blank = torch.zeros(capacity, device=self.device, dtype=self.dtype)
            self._replace_storage(blank, rows.clone(), cols.clone())
        if self.values.grad is not None:  # of connections that are gone
            self.values.grad.masked_fill_((self.rows != rows) | (self.cols != cols), 0.0)
        self.values.copy_(values)
        # An optimizer that does not follow the weight may have changed empty slots before saving.
        self.values.masked_fill_(rows < 0, 0.0)
        self.rows.copy_(rows)
        self.cols.copy_(cols)
        self._limit(limits)
        self._expect(prior)
        self._drawn = True
        for mine, new in zip(self.index, lists, strict=True):
            mine.copy_(new)
        slots = torch.arange(capacity, device=self.device)
        self.changed(slots, connections=int(self.index.row_ptr[-1].item()), loaded=True)
        self._set_seal(marked=True)
