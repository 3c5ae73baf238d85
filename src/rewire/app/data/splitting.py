"""Which samples are held out, of each class in proportion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewire.app.errors import DataError

__all__ = ["check_classes", "stratified"]


def stratified(y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of the samples to keep and of ``count`` to hold out, both ascending.

    Each class has its share of both, rounded by largest remainders, and at least one sample in each
    where it has two and ``count`` allows it.
    """
    order = torch.randperm(len(y), generator=generator)
    by_class = [order[y[order] == c] for c in y.unique().tolist()]
    exact = [count * len(members) / len(y) for members in by_class]
    quotas = [min(max(int(e), 1), len(m) - 1) for e, m in zip(exact, by_class, strict=True)]
    left = count - sum(quotas)
    # those furthest below their share first, or above it where some have to give back
    while left:
        step = 1 if left > 0 else -1
        open_ = [
            i
            for i, (q, m) in enumerate(zip(quotas, by_class, strict=True))
            if (q < len(m) - 1 if step > 0 else q > 1)
        ]
        if not open_:
            open_ = [
                i
                for i, (q, m) in enumerate(zip(quotas, by_class, strict=True))
                if (q < len(m) if step > 0 else q > 0)
            ]
        chosen = max(open_, key=lambda i: (step * (exact[i] - quotas[i]), -i))
        quotas[chosen] += step
        left -= step
    out = torch.cat([m[:q] for q, m in zip(quotas, by_class, strict=True)]).sort().values
    kept = torch.ones(len(y), dtype=torch.bool)
    kept[out] = False
    return kept.nonzero().flatten(), out


def check_classes(y: Tensor, classes: Sequence[str], part: str, whole: Tensor, advice: str) -> None:
    """Raise DataError if a class of all samples, ``whole``, is missing in one part."""
    here = torch.bincount(y, minlength=len(classes))
    there = torch.bincount(whole, minlength=len(classes))
    missing = ((here == 0) & (there > 0)).nonzero().flatten().tolist()
    if missing:
        c = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"class {classes[c]!r}{more} is missing in the {part} part: it has {int(there[c])} of "
            f"{len(whole)} samples; {advice}"
        )
