"""The processes of one run, where `torchrun` has started several: who they are, and what they tell
each other.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "connect"]


class Ranks:
    """The ranks of a run. The first one writes the files and talks; of a run in one process, it is
    all there is.

    Attributes:
        rank, count: the number of this process, and of all.
        restarts: how often torchrun's elastic agent has restarted them.
    """

    def __init__(self, rank: int = 0, count: int = 1, restarts: int = 0) -> None:
        self.rank, self.count, self.restarts = rank, count, restarts

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def part(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of a batch; it may have no samples."""
        if not self.several:
            return x, y
        first, last = (len(y) * n // self.count for n in (self.rank, self.rank + 1))
        return x[first:last], y[first:last]

    def sum(self, *numbers: Tensor) -> None:
        """Sum tensors over the ranks, in place."""
        if self.several:
            for number in numbers:
                dist.all_reduce(number)

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if not self.several:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def of_first(self, value: Any) -> Any:
        """What the first rank says: a number, a word, a tuple of them or None."""
        if not self.several:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def lost(self, error: RuntimeError) -> bool:
        """Whether ``error`` says that another rank has ended."""
        words = "another rank did not come", "Connection closed", "Connection reset", "Broken pipe"
        return self.several and any(word in str(error) for word in words)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.several:
            dist.barrier()

    def leave(self) -> None:
        """At the end of the run."""
        if self.several and dist.is_initialized():
            dist.destroy_process_group()


def connect() -> Ranks:
    """The ranks that torchrun has started, connected by gloo; one where it has not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count > 1:
        own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if own and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # On one machine the agent's store outlives its workers, and still has the addresses of
            # those that were killed.
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            agent = dist.TCPStore(*place, count, is_master=False)  # type: ignore[attr-defined]
            store = dist.PrefixStore(f"rewire/{restarts}", agent)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        else:
            dist.init_process_group("gloo")
    return Ranks(rank, count, int(restarts))
