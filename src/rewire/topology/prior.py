"""Sets of positions: those within which a weight may have connections, and those whose connections
it always keeps.

A position has the *key* ``row * cols + col``. A set is a list of keys in ascending order, so it
takes O(entries) memory, never rows x cols.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from rewire.topology.index import Index, TopologyError

__all__ = ["Positions", "Prior", "active_keys", "contains", "dormant_keys"]


class Positions(NamedTuple):
    """Positions of a matrix, each once.

    keys: int64, ``row * cols + col``, strictly ascending.
    row_ptr: int64, (rows + 1,); the keys of row r are at ``row_ptr[r] : row_ptr[r + 1]``.
    """

    keys: Tensor
    row_ptr: Tensor

    @classmethod
    def of(cls, keys: Tensor, n_rows: int, n_cols: int) -> Positions:
        """The set of ascending ``keys``; O(rows log entries) time."""
        first = torch.arange(n_rows + 1, device=keys.device) * n_cols
        return cls(keys, torch.searchsorted(keys, first))


@dataclass(frozen=True)
class Prior:
    """What is known of a weight's topology beforehand; every topology of the weight keeps it.

    allowed: the positions that connections may have; None for all.
    frozen: int64, ascending keys of connections that are never dropped, all at allowed positions;
        None if no connection is frozen.
    """

    allowed: Positions | None = None
    frozen: Tensor | None = None

    @classmethod
    def of(
        cls, n_rows: int, n_cols: int, allowed: Tensor | None = None, frozen: Tensor | None = None
    ) -> Prior | None:
        """The prior of these keys (int64, in any order; they may repeat), or None without any keys.
        Frozen connections are allowed too.

        Raises `TopologyError` for a key outside of the matrix, or if nothing is allowed.
        """
        for keys in (allowed, frozen):
            _check_range(keys, n_rows, n_cols)
        if frozen is not None:
            frozen = torch.unique(frozen) if frozen.numel() else None
        if allowed is None:
            return None if frozen is None else cls(None, frozen)
        if not allowed.numel():
            raise TopologyError("allowed= has no position: give at least one, or leave it out")
        parts = allowed if frozen is None else torch.cat([allowed, frozen])
        return cls(Positions.of(torch.unique(parts), n_rows, n_cols), frozen)

    @classmethod
    def saved(
        cls, n_rows: int, n_cols: int, allowed: Tensor | None, frozen: Tensor | None
    ) -> Prior | None:
        """As `of`, from tensors of a file: raises `TopologyError` unless they are as `of` makes
        them.
        """
        for name, keys in (("allowed", allowed), ("frozen", frozen)):
            if keys is None:
                continue
            whole = keys.dtype == torch.int64 and keys.dim() == 1 and not keys.is_meta
            if not whole or keys.layout != torch.strided or bool((keys[1:] <= keys[:-1]).any()):
                raise TopologyError(
                    f"{name} must be positions in ascending order (int64, 1-D), each once"
                )
        made = cls.of(n_rows, n_cols, allowed, frozen)
        if allowed is not None and frozen is not None and not contains(allowed, frozen).all():
            raise TopologyError("a frozen connection is at a position that is not allowed")
        return made

    def to(self, device: torch.device) -> Prior:
        """The same on another device."""
        frozen = None if self.frozen is None else self.frozen.to(device)
        if self.allowed is None:
            return Prior(None, frozen)
        return Prior(Positions(*(t.to(device) for t in self.allowed)), frozen)

    def violation(self, index: Index, n_cols: int) -> str | None:
        """In words, what the connections in ``index`` break; None if they keep the prior."""
        keys = active_keys(index, n_cols)
        return self.outside(keys, n_cols) or self.missing(keys, n_cols)

    def outside(self, keys: Tensor, n_cols: int) -> str | None:
        """In words, the first of ``keys`` that is not allowed; None if all are."""
        if self.allowed is None:
            return None
        wrong = (~contains(self.allowed.keys, keys)).nonzero()
        if not wrong.numel():
            return None
        row, col = divmod(int(keys[wrong[0]]), n_cols)
        return (
            f"connection ({row}, {col}) is not at one of the {self.allowed.keys.numel()} allowed "
            "positions"
        )

    def missing(self, keys: Tensor, n_cols: int, frozen: Tensor | None = None) -> str | None:
        """In words, the first frozen connection (or the first of ``frozen``, keys) that is not
        among the ascending ``keys``; None if all are.
        """
        wanted = self.frozen if frozen is None else frozen
        if wanted is None:
            return None
        lost = (~contains(keys, wanted)).nonzero()
        if not lost.numel():
            return None
        row, col = divmod(int(wanted[lost[0]]), n_cols)
        return f"connection ({row}, {col}) is frozen, and cannot be dropped"

    def digest(self) -> str:
        """A hash of the positions, which is the same for equal priors only."""
        found = [b"" if keys is None else keys.cpu().numpy().tobytes() for keys in self.keys()]
        return sha256(len(found[0]).to_bytes(8, "big") + b"".join(found)).hexdigest()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which of "allowed" and "frozen" it has."""
        given = {"allowed": self.allowed, "frozen": self.frozen}
        return tuple(name for name, what in given.items() if what is not None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prior) and all(
            (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(self.keys(), other.keys(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # tensors may change

    def keys(self) -> tuple[Tensor | None, Tensor | None]:
        """Those of the allowed positions, and of the frozen connections."""
        return (None if self.allowed is None else self.allowed.keys), self.frozen

    def __str__(self) -> str:
        given = []
        if self.allowed is not None:
            given.append(f"{self.allowed.keys.numel()} allowed positions")
        if self.frozen is not None:
            given.append(f"{self.frozen.numel()} frozen connections")
        return ", ".join(given)


def contains(keys: Tensor, wanted: Tensor) -> Tensor:
    """Which of ``wanted`` are among the ascending ``keys``; bool. O(wanted log keys)."""
    if not keys.numel():
        return torch.zeros_like(wanted, dtype=torch.bool)
    return keys[torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)] == wanted


def active_keys(index: Index, n_cols: int) -> Tensor:
    """The keys of the connections in ``index``, ascending; int64. O(K + rows)."""
    fan_in = torch.diff(index.row_ptr).long()
    rows = torch.repeat_interleave(torch.arange(fan_in.numel(), device=fan_in.device), fan_in)
    return rows * n_cols + index.row_cols[: rows.numel()].long()


def dormant_keys(allowed: Positions, index: Index, n_cols: int, gone: Tensor) -> Tensor:
    """The allowed keys that are dormant once the connections ``gone`` (keys) are dropped,
    ascending. O(allowed + K log allowed) time, O(allowed) memory.
    """
    free = torch.ones(allowed.keys.numel(), dtype=torch.bool, device=allowed.keys.device)
    free[torch.searchsorted(allowed.keys, active_keys(index, n_cols))] = False
    free[torch.searchsorted(allowed.keys, gone)] = True
    return allowed.keys[free]


def _check_range(keys: Tensor | None, n_rows: int, n_cols: int) -> None:
    if keys is None:
        return
    wrong = ((keys < 0) | (keys >= n_rows * n_cols)).nonzero()
    if wrong.numel():
        row, col = divmod(int(keys[wrong[0]]), n_cols)
        raise TopologyError(f"position ({row}, {col}) is outside the {n_rows} x {n_cols} matrix")
