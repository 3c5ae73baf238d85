"""Calls of every native function, and damage done to their arguments; for test_attack.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from problems import Problem
from rewire import topology

#: What a damaged number may be. (Nothing between: as a length, some gigabytes would be granted.)
NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 2**62, 2**63 - 1)
#: What an entry of a damaged list may be, as far as its dtype holds it.
ENTRIES = (*NUMBERS, 2**31 - 1, 2**31 - 2, 2**31, 100, 10**7)

Call = Callable[[random.Random, int], list[Any]]


def _pool(
    choose: random.Random, rows: int, cols: int, connections: int, *, spare: int = 0
) -> Problem:
    """Random connections in random slots, ``spare`` of them empty; the dense matrix is left out."""
    kind = choose.choice((torch.int32, torch.int64))
    row, col = (torch.full((connections + spare,), -1, dtype=kind) for _ in range(2))
    keys, slots = (
        torch.randperm(rows * cols)[:connections],
        torch.randperm(connections + spare)[:connections],
    )
    row[slots], col[slots] = (keys // cols).to(kind), (keys % cols).to(kind)
    values = torch.randn(
        connections + spare, dtype=choose.choice((torch.float32, torch.float32, torch.float64))
    )
    values[row < 0] = 0
    index = topology.build_index(row, col, rows, cols)
    return Problem(index, values, row, col, values.new_empty(0), (rows, cols))


def _parts(choose: random.Random, size: int) -> dict[str, Any]:
    """A pool of about ``size`` connections with its index, and tensors that go with it."""
    side = 3 + (size // 20 if size < 1000 else 2 * int(size**0.5))
    rows, cols = choose.randint(side // 3 + 1, side), choose.randint(side // 3 + 1, side)
    connections = min(choose.randint(size // 2, size), rows * cols // 2)
    p = _pool(choose, rows, cols, connections, spare=choose.randint(0, 3))
    kind = p.index.row_ptr.dtype
    batch = choose.choice((0, 1, 3, 16, 33))
    active = (p.rows >= 0).nonzero().flatten()
    count = choose.randint(0, active.numel())
    dropped = active[torch.randperm(active.numel())[:count]]
    order = torch.argsort(p.rows[dropped], stable=True)
    return {
        "rows": p.rows.to(kind),
        "cols": p.cols.to(kind),
        "by_row": list(p.by_row),
        "by_col": list(p.by_col),
        "index": [*p.by_row, *p.by_col],
        "values": p.values,
        "signs": torch.where(p.values < 0, -1, 1).to(torch.int8),
        "gradient": torch.randn_like(p.values),
        "x": torch.randn(cols, batch, dtype=p.values.dtype).t(),
        "g": torch.randn(rows, batch, dtype=p.values.dtype).t(),
        "bias": torch.randn(rows, dtype=p.values.dtype) if choose.random() < 0.5 else None,
        "slots": dropped,
        "dropped": [p.rows[dropped[order]].long(), p.cols[dropped[order]].long()],
        "shape": [rows, cols],
        "free": rows * cols - connections + count,
        "kept": torch.rand(p.values.numel()) < 0.8,
        "scores": torch.randn(rows, cols, dtype=p.values.dtype),
    }


def _draws(choose: random.Random, count: int) -> list[int]:
    return [choose.randint(0, 2**40) for _ in range(count)]


def _flag(choose: random.Random, _: dict[str, Any]) -> list[bool]:
    return [choose.random() < 0.5]


def _conv(choose: random.Random, name: str) -> list[Any]:
    rank, groups = choose.randint(1, 3), choose.choice((1, 2))
    inputs, outputs, kernel = (
        2 * choose.randint(1, 2),
        2 * choose.randint(1, 2),
        [choose.randint(1, 3)] * rank,
    )
    size, batch = [choose.randint(3, 6) for _ in range(rank)], choose.randint(0, 3)
    columns = inputs // groups * kernel[0] ** rank
    connections = choose.randint(0, outputs * columns // 2)
    p = _pool(choose, outputs, columns, connections)
    lists = list(p.by_col if name == "conv_input_gradient" else p.by_row)
    stride, padding, dilation = [choose.randint(1, 2)] * rank, [1] * (2 * rank), [1] * rank
    out = [(n + 2 - (k - 1) - 1) // s + 1 for n, k, s in zip(size, kernel, stride, strict=True)]
    x, g = (
        torch.randn(batch, n, *s, dtype=p.values.dtype) for n, s in ((inputs, size), (outputs, out))
    )
    geometry = [kernel, stride, padding, dilation, groups]
    if name == "conv":
        return [*lists, p.values, x, None, columns, *geometry, choose.random() < 0.5]
    if name == "conv_input_gradient":
        return [*lists, p.values, g, size, inputs, *geometry, choose.random() < 0.5]
    return [*lists, p.values.numel(), g, x, columns, *geometry]


def _frozen(choose: random.Random, size: int) -> list[Any]:
    """Of a frozen layer with values of float32, int8 or one bit (two lists a row, by sign)."""
    kind = choose.choice(("float", "int8", "ternary"))
    rows, features = choose.randint(1, 1 + size // 4), choose.randint(1, 1 + size // 4)
    counts = torch.randint(0, features + 1, (rows * (2 if kind == "ternary" else 1),))
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    connections = int(ptr[-1])
    values = {
        "float": torch.randn(connections),
        "int8": torch.randint(-127, 128, (connections,)).to(torch.int8),
        "ternary": None,
    }[kind]
    return [
        ptr.to(choose.choice((torch.int32, torch.int64))),
        torch.randint(0, features, (connections,)).to(choose.choice((torch.uint16, torch.int32))),
        values,
        None if kind == "float" else torch.rand(rows),
        torch.randn(choose.choice((0, 1, 3, 16, 33)), features),
        torch.randn(rows) if choose.random() < 0.5 else None,
    ]


def _of(*build: Any) -> Call:
    """A call whose arguments are named parts, or functions of (choose, parts) that give lists of
    them.
    """

    def make(choose: random.Random, size: int) -> list[Any]:
        parts = _parts(choose, size)
        out: list[Any] = []
        for item in build:
            found = item(choose, parts) if callable(item) else parts[item]
            out += found if isinstance(found, list) else [found]
        return out

    return make


#: By the name of a native function: valid arguments for it, drawn anew by every call.
CALLS: dict[str, Call] = {
    "frozen_linear": _frozen,
    "distinct": lambda c, n: [c.randint(0, n), n + c.randint(0, n), *_draws(c, 3), 0],
    "multiply_adds": lambda c, n: [torch.randn(c.randint(1, 3), 192 * n), c.randint(0, 9), True],
    "position_signs": _of("dropped", lambda c, _: _draws(c, 2)),
    "build_index_": _of("rows", "cols", "shape", "index"),
    "replace_": _of("rows", "cols", "index", "shape", "slots", "dropped"),
    "candidates": _of(
        "by_row",
        lambda c, p: [
            p["shape"][1],
            torch.tensor([c.randint(0, p["free"] - 1) for _ in range(5 * (p["free"] > 0))]),
        ],
        "dropped",
    ),
    "sample_dormant": _of(
        "by_row",
        lambda c, p: [p["shape"][1], c.randint(0, p["free"])],
        "dropped",
        lambda c, _: _draws(c, 3),
    ),
    "sample_dormant_in_rows": _of(
        "by_row", lambda _, p: [p["shape"][1]], "dropped", lambda c, _: _draws(c, 3)
    ),
    "langevin_step_": _of(
        "values", "rows", "signs", lambda c, _: [1e-3, c.choice((0.0, 1e-2)), *_draws(c, 3)]
    ),
    "add_normal_": _of("values", lambda c, _: [0.1, *_draws(c, 3)]),
    "regrow_": _of(
        "values",
        "signs",
        "rows",
        "cols",
        "index",
        "slots",
        lambda c, _: [*_draws(c, 4), c.random() < 0.5],
    ),
    "walk_and_regrow_": _of(
        "values",
        "signs",
        "rows",
        "cols",
        "index",
        "gradient",
        lambda c, _: [0.3, c.choice((0.0, 0.5)), *_draws(c, 5), c.random() < 0.5],
    ),
    "spmm": _of("by_row", "values", "x", "bias", _flag, _flag),
    "sddmm": _of("by_row", lambda _, p: [p["values"].numel()], "g", "x", _flag),
    "spmm_sddmm": _of("by_col", "values", "x", "g", _flag),
    "feature_major": _of("x"),
    "batch_major": _of("x"),
    "above": _of(
        "scores",
        lambda _, p: [0],
        "by_row",
        "kept",
        lambda c, _: [c.uniform(-2, 2), c.random() < 0.5],
    ),
    "above_drawn": _of(
        "scores",
        lambda _, p: [0],
        "by_row",
        "kept",
        lambda c, _: [c.uniform(-2, 2), 1e-6, *_draws(c, 3)],
    ),
    "age_step_": _of(
        lambda c, p: [
            torch.randint(-1, 900, p["values"].shape, dtype=c.choice((torch.int16, torch.int32)))
        ],
        "values",
        "gradient",
        lambda c, p: [
            p["gradient"].square(),
            p["signs"].to(p["values"]) if c.random() < 0.5 else None,
        ],
        lambda _, p: [torch.rand(800, dtype=p["values"].dtype) + 0.1 for _ in range(4)],
        lambda c, _: [0.9, 0.2, 1.0, 0.1, 0.01, 0.1, c.random() < 0.5, c.random() < 0.5, 700],
    ),
    "uniforms": _of(lambda _, p: [p["dropped"][0]], lambda c, _: _draws(c, 3)),
    "extremes": _of("values", lambda c, p: [c.randint(0, p["values"].numel()), c.random() < 0.5]),
    "weakest": _of("values", "gradient", "slots", lambda c, _: [c.random(), c.random() < 0.5]),
    "conv": lambda c, _: _conv(c, "conv"),
    "conv_input_gradient": lambda c, _: _conv(c, "conv_input_gradient"),
    "conv_value_gradient": lambda c, _: _conv(c, "conv_value_gradient"),
}
# These two take the list without its slots; spmm_sddmm takes the gradient of the output before x.
for _name in ("candidates", "sample_dormant", "sample_dormant_in_rows"):
    CALLS[_name] = (lambda make: lambda c, n: (lambda a: a[:2] + a[3:])(make(c, n)))(CALLS[_name])


def damage(choose: random.Random, arguments: list[Any]) -> None:
    """Spoil one argument, in place: a number, some entries of a list, a dtype, a shape, strides,
    the memory.
    """
    at = choose.randrange(len(arguments))
    old = arguments[at]
    if isinstance(old, bool):
        arguments[at] = not old
    elif isinstance(old, int):
        arguments[at] = choose.choice((*NUMBERS, old - 1, old + 1))
    elif isinstance(old, float):
        arguments[at] = choose.choice((float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e300))
    elif isinstance(old, list):
        arguments[at] = choose.choice((old[:-1], [*old, 1], _one_changed(choose, old)))
    elif isinstance(old, Tensor):
        arguments[at] = _damaged(choose, old, [t for t in arguments if isinstance(t, Tensor)])


def _one_changed(choose: random.Random, numbers: list[int]) -> list[int]:
    changed = list(numbers)
    changed[choose.randrange(len(changed))] = choose.choice((-1, 0, 4, 2**40, 2**63 - 1))
    return changed


def _damaged(choose: random.Random, tensor: Tensor, others: list[Tensor]) -> Tensor:
    ways = ["entries"] * 6 + [
        "dtype",
        "shorter",
        "longer",
        "empty",
        "two",
        "none",
        "strided",
        "meta",
        "shared",
    ]
    way = choose.choice(ways)
    if way == "entries" and tensor.numel() and not tensor.is_meta:
        for _ in range(choose.randint(1, 3)):
            if tensor.is_floating_point():
                new: Any = choose.choice((float("nan"), float("inf"), -float("inf"), 0.0, -1e30))
            elif tensor.dtype == torch.bool:
                new = choose.random() < 0.5
            else:
                limits = torch.iinfo(tensor.dtype)
                new = choose.choice([n for n in ENTRIES if limits.min <= n <= limits.max])
            tensor[tuple(choose.randrange(n) for n in tensor.shape)] = new
        return tensor
    if way == "dtype":
        return tensor.to(
            choose.choice(
                (torch.int32, torch.int64, torch.float32, torch.float64, torch.int8, torch.bool)
            )
        )
    if way in ("shorter", "longer"):
        flat = tensor.reshape(-1)
        return (
            flat[:-1].clone()
            if way == "shorter"
            else torch.cat([flat, flat[:3], flat.new_zeros(1)])
        )
    if way == "empty":
        return tensor.new_empty(0)
    if way == "two":
        return tensor.unsqueeze(0)
    if way == "none":
        return tensor.new_zeros(())
    if way == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if way == "meta":
        return tensor.to("meta")
    if way == "shared":
        return choose.choice(others)
    return tensor
