"""What hooks see of a call, whatever it comes in."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from rewire.nn.forward.tensors import first_input, first_tensor, head, map_tensors, rows, tensors_in

A, B = torch.zeros(3, 2), torch.ones(3)
Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Output:
    a: torch.Tensor
    b: torch.Tensor
    name: str = "x"


@dataclasses.dataclass(slots=True)
class Slots:
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize(
    "x",
    [
        [A, B],
        (A, (B, None)),
        {"a": A, "n": 1, "b": B},
        Output(A, B),
        Slots(A, B),
        Pair(A, B),
        OrderedDict(a=[A], b=B),
        SimpleNamespace(a=A, b={"c": B}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_tensors_are_found_in_every_container(x: Any) -> None:
    found = tensors_in(x)
    assert [id(t) for t in found] == [id(A), id(B)]
    assert first_tensor(x) is A


def test_what_holds_no_tensor_or_itself() -> None:
    loop: list[Any] = [A]
    loop.append(loop)
    assert tensors_in(loop) == [A]
    assert first_tensor({"a": 1}) is None
    assert tensors_in(nn.Linear(2, 2)) == []


def test_a_batch_is_cut_to_its_first_samples_whatever_it_comes_in() -> None:
    batch = {
        "x": torch.ones(5, 2),
        "mask": torch.ones(5),
        "scale": torch.tensor(2.0),
        "table": torch.ones(3),
    }
    cut = head(batch, 2)
    assert {k: tuple(v.shape) for k, v in cut.items()} == {
        "x": (2, 2),
        "mask": (2,),
        "scale": (),
        "table": (3,),
    }
    assert rows(batch) == 5
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    assert rows(packed) == 2
    assert head(packed, 1).data.shape == packed.data.shape
    assert map_tensors(lambda t: t + 1, Pair(A, [B])).b[0].tolist() == [2, 2, 2]


LAYERS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "linear": (nn.Linear(2, 2), {"input": A}),
    "conv": (nn.Conv1d(1, 1, 1), {"input": A}),
    "lstm": (nn.LSTM(2, 2), {"hx": None, "input": A}),
    "cell": (nn.GRUCell(2, 2), {"input": A, "hx": None}),
    "attention": (nn.MultiheadAttention(2, 1), {"value": B, "key": B, "query": A}),
    "norm": (nn.BatchNorm1d(2), {"input": A}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_input_is_found_by_position_and_by_name(name: str) -> None:
    layer, named = LAYERS[name]
    assert first_input(layer, (A,), {}) is A
    assert first_input(layer, (), named) is A
