"""`SparseWeight`: a weight as a pool of slots."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils.hooks import RemovableHandle

from rewire import budget, random, topology
from rewire.budget import Limits
from rewire.nn.optimizers import followers
from rewire.nn.optimizers.followers import carry_optimizer_state
from rewire.nn.weight import loading, seal
from rewire.nn.weight.candidates import Candidates
from rewire.nn.weight.events import Event, Follower
from rewire.nn.weight.twin import refuse_data_parallel, refuse_torchscript
from rewire.ops import Capture, Pair, regrow_, walk_and_regrow_
from rewire.topology import Index, TopologyError
from rewire.topology import limits as limited

__all__ = ["SparseWeight"]

_LISTS = Index._fields
_LISTS_OF = itemgetter(*_LISTS)
_NEW: Any = tuple.__new__
#: What to do where parameters are cut up between ranks.
SHARDED = (
    ": sparse weights must be whole on every rank, so use "
    "DistributedDataParallel(rewire.distributed.prepare(model)) instead, or leave the sparse "
    "layers out of it"
)


class SparseWeight(nn.Module):
    """A weight of which only chosen connections exist; storage, gradient and optimizer state are
    O(K).

    The weight stands for a tensor of ``shape`` (output dimension first); as a matrix it is
    ``shape[0]`` rows by ``prod(shape[1:])`` columns. Slot k of the pool is the connection
    ``(rows[k], cols[k])`` with value ``values[k]``, or empty (both -1, value 0).

    Attributes:
        values: 1-D `torch.nn.Parameter` of length ``capacity``, an ordinary one for optimizers,
            clipping, AMP, DDP.
        rows, cols: integer buffers of length ``capacity`` (int32 while everything fits, else
            int64).
        capture: None, or a list (or alike) to which the layer's next backward passes append a
            `rewire.ops.Pair` of input and gradient of the output, one per call.
        candidates: None, or dormant connections on trial (`rewire.nn.Candidates`), whose gradients
            the next backward passes find; None again after any change of the pool.
        traced: whether a compiled graph has used the weight; compiled layers cannot be captured.
        shared_seed: None, or the seed that all ranks agreed on (`rewire.distributed.prepare`).
        before_change: None, or called before each change of topology, which it may refuse by
            raising.
        limits: None, or limits on fan-in, fan-out and blocks, which every topology of this weight
            keeps.

    Args:
        shape: of the dense weight this stands for, at least two dimensions.
        connections, density: the budget, exactly one of them; 1 <= K <= M.
        capacity: slots, at least K (the default). More is for methods that move budget between
            layers.
        limits: see `rewire.budget.Limits`; of the weight as a matrix.
        generator: draws the topology; torch's default generator otherwise.

    Raises:
        ValueError: a budget or capacity outside its limits, or limits within which K connections do
        not fit.

    Cost: construction O(K log K) time and O(K + rows + cols) memory; nothing here allocates rows x
    cols but `to_dense`.
    """

    values: nn.Parameter
    rows: Tensor
    cols: Tensor
    limits: Limits | None
    candidates: Candidates | None
    _owner: weakref.ref[object] | None
    _drawn: bool
    _seal: seal.Seal | None
    _mark: int | None
    _feeds: object
    _fed: object
    _first: bool

    def __init__(
        self,
        shape: Sequence[int],
        connections: int | None = None,
        *,
        density: float | None = None,
        capacity: int | None = None,
        limits: Limits | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = topology.matrix_size(shape)
        connections = budget.allowed(size[0] * size[1], connections, density)
        if limits is not None:
            limits.check(*size, connections)
        self._allocate(torch.Size(shape), capacity, connections, device, dtype, limits)
        if self.values.device.type != "meta":
            self._fill(*self._drawn_topology(generator))

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
        """A pool with the given connections, in the given slots' order. Raises `TopologyError` if
        they cannot be.
        """
        if not rows.shape == cols.shape == values.shape or rows.dim() != 1:
            raise TopologyError(
                "rows, cols and values must be 1-D and equally long, "
                f"not {tuple(rows.shape)}, {tuple(cols.shape)} and {tuple(values.shape)}"
            )
        topology.matrix_size(shape)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._allocate(
            torch.Size(shape),
            capacity,
            rows.numel(),
            device or values.device,
            dtype or values.dtype,
        )
        self._fill(rows.to(self.rows.device), cols.to(self.cols.device))
        with torch.no_grad():
            self.values[: values.numel()] = values.to(self.values)
        return self

    @classmethod
    def from_dense(
        cls, dense: Tensor, *, connections: int | None = None, capacity: int | None = None
    ) -> SparseWeight:
        """The non-zero entries of ``dense``, or its ``connections`` largest in magnitude (ties:
        lowest position).
        """
        rows, cols = topology.matrix_size(dense.shape)
        flat = dense.detach().reshape(-1)
        if connections is None:
            keep = flat.nonzero().flatten()
        else:
            budget.allowed(rows * cols, connections)
            keep = torch.sort(torch.sort(-flat.abs(), stable=True).indices[:connections]).values
        return cls.from_coo(dense.shape, keep // cols, keep % cols, flat[keep], capacity=capacity)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # PyTorch's Transformer layers look for this before they hand weights to fused kernels for
        # dense tensors.
        raise TypeError(
            f"{cls.__name__} is not a tensor: use its layer, or to_dense(), for {function.__name__}"
        )

    # --- what it is -------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight this stands for."""
        return self._shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, cols) of the weight as a matrix."""
        return self._shape[0], math.prod(self._shape[1:])

    @property
    def size(self) -> int:
        """M, the number of potential connections."""
        return math.prod(self._shape)

    @property
    def connections(self) -> int:
        """K, the number of active slots."""
        return self._connections

    @property
    def capacity(self) -> int:
        """C, the number of slots."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """K / M."""
        return self._connections / self.size

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values and the topology."""
        return self.values.device

    @property
    def index(self) -> Index:
        """The derived lists that kernels read (docs/architecture.md); treat as read-only."""
        # asked for at every product: no generator, no attribute look-ups
        b: dict[str, Any] = self._buffers
        return Index(
            b["row_ptr"], b["row_cols"], b["row_slots"], b["col_ptr"], b["col_rows"], b["col_slots"]
        )

    def operand(self) -> tuple[Tensor, Index]:
        """What layers multiply by: `values` and `index`, or those of candidates as well while there
        are any.
        """
        if torch.compiler.is_compiling():  # or exporting, which looks at stand-ins of the tensors
            if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
                self.traced = True
            extra, values = self.candidates, self._own_values()
            return (values, self.index) if extra is None else (extra.values(values), extra.index)
        # As `_check_seal` and `index`, without their calls: this is part of every forward pass.
        b: dict[str, Any] = self._buffers
        rows, cols, row_version, col_version, _, _ = self._seal or seal.BROKEN
        if (
            b["rows"] is not rows
            or b["cols"] is not cols
            or rows._version != row_version
            or cols._version != col_version
        ):
            self._inspect()
        values = self._parameters.get("values")
        if values.__class__ is not nn.Parameter:
            values = self._unusual(values)
        extra = self.candidates
        return (
            (values, _NEW(Index, _LISTS_OF(b)))
            if extra is None
            else (extra.values(values), extra.index)
        )

    def _unusual(self, values: Any) -> Any:
        """For `operand`, where `values` is no ordinary parameter."""
        if values is None:
            values = self.values
        if type(values).__name__ == "DTensor":
            raise RuntimeError(
                f"the values of a sparse weight are a DTensor (tensor parallelism, FSDP2){SHARDED}"
            )
        return values

    def _check_seal(self) -> None:
        """Raise `TopologyError` if positions were written behind the pool's back
        (`rewire.nn.weight.seal`).
        """
        b: dict[str, Any] = self._buffers
        rows, cols, row_version, col_version, _, _ = self._seal or seal.BROKEN
        # Where nothing happened, two numbers are compared.
        if (
            b["rows"] is not rows
            or b["cols"] is not cols
            or rows._version != row_version
            or cols._version != col_version
        ):
            self._inspect()

    def _inspect(self) -> None:
        """The seal does not fit: go on if the topology is what it was all the same."""
        if not torch.compiler.is_compiling():
            with torch.no_grad():
                self._inspect_contents()

    def _inspect_contents(self) -> None:
        rows, cols = self.rows, self.cols
        if self._first and seal.written_once(self._seal, rows, cols, self.index, self.matrix_shape):
            # AveragedModel's first update copies everything, before it asks the averaging function.
            self.__dict__ |= {"_first": False, "_connections": int(self.index.row_ptr[-1].item())}
            self._set_seal(marked=True)
            return
        if not seal.unchanged(self._seal, self._mark, rows, cols, self.index, self.matrix_shape):
            raise seal.refusal(tuple(self._shape))
        if self._seal is not None and rows is self._seal.rows and cols is self._seal.cols:
            self._set_seal()  # not where other tensors stand in for one call

    @property
    def written(self) -> bool:
        """Of a copy that an averaging function feeds: whether it has ever been written to."""
        s = self._seal
        return not self._first or s is None or self.rows._version != s.row_version

    def _ask(self) -> None:
        if self.before_change is not None:
            self.before_change()

    def _set_seal(self, marked: bool = False) -> None:
        """Values, positions and lists belong together now; ``marked``: note as well what is in
        which slot.
        """
        rows, cols = self._buffers["rows"], self._buffers["cols"]
        own = self.__dict__  # setting an attribute of a module takes longer
        own["_seal"] = seal.seal_of(rows, cols, self.index)  # type: ignore[arg-type]
        if marked:
            own["_mark"] = seal.mark_of(rows, cols)  # type: ignore[arg-type]

    def _own_values(self) -> Any:
        """`values`, as a look-up of the attribute ends, but at once: part of every step."""
        values = self._parameters.get("values")
        return self.values if values is None else values

    def active(self) -> Tensor:
        """The active slots in (row, col) order; int64, length K."""
        return self.listed().long()

    def listed(self) -> Tensor:
        """As `active`, a view of the index in its own dtype: read-only."""
        return self._buffers["row_slots"][: self._connections]  # type: ignore[index]

    def coo(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns (int64) and values of the active connections, sorted by (row, col);
        differentiable.
        """
        self._check_seal()
        # A view of the index, which autograd saves: so a rewire before backward raises here as
        # well.
        slots = self.index.row_slots[: self._connections]
        return self.rows[slots].long(), self.cols[slots].long(), self.values[slots]

    def to_dense(self) -> Tensor:
        """The dense tensor of ``shape``, zeros where there is no connection; differentiable.
        Allocates all of it.
        """
        rows, cols, values = self.coo()
        dense = torch.zeros(self.matrix_shape, dtype=self.dtype, device=self.device)
        dense = dense.index_put((rows, cols), values)
        capture = None if torch.compiler.is_compiling() else self.capture
        if capture is not None and dense.requires_grad:  # its gradient is that of all positions
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
        limits = f", {self.limits}" if self.limits is not None else ""
        spare = f", capacity={self.capacity}" if self.capacity != self._connections else ""
        return (
            f"{tuple(self._shape)}, "
            f"connections={self._connections}, "
            f"density={self.density:.4g}{spare}{limits}"
        )

    # --- changing it ------------------------------------------------------------------------------

    @torch.no_grad()
    def rewire(
        self, slots: Tensor, rows: Tensor, cols: Tensor, values: Tensor | float = 0.0
    ) -> None:
        """Overwrite ``slots`` with new connections, in place; nothing else moves.

        Args:
            slots: int64, distinct. rows, cols: integers of the same length; (-1, -1) empties a
                slot.
            values: the new connections' values, a number or a tensor of the same length.

        The slots' gradient starts afresh, and so does the state of every optimizer that follows the
        pool (a method's does; otherwise `rewire.nn.follow_optimizer`); every follower is told. A
        graph recorded before raises on backward. Raises `TopologyError` (nothing changed) on a bad
        slot or position, a duplicate, or more connections than `limits` allow. Cost: one pass over
        the index lists; see `rewire.topology.replace_`.
        """
        new = self._values_for(slots, values)
        if not slots.numel() and not rows.numel() and not cols.numel():
            return
        topology.check_integers(slots=slots)
        self._ask()
        self._check_seal()
        slots = slots.long()
        before = None if self.limits is None else (self.rows.clone(), self.cols.clone())
        connections = topology.replace_(
            self.rows, self.cols, self.index, *self.matrix_shape, slots, rows, cols
        )
        if before is not None and self.limits is not None:
            broken = limited.violation(self.index, *self.matrix_shape, self.limits)
            if broken:
                old = before[0][slots], before[1][slots]
                topology.replace_(self.rows, self.cols, self.index, *self.matrix_shape, slots, *old)
                raise TopologyError(broken)
        self._connections = connections
        if new is None:
            self.values.index_fill_(0, slots, 0.0)
        else:
            self.values[slots] = torch.where(rows.to(new.device) >= 0, new, torch.zeros_like(new))
        self._changed(Event(self, slots))

    def _values_for(self, slots: Tensor, values: object) -> Tensor | None:
        """``values`` of new connections as this weight holds them, ``(len(slots),)``; None for all
        0.

        Raises `TopologyError` for anything but real numbers, one or as many as slots: before
        anything changes.
        """
        if not isinstance(values, Tensor):
            if not isinstance(values, Real):
                raise TopologyError(
                    f"values must be a real number or a tensor of them, not {values!r}"
                )
            number = float(values)
            return (
                torch.full(slots.shape, number, dtype=self.dtype, device=self.device)
                if number
                else None
            )
        if values.shape != slots.shape:
            raise TopologyError(
                f"values must be as many as slots, not {tuple(values.shape)} for "
                f"{tuple(slots.shape)}"
            )
        if (
            values.is_complex()
            or values.is_quantized
            or values.is_meta
            or values.layout != torch.strided
        ):
            kind = "on the meta device" if values.is_meta else f"{values.dtype} and {values.layout}"
            raise TopologyError(f"values must be an ordinary tensor of real numbers, not {kind}")
        return values.detach().to(self.values)

    def regrow(self, slots: Tensor, signs: Tensor, **drawn: Any) -> None:
        """Drop ``slots`` and grow as many random dormant connections there, at zeros whose signs go
        into ``signs``.

        What `rewire` would do with connections from `rewire.topology.sample_dormant`, in one pass;
        ``drawn`` and errors as in `rewire.ops.regrow_`. signs: int8, length capacity. For use in
        every step: call it under `torch.no_grad`.
        """
        if not slots.numel():
            return
        self._ask()
        if self.limits is not None:
            raise ValueError(
                "regrow draws from all dormant connections, and this weight is "
                f"limited to {self.limits}"
            )
        k = regrow_(self.values.detach(), signs, self.rows, self.cols, self.index, slots, **drawn)
        if k != self._connections:
            self._connections = k
        self._changed(Event(self, slots))

    def walk(self, signs: Tensor, shrink: float, noise: float, **drawn: Any) -> Tensor:
        """A step of DEEP R: `rewire.ops.langevin_step_` on the values, then `regrow` in the slots
        that crossed zero.

        Returns those slots (int64, ascending). ``drawn`` and errors as in
        `rewire.ops.walk_and_regrow_`. For use in every step: call it under `torch.no_grad`.
        """
        if self.before_change is not None:
            self.before_change()
        if self.limits is not None:
            raise ValueError(
                "walk draws from all dormant connections, and this weight is "
                f"limited to {self.limits}"
            )
        values, b = self._own_values(), self._buffers
        slots = walk_and_regrow_(
            values,
            signs,
            b["rows"],  # type: ignore[arg-type]
            b["cols"],  # type: ignore[arg-type]
            self.index,
            values.grad,
            shrink,
            noise,
            **drawn,
        )
        if slots.shape[0]:
            self._changed(Event(self, slots), cleared=True)
        else:
            increment_version(values)
        return slots

    @torch.no_grad()
    def resize(self, capacity: int, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Change the number of slots; the only call that does.

        The Parameter object stays, its storage is replaced; optimizer state (of ``optimizers`` and
        of those that follow the pool) moves along and the gradient is cleared. Active slots keep
        their order and, when growing, their number. A compiled model sees a new shape and compiles
        once more. Raises ValueError below K or above M, RuntimeError under DDP, whose buckets have
        a fixed size.
        """
        if capacity < self._connections:
            raise ValueError(
                f"capacity {capacity} is below the {self._connections} active connections: "
                "drop connections first, or choose a larger capacity"
            )
        if capacity > self.size:
            raise ValueError(
                f"capacity {capacity} is above the {self.size} potential connections: choose at "
                "most as many"
            )
        if self.shared_seed is not None:
            raise RuntimeError(
                "a pool prepared for DDP cannot be resized, because DDP's buckets have a fixed "
                "size: "
                "choose capacity= when the layer is made"
            )
        if capacity == self.capacity:
            return
        self._check_seal()
        old = self.capacity
        if capacity > old:
            source = torch.full((capacity,), -1, dtype=torch.int64, device=self.device)
            source[:old] = torch.arange(old, device=self.device)
        else:
            kept = (self.rows >= 0).nonzero().flatten()
            source = torch.full((capacity,), -1, dtype=torch.int64, device=self.device)
            source[: kept.numel()] = kept
        self._move(source)
        for optimizer in optimizers:
            carry_optimizer_state(optimizer, self.values, source)

    @torch.no_grad()
    def reorder(self) -> None:
        """Put the slots in (row, col) order, empty ones last, so that kernels read values as a
        stream.

        A permutation: connections, values, gradients and followers' state stay together.
        """
        self._ask()
        self._check_seal()
        k, index = self._connections, self.index
        slots = self.active()
        rows, cols = self._ordered_positions(slots)
        source = torch.full((self.capacity,), -1, dtype=torch.int64, device=self.device)
        source[:k] = slots
        # The connections stay what they are, so do their lists: only slots have new numbers.
        number = torch.empty(self.capacity, dtype=self.rows.dtype, device=self.device)
        number[slots] = torch.arange(k, dtype=number.dtype, device=self.device)
        index.col_slots[:k] = number[index.col_slots[:k].long()]
        index.row_slots[:k] = torch.arange(k, dtype=number.dtype, device=self.device)
        for own, new in ((self.rows, rows), (self.cols, cols)):
            own[:k] = new
            own[k:] = -1
        self.values.copy_(followers.gathered(self.values, source, 0.0, full=k == self.capacity))
        self._changed(Event(self, source.new_empty(0), source))

    def _ordered_positions(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and cols of ``slots``, which the index lists as the active ones in (row, col) order;
        `TopologyError` if they are not, because something has written to the index or to the pool.
        """
        inside = not slots.numel() or bool(((slots >= 0) & (slots < self.capacity)).all())
        if inside:
            rows, cols = self.rows[slots], self.cols[slots]
            keys = rows.long() * self.matrix_shape[1] + cols.long()
            if bool((rows >= 0).all()) and bool((keys[1:] > keys[:-1]).all()):
                return rows, cols
        raise TopologyError(
            "the index does not list the pool's connections: something has written to its "
            "buffers; change a weight "
            "through rewire() or load_state_dict only"
        )

    def follow(self, follower: Follower) -> RemovableHandle:
        """Tell ``follower`` of every change from now on; ``.remove()`` on the handle ends it.

        Followers belong to this object: copies, pickles and state_dicts do not have them.
        """
        handle = RemovableHandle(self._followers)
        self._followers[handle.id] = follower
        return handle

    def claim(self, owner: object) -> object | None:
        """Note what decides over this pool's topology (weakly); returns what did so before, if it
        is alive.
        """
        before = self._owner() if self._owner is not None else None
        self._owner = weakref.ref(owner)
        return before

    def owner(self) -> object | None:
        """What decides over this pool's topology (see `claim`), if it is alive."""
        return self._owner() if self._owner is not None else None

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draw a new random topology of K connections, in the first K slots, with values 0.

        Layers made on the meta device need it after ``to_empty``; their ``reset_parameters`` calls
        it then.
        """
        self.rows.fill_(-1)
        self.cols.fill_(-1)
        self.values.zero_()
        self._fill(*self._drawn_topology(generator))
        self._changed(Event(self, torch.arange(self.capacity, device=self.device)))
        self._set_seal(marked=True)

    def _drawn_topology(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        size, seed = self.matrix_shape, random.seed_from(generator)
        if self.limits is not None:
            return limited.sample(*size, self._connections, self.limits, seed)
        return topology.sample(*size, self._connections, seed)

    @torch.no_grad()
    def restrict(self, limits: Limits | None, generator: torch.Generator | None = None) -> None:
        """Keep within ``limits`` from now on (None: no longer).

        Where the topology there is does not, a new one is drawn and its connections take the values
        there were, in (row, col) order: for layers that have not been trained. Raises ValueError if
        K connections do not fit.
        """
        if limits is not None:
            limits.check(*self.matrix_shape, self._connections)
        self._limit(limits)
        if (
            limits is None
            or not self._drawn
            or not limited.violation(self.index, *self.matrix_shape, limits)
        ):
            return
        values = self.values.detach()[self.active()]
        self.draw(generator)
        self.values[: values.numel()] = values

    @property
    def drawn(self) -> bool:
        """Whether there is a topology: not on the meta device, nor after ``to_empty`` before `draw`
        or loading.
        """
        return self._drawn

    def touched(self) -> None:
        """Tell autograd that values were changed in place by a native kernel, which does not do so
        itself.
        """
        increment_version([self.values])

    def _changed(self, event: Event, cleared: bool = False) -> None:
        """The one place through which changes of a pool go: version counters, gradient (unless it
        is ``cleared`` in the event's slots already), followers.
        """
        # (Setting an attribute of a module takes longer than an entry of its dict.)
        b: dict[str, Any] = self._buffers
        values, own = self._own_values(), self.__dict__
        rows, cols, lists = b["rows"], b["cols"], _NEW(Index, _LISTS_OF(b))
        increment_version([values, rows, cols, *lists])
        own["_seal"], own["_mark"], own["_first"] = seal.seal_of(rows, cols, lists), None, False
        if self.candidates is not None:
            self.candidates.spoil()
            self.candidates = None
        gradient = None if cleared or event.loaded else values.grad
        if gradient is not None:
            if event.source is not None:
                full = self._connections == event.source.numel()
                gradient.copy_(followers.gathered(gradient, event.source, 0.0, full=full))
            gradient.index_fill_(0, event.slots, 0.0)
        for follower in tuple(self._followers.values()):
            follower(event)

    def _move(self, source: Tensor) -> None:
        """Slot k of the new pool (of another length, that of ``source``) takes what slot source[k]
        had; -1 is empty.
        """
        moved = followers.gathered
        values, rows, cols = (
            moved(self.values, source, 0),
            moved(self.rows, source, -1),
            moved(self.cols, source, -1),
        )
        self.values.grad = None
        self._replace_storage(values, rows, cols)
        topology.build_index(self.rows, self.cols, *self.matrix_shape, out=self.index)
        self._changed(Event(self, source.new_empty(0), source))

    # --- making, copying, loading -----------------------------------------------------------------

    def _allocate(
        self,
        shape: torch.Size,
        capacity: int | None,
        connections: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        limits: Limits | None = None,
    ) -> None:
        self._shape = shape
        self._connections = connections
        # a plain dict takes no weak references
        self._followers: OrderedDict[int, Follower] = OrderedDict()
        self.capture: Capture | None = None
        self.candidates = None
        self.traced = False
        self.shared_seed: int | None = None
        self.before_change: Callable[[], None] | None = None
        self._owner = None
        self._drawn = False
        self._seal = self._mark = None
        # what averages this pool into copies of it, and of a copy, what feeds it
        self._feeds = None
        self._fed = None
        self._first = False  # a copy that is about to be written once as a whole (`rewire.ema`)
        rows, cols = self.matrix_shape
        capacity = connections if capacity is None else capacity
        if not connections <= capacity <= rows * cols:
            raise ValueError(
                f"capacity {capacity} does not fit {connections} connections of {rows * cols} "
                "potential ones: "
                f"choose between {connections} and {rows * cols}"
            )
        kind = topology.index_dtype(rows, cols, capacity)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"values must be of a floating-point dtype, not {dtype}")
        self.values = nn.Parameter(torch.zeros(capacity, device=device, dtype=dtype))
        self.register_buffer("rows", torch.full((capacity,), -1, dtype=kind, device=device))
        self.register_buffer("cols", torch.full((capacity,), -1, dtype=kind, device=device))
        lists = topology.empty_index(rows, cols, capacity, kind, device)
        for name, tensor in zip(_LISTS, lists, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._note("shape", shape)
        self._limit(limits)
        self._set_seal()

    def _note(self, name: str, numbers: Sequence[int] | None) -> None:
        """Let `torch.func.functional_call` take what a state_dict holds besides the pool: it puts
        every entry in the place of a parameter or buffer of that name. Nothing reads these; `shape`
        and `limits` themselves count.
        """
        self._buffers.pop(name, None)
        if numbers is not None:
            self._buffers[name] = torch.tensor(numbers, dtype=torch.int64)

    def _limit(self, limits: Limits | None) -> None:
        self.__dict__["limits"] = limits
        self._note("limits", None if limits is None else limits.as_numbers())

    def _fill(self, rows: Tensor, cols: Tensor) -> None:
        topology.check_integers(rows=rows, cols=cols)
        self.rows[: rows.numel()] = rows.to(self.rows)
        self.cols[: cols.numel()] = cols.to(self.cols)
        fits = (
            (self.rows[: rows.numel()] == rows) & (self.cols[: cols.numel()] == cols) & (rows >= 0)
        )
        if not fits.all():
            k = int((~fits).nonzero()[0])
            raise TopologyError(
                f"connection ({int(rows[k])}, {int(cols[k])}) is outside the {self.matrix_shape} "
                "matrix"
            )
        topology.build_index(self.rows, self.cols, *self.matrix_shape, out=self.index)
        self._drawn = True
        self._set_seal(marked=True)

    def _replace_storage(self, values: Tensor, rows: Tensor, cols: Tensor) -> None:
        """Swap in pools of another capacity; the Parameter object stays the one the optimizer
        knows.
        """
        # Graphs recorded before hold the old tensors, which nothing will touch again: spoil them
        # now.
        increment_version([self.values, self.rows, self.cols, *self.index])
        # Autograd's accumulator for the parameter remembers its size while any old graph is alive;
        # torch makes a new one when the data changes dtype, so pass through another dtype (of no
        # elements) on the way.
        other = torch.float64 if values.dtype != torch.float64 else torch.float32
        self.values.data = values.new_empty(0, dtype=other)
        self.values.data = values
        kind = topology.index_dtype(*self.matrix_shape, values.numel())
        self.rows, self.cols = rows.to(kind), cols.to(kind)
        for name, tensor in zip(
            _LISTS,
            topology.empty_index(*self.matrix_shape, values.numel(), kind, values.device),
            strict=True,
        ):
            setattr(self, name, tensor)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript("torch.jit.script", self)

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)

    def __getstate__(self) -> dict[str, Any]:
        self._check_seal()
        # Followers (an optimizer, a method) and a place among DDP's ranks are not part of the
        # weight: a copy has none.
        own: dict[str, Any] = dict.fromkeys(
            ("capture", "candidates", "shared_seed", "before_change")
        )
        own |= dict.fromkeys(("_owner", "_seal", "_mark", "_feeds"))
        own |= {
            "_fed": self._fed if self._feeds is None else self._feeds,
            "_first": self._feeds is not None,
        }
        return self.__dict__ | own | {"_followers": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_seal(marked=True)  # a copy may be averaged into: so it notes what its slots hold
        if self._fed is not None:
            seal.fed(self._fed).add(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._check_seal()  # moved to another device, the buffers are other tensors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set_seal()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        loading.note(destination, prefix, self._shape, self.limits)

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
        """Check everything, then replace values and topology together; a file of another K goes
        through new storage.
        """
        keys = loading.keys(state_dict, prefix, strict)
        missing_keys.extend(keys.missing)
        unexpected_keys.extend(keys.unexpected)
        if not keys.found:
            return
        try:
            if local_metadata.get("assign_to_params_buffers", False):
                raise TopologyError(
                    "load_state_dict(assign=True) would replace the tensors the optimizer and the "
                    "index "
                    "belong to: load without assign"
                )
            self._take(loading.read(state_dict, prefix, self._shape, self.limits, self.device))
        except (ValueError, RuntimeError) as error:  # TopologyError is a ValueError
            error_msgs.append(f"{prefix[:-1]}: {error}")

    @torch.no_grad()
    def _take(self, saved: loading.Saved) -> None:
        """Become what was saved."""
        values, rows, cols, lists, limits = saved
        capacity = values.numel()
        if capacity != self.capacity:
            if self.shared_seed is not None:
                raise TopologyError(
                    f"the file has {capacity} slots and this pool {self.capacity}, and under DDP "
                    "a pool cannot be "
                    "resized: load before rewire.distributed.prepare"
                )
            self.values.grad = None
            blank = torch.zeros(capacity, device=self.device, dtype=self.dtype)
            self._replace_storage(blank, rows.clone(), cols.clone())
        if self.values.grad is not None:  # of the connections that were there before
            self.values.grad.masked_fill_((self.rows != rows) | (self.cols != cols), 0.0)
        self.values.copy_(values)
        # an optimizer that does not follow may have moved empty slots
        self.values.masked_fill_(rows < 0, 0.0)
        self.rows.copy_(rows)
        self.cols.copy_(cols)
        self._limit(limits)
        self._drawn = True
        for mine, new in zip(self.index, lists, strict=True):
            mine.copy_(new)
        self._connections = int(self.index.row_ptr[-1].item())
        self._changed(Event(self, torch.arange(capacity, device=self.device), loaded=True))
        self._set_seal(marked=True)
