"""How a sparse weight changes its topology, and whom it tells."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.hooks import RemovableHandle

from rewire import topology
from rewire.nn.optimizers.followers import carry_optimizer_state, gathered
from rewire.nn.weight import seal
from rewire.nn.weight.events import Event, Follower
from rewire.nn.weight.storage import Storage, index_of
from rewire.topology import Prior, TopologyError
from rewire.topology import limits as limited

__all__ = ["Changes"]


class Changes(Storage):
    """The changes of a `rewire.nn.SparseWeight`; each ends in `changed`, which tells followers."""

    # --- who is told, and who decides -------------------------------------------------------------

    def follow(self, follower: Follower) -> RemovableHandle:
        """Tell ``follower`` of every change from now on; ``.remove()`` on the handle ends it.

        Followers belong to this object: copies, pickles and state_dicts do not have them.
        """
        handle = RemovableHandle(self._followers)
        self._followers[handle.id] = follower
        return handle

    @property
    def followers(self) -> tuple[Follower, ...]:
        """Who is told of changes."""
        return tuple(self._followers.values())

    def claim(self, owner: object) -> object | None:
        """Note what decides over this weight's topology, by a weak reference.

        Returns the previous owner, if it is still alive.
        """
        before = self.owner()
        self._owner = weakref.ref(owner)
        return before

    def owner(self) -> object | None:
        """What decides over this weight's topology (see `claim`), if it is alive."""
        return self._owner() if self._owner is not None else None

    def touched(self) -> None:
        """Tell autograd that a native kernel has changed values in place, which it cannot see."""
        increment_version([self.values])

    def changed(
        self,
        slots: Tensor,
        source: Tensor | None = None,
        *,
        connections: int | None = None,
        loaded: bool = False,
        cleared: bool = False,
    ) -> None:
        """Complete a change: adapt version counters, seal and gradient, and tell the followers.

        Every change of a topology must end here, whether a method of this class makes it or a
        native kernel.

        Args:
            slots, source, loaded: the fields of `Event`.
            connections: K from now on, if it is another number.
            cleared: whether the gradient of ``slots`` is 0 already.
        """
        # This may run in every step, so it avoids the slow attribute look-ups and assignments of
        # torch.nn.Module.
        b: dict[str, Any] = self._buffers
        values, own = self.stored_values(), self.__dict__
        rows, cols, lists = b["rows"], b["cols"], index_of(b)
        increment_version([values, rows, cols, *lists])
        own["_seal"], own["_mark"], own["_first"] = seal.seal_of(rows, cols, lists), None, False
        if connections is not None:
            own["_connections"] = connections
        if self.candidates is not None:
            self.candidates.spoil()
            self.candidates = None
        gradient = None if cleared or loaded else values.grad
        if gradient is not None:
            if source is not None:
                full = self._connections == source.numel()
                gradient.copy_(gathered(gradient, source, 0.0, full=full))
            gradient.index_fill_(0, slots, 0.0)
        event = Event(self, slots, source, loaded)  # type: ignore[arg-type]
        for follower in tuple(self._followers.values()):
            follower(event)

    def _ask(self) -> None:
        if self.before_change is not None:
            self.before_change()

    # --- the changes ------------------------------------------------------------------------------

    @torch.no_grad()
    def rewire(
        self, slots: Tensor, rows: Tensor, cols: Tensor, values: Tensor | float = 0.0
    ) -> None:
        """Overwrite ``slots`` with new connections, in place; nothing else moves.

        The gradient of these slots becomes 0, and the state of every optimizer that follows the
        weight starts afresh there (a method makes its optimizer follow; otherwise call
        `rewire.nn.follow_optimizer`). A graph recorded before raises on backward.

        Args:
            slots: int64, distinct.
            rows, cols: integers, as many as slots; (-1, -1) empties a slot.
            values: of the new connections, a number or a tensor with one for each slot.

        Raises `TopologyError`, with nothing changed, for a bad slot or position, a duplicate, more
        connections than `limits` allow, a position that is not allowed, or a frozen connection that
        would be gone. Cost: one pass over the index; see `rewire.topology.replace_`.
        """
        new = self._values_for(slots, values)
        if not slots.numel() and not rows.numel() and not cols.numel():
            return
        topology.check_integers(slots=slots)
        self._ask()
        self.check_positions()
        slots = slots.long()
        gone = None
        if self.bound:
            topology.check_slots(slots, self.capacity)
            gone = self.rows[slots], self.cols[slots]
        pool = self.rows, self.cols, self.index, *self.matrix_shape
        connections = topology.replace_(*pool, slots, rows, cols)
        if gone is not None:
            broken = None
            if self.limits is not None:
                broken = limited.violation(self.index, *self.matrix_shape, self.limits)
            if broken is None and self.prior is not None:
                broken = self._unexpected(self.prior, rows, cols, *gone)
            if broken:
                topology.replace_(*pool, slots, *gone)
                raise TopologyError(broken)
        if new is None:
            self.values.index_fill_(0, slots, 0.0)
        else:
            self.values[slots] = torch.where(rows.to(new.device) >= 0, new, torch.zeros_like(new))
        self.changed(slots, connections=connections)

    def _unexpected(
        self, prior: Prior, rows: Tensor, cols: Tensor, old_rows: Tensor, old_cols: Tensor
    ) -> str | None:
        """What connections at (rows, cols) in the place of the old ones break of ``prior``, in
        words. O(n log n) for n of them.
        """
        n_cols = self.matrix_shape[1]
        new, old = (
            torch.sort(r[r >= 0].long() * n_cols + c[r >= 0].long()).values
            for r, c in ((rows.to(self.device), cols.to(self.device)), (old_rows, old_cols))
        )
        lost = None
        if prior.frozen is not None:
            lost = prior.missing(new, n_cols, old[topology.contains(prior.frozen, old)])
        return lost or prior.outside(new, n_cols)

    def _values_for(self, slots: Tensor, values: object) -> Tensor | None:
        """``values`` as a tensor like `values`, one for each slot; None if all are 0.

        Raises `TopologyError` for anything but real numbers, one or as many as slots.
        """
        if not isinstance(values, Tensor):
            if not isinstance(values, Real):
                raise TopologyError(
                    f"values must be a real number or a tensor of them, not {values!r}"
                )
            number = float(values)
            if not number:
                return None
            return torch.full(slots.shape, number, dtype=self.dtype, device=self.device)
        if values.shape != slots.shape:
            raise TopologyError(
                f"values must be as many as slots, not {tuple(values.shape)} for "
                f"{tuple(slots.shape)}"
            )
        strided = values.layout == torch.strided and not values.is_quantized
        if values.is_complex() or values.is_meta or not strided:
            kind = "on the meta device" if values.is_meta else f"{values.dtype} and {values.layout}"
            raise TopologyError(f"values must be an ordinary tensor of real numbers, not {kind}")
        return values.detach().to(self.values)

    @torch.no_grad()
    def resize(self, capacity: int, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Change the number of slots; no other call does.

        The Parameter object stays, its storage is replaced. The state of ``optimizers``, and of
        those that follow the weight, moves along; the gradient is removed. Active slots keep their
        order and, when the weight gets more slots, their numbers. A compiled model sees a new shape
        and compiles once more.

        Raises ValueError below K or above M, and RuntimeError under DDP, whose buckets have a fixed
        size.
        """
        if capacity < self._connections:
            raise ValueError(
                f"capacity {capacity} is below the {self._connections} active connections: drop "
                "connections first, or choose a larger capacity"
            )
        if capacity > self.size:
            raise ValueError(
                f"capacity {capacity} is above the {self.size} potential connections: choose at "
                "most as many"
            )
        if self.shared_seed is not None:
            raise RuntimeError(
                "a pool prepared for DDP cannot be resized, because DDP's buckets have a fixed "
                "size: choose capacity= when the layer is made"
            )
        old = self.capacity
        if capacity == old:
            return
        self.check_positions()
        if capacity > old:
            kept = torch.arange(old, device=self.device)
        else:
            kept = (self.rows >= 0).nonzero().flatten()
        source = torch.full((capacity,), -1, dtype=torch.int64, device=self.device)
        source[: kept.numel()] = kept
        new = [gathered(t, source, empty) for t, empty in self._slots()]
        self.values.grad = None
        self._replace_storage(*new)
        topology.build_index(self.rows, self.cols, *self.matrix_shape, out=self.index)
        self.changed(source.new_empty(0), source)
        for optimizer in optimizers:
            carry_optimizer_state(optimizer, self.values, source)

    def _slots(self) -> tuple[tuple[Tensor, int], ...]:
        """Values, rows and cols, and what each is in an empty slot."""
        return (self.values, 0), (self.rows, -1), (self.cols, -1)

    @torch.no_grad()
    def reorder(self) -> None:
        """Put the slots in (row, col) order, empty ones last, so that kernels read values in one
        stream.

        Connections, values, gradients and followers' state move together.
        """
        self._ask()
        self.check_positions()
        k, index = self._connections, self.index
        slots = index.row_slots[:k].long()
        rows, cols = self._ordered_positions(slots)
        source = torch.full((self.capacity,), -1, dtype=torch.int64, device=self.device)
        source[:k] = slots
        # The connections stay the same, and so does the index, but for the numbers of slots.
        number = torch.empty(self.capacity, dtype=self.rows.dtype, device=self.device)
        number[slots] = torch.arange(k, dtype=number.dtype, device=self.device)
        index.col_slots[:k] = number[index.col_slots[:k].long()]
        index.row_slots[:k] = torch.arange(k, dtype=number.dtype, device=self.device)
        for own, new in ((self.rows, rows), (self.cols, cols)):
            own[:k] = new
            own[k:] = -1
        self.values.copy_(gathered(self.values, source, 0.0, full=k == self.capacity))
        self.changed(source.new_empty(0), source)

    def _ordered_positions(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and cols of ``slots``, which the index lists as the active ones in (row, col) order.

        Raises `TopologyError` if they are not: something has written to the index or the positions.
        """
        inside = not slots.numel() or bool(((slots >= 0) & (slots < self.capacity)).all())
        if inside:
            rows, cols = self.rows[slots], self.cols[slots]
            keys = rows.long() * self.matrix_shape[1] + cols.long()
            if bool((rows >= 0).all()) and bool((keys[1:] > keys[:-1]).all()):
                return rows, cols
        raise TopologyError(
            "the index does not list the pool's connections: something has written to its buffers; "
            "change a weight through rewire() or load_state_dict only"
        )
