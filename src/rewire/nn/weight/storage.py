"""The tensors of a sparse weight: its slots, its index, and the check that they belong together."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from rewire import topology
from rewire.budget import Limits
from rewire.nn.weight import seal
from rewire.nn.weight.candidates import Candidates
from rewire.nn.weight.events import Follower
from rewire.nn.weight.shape import Shaped
from rewire.nn.weight.twin import refuse_data_parallel, refuse_torchscript
from rewire.ops import Capture
from rewire.topology import Index, Prior, TopologyError
from rewire.topology import limits as limited

__all__ = ["SHARDED", "Storage", "index_of"]

_LISTS = Index._fields
_LISTS_OF = itemgetter(*_LISTS)
_NEW: Any = tuple.__new__
#: What to do where parameters are sharded: the end of several error messages.
SHARDED = (
    ": sparse weights must be whole on every rank, so use "
    "DistributedDataParallel(rewire.distributed.prepare(model)) instead, or leave the sparse "
    "layers out of it"
)


def index_of(buffers: dict[str, Any]) -> Index:
    """The index among the buffers of a weight; faster than `Storage.index`, not for compilers."""
    index: Index = _NEW(Index, _LISTS_OF(buffers))
    return index


class Storage(Shaped):
    """Values, positions and index of a sparse weight; `rewire.nn.SparseWeight` describes them.

    This class makes and replaces the tensors, hands them to layers (`operand`), and notices when
    something else has written to the positions (`rewire.nn.weight.seal`).
    """

    values: nn.Parameter
    rows: Tensor
    cols: Tensor
    limits: Limits | None
    prior: Prior | None
    candidates: Candidates | None
    _owner: weakref.ref[object] | None
    _drawn: bool
    _seal: seal.Seal | None
    _mark: int | None
    _feeds: object
    _fed: object
    _first: bool

    # --- what it is -------------------------------------------------------------------------------

    @property
    def positions(self) -> int:
        """How many positions connections may have: M, or the number of those that are allowed."""
        prior = self.prior
        return self.size if prior is None or prior.allowed is None else prior.allowed.keys.numel()

    @property
    def dormant(self) -> int:
        """How many positions a connection could grow at."""
        return self.positions - self._connections

    @property
    def bound(self) -> bool:
        """Whether there are limits, allowed positions or frozen connections to be kept."""
        return self.limits is not None or self.prior is not None

    def is_frozen(self, slots: Tensor) -> Tensor:
        """Which of ``slots`` (int64) hold frozen connections; bool."""
        if self.prior is None or self.prior.frozen is None:
            return torch.zeros_like(slots, dtype=torch.bool)
        return topology.contains(self.prior.frozen, self.keys_of(slots))

    def keys_of(self, slots: Tensor) -> Tensor:
        """The flat positions (int64, ``row * cols + col``) of the connections in ``slots``."""
        return self.rows[slots].long() * self.matrix_shape[1] + self.cols[slots].long()

    @property
    def connections(self) -> int:
        """K, the number of active slots."""
        return self._connections

    @property
    def capacity(self) -> int:
        """C, the number of slots."""
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values and the topology."""
        return self.values.device

    @property
    def drawn(self) -> bool:
        """Whether there is a topology. There is none on the meta device, nor after ``to_empty``
        until `SparseWeight.draw` or loading.
        """
        return self._drawn

    @property
    def index(self) -> Index:
        """The lists by row and by column that kernels read (docs/architecture.md); read-only."""
        # Every product asks for it: no generator, no attribute look-ups.
        b: dict[str, Any] = self._buffers
        return Index(
            b["row_ptr"], b["row_cols"], b["row_slots"], b["col_ptr"], b["col_rows"], b["col_slots"]
        )

    def stored_values(self) -> Any:
        """The parameter `values` without the slow attribute look-up of `torch.nn.Module`."""
        values = self._parameters.get("values")
        return self.values if values is None else values

    # --- what layers read -------------------------------------------------------------------------

    def operand(self) -> tuple[Tensor, Index]:
        """What a layer multiplies by: values and index, with those of the candidates if there are
        any.
        """
        if torch.compiler.is_compiling():  # or exporting, which looks at stand-ins of the tensors
            if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
                self.traced = True
            extra, values = self.candidates, self.stored_values()
            return (values, self.index) if extra is None else (extra.values(values), extra.index)
        # The code of `check_positions` and `index_of` again: this is part of every forward pass,
        # and two calls would make it measurably slower.
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
        if extra is None:
            return values, _NEW(Index, _LISTS_OF(b))
        return extra.values(values), extra.index

    def _unusual(self, values: Any) -> Any:
        """For `operand`, where `values` is not an ordinary parameter."""
        if values is None:
            values = self.values
        if type(values).__name__ == "DTensor":
            raise RuntimeError(
                f"the values of a sparse weight are a DTensor (tensor parallelism, FSDP2){SHARDED}"
            )
        return values

    # --- whether the tensors belong together ------------------------------------------------------

    def check_positions(self) -> None:
        """Raise `TopologyError` if rows or cols were written by anything but this class."""
        b: dict[str, Any] = self._buffers
        rows, cols, row_version, col_version, _, _ = self._seal or seal.BROKEN
        # As long as nobody wrote, this compares two objects and two numbers.
        if (
            b["rows"] is not rows
            or b["cols"] is not cols
            or rows._version != row_version
            or cols._version != col_version
        ):
            self._inspect()

    def _inspect(self) -> None:
        """The seal does not fit: raise, unless the topology is still the same."""
        if not torch.compiler.is_compiling():
            with torch.no_grad():
                self._inspect_contents()

    def _inspect_contents(self) -> None:
        rows, cols = self.rows, self.cols
        if self._first and seal.written_once(self._seal, rows, cols, self.index, self.matrix_shape):
            # The first update of `AveragedModel` copies every tensor before it calls the averaging
            # function.
            self.__dict__ |= {"_first": False, "_connections": int(self.index.row_ptr[-1].item())}
            self._set_seal(marked=True)
            return
        if not seal.unchanged(self._seal, self._mark, rows, cols, self.index, self.matrix_shape):
            raise seal.refusal(tuple(self._shape))
        if self._seal is not None and rows is self._seal.rows and cols is self._seal.cols:
            self._set_seal()  # not where other tensors stand in for the length of one call

    def feed_copies(self, feeder: object) -> None:
        """Let an averaging function, or what stands for it, update the copies made from now on.

        They then trust its first write, and are listed by `rewire.nn.weight.seal.fed`.
        """
        self._feeds = feeder

    @property
    def written(self) -> bool:
        """For a copy that an averaging function updates: whether it has been written to yet."""
        s = self._seal
        return not self._first or s is None or self.rows._version != s.row_version

    def _set_seal(self, marked: bool = False) -> None:
        """Declare that values, positions and index belong together now.

        ``marked``: also take a hash of which connection is in which slot.
        """
        rows, cols = self._buffers["rows"], self._buffers["cols"]
        own = self.__dict__  # setting an attribute of a module takes longer
        own["_seal"] = seal.seal_of(rows, cols, self.index)  # type: ignore[arg-type]
        if marked:
            own["_mark"] = seal.mark_of(rows, cols)  # type: ignore[arg-type]

    # --- making and replacing the tensors ---------------------------------------------------------

    def _allocate(
        self,
        shape: torch.Size,
        capacity: int | None,
        connections: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        limits: Limits | None = None,
        prior: Prior | None = None,
    ) -> None:
        """Make all attributes and tensors, with empty slots."""
        self._shape = shape
        self._connections = connections
        # An ordered one, because handles refer to it weakly, which a plain dict does not allow.
        self._followers: OrderedDict[int, Follower] = OrderedDict()
        self.capture: Capture | None = None
        self.candidates = None
        self.traced = False
        self.shared_seed: int | None = None
        self.part = 0
        self.before_change: Callable[[], None] | None = None
        self._owner = None
        self._drawn = False
        self._seal = self._mark = None
        # For `rewire.ema`: the averaging function that reads this weight, the one that updates it
        # (if this is a copy), and whether such a copy is still to be written for the first time.
        self._feeds = None
        self._fed = None
        self._first = False
        rows, cols = self.matrix_shape
        capacity = connections if capacity is None else capacity
        if not connections <= capacity <= rows * cols:
            raise ValueError(
                f"capacity {capacity} does not fit {connections} connections of {rows * cols} "
                f"potential ones: choose between {connections} and {rows * cols}"
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
        self._expect(prior)
        self._set_seal()

    def _note(self, name: str, numbers: Sequence[int] | None) -> None:
        """Keep ``numbers`` as a buffer, because a state_dict has an entry of that name.

        `torch.func.functional_call` needs a parameter or buffer for each entry. Nothing reads
        these buffers; the attributes `shape` and `limits` count.
        """
        self._buffers.pop(name, None)
        if numbers is not None:
            self._buffers[name] = torch.tensor(numbers, dtype=torch.int64)

    def _limit(self, limits: Limits | None) -> None:
        self.__dict__["limits"] = limits
        self._note("limits", None if limits is None else limits.as_numbers())

    def _expect(self, prior: Prior | None) -> None:
        """Keep ``prior`` from now on."""
        if prior is not None and self.values.device.type != "meta":
            prior = prior.to(self.values.device)
        self.__dict__["prior"] = prior
        # As in `_note`: nothing reads these buffers.
        keys = {
            "allowed": None if prior is None or prior.allowed is None else prior.allowed.keys,
            "frozen": None if prior is None else prior.frozen,
        }
        for name, tensor in keys.items():
            self._buffers.pop(name, None)
            if tensor is not None:
                self._buffers[name] = tensor

    def _broken(self, index: Index) -> str | None:
        """What the connections in ``index`` break of limits and prior, in words; None if they keep
        them.
        """
        size = self.matrix_shape
        broken = None if self.limits is None else limited.violation(index, *size, self.limits)
        if broken is None and self.prior is not None:
            broken = self.prior.violation(index, size[1])
        return broken

    def _fill(self, rows: Tensor, cols: Tensor) -> None:
        """Put connections into the first slots and build the index."""
        topology.check_integers(rows=rows, cols=cols)
        n = rows.numel()
        self.rows[:n] = rows.to(self.rows)
        self.cols[:n] = cols.to(self.cols)
        fits = (self.rows[:n] == rows) & (self.cols[:n] == cols) & (rows >= 0)
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
        """Put tensors of another capacity in place; the Parameter stays the object that optimizers
        know. The index is blank afterwards.
        """
        # Graphs recorded before hold the old tensors, which nothing will write again: let their
        # backward passes raise.
        increment_version([self.values, self.rows, self.cols, *self.index])
        # Autograd's accumulator for the parameter remembers its size while any old graph is alive;
        # torch makes a new one when the data changes dtype, so go by way of another dtype, without
        # elements.
        other = torch.float64 if values.dtype != torch.float64 else torch.float32
        self.values.data = values.new_empty(0, dtype=other)
        self.values.data = values
        capacity, size = values.numel(), self.matrix_shape
        kind = topology.index_dtype(*size, capacity)
        self.rows, self.cols = rows.to(kind), cols.to(kind)
        lists = topology.empty_index(*size, capacity, kind, values.device)
        for name, tensor in zip(_LISTS, lists, strict=True):
            setattr(self, name, tensor)

    # --- copies -----------------------------------------------------------------------------------

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript("torch.jit.script", self)

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)

    def __getstate__(self) -> dict[str, Any]:
        self.check_positions()
        # What follows the weight (an optimizer, a method) and its place among DDP's ranks do not
        # belong to it, so copies go without.
        gone = ("capture", "candidates", "shared_seed", "before_change")
        own: dict[str, Any] = dict.fromkeys((*gone, "_owner", "_seal", "_mark", "_feeds"))
        own["_fed"] = self._fed if self._feeds is None else self._feeds
        own["_first"] = self._feeds is not None
        own["_followers"] = OrderedDict()
        return self.__dict__ | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_seal(marked=True)  # averages may be written to a copy
        if self._fed is not None:
            seal.fed(self._fed).add(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.check_positions()  # on another device the buffers are other tensors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._expect(self.prior)
        self._set_seal()
        return self
