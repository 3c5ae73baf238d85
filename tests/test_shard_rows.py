"""Layers whose rows are divided among 2 and 3 processes, against layers in one piece."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn, optim

import rewire
from rewire import methods
from rewire.budget import Limits
from rewire.distributed import shard_rows
from rewire.nn import SparseLinear, sparse_weights

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux",
    reason="needs gloo on Linux",
)


def layer(**options: Any) -> SparseLinear:
    """The same on all ranks; 13 rows divide evenly neither by 2 nor by 3."""
    g = torch.Generator().manual_seed(5)
    return SparseLinear(20, 13, generator=g, **({"connections": 70} | options))


class InOnePiece(nn.Module):
    """What all ranks have together, in one process: an ordinary layer for each part."""

    def __init__(self, whole: SparseLinear, count: int) -> None:
        super().__init__()
        bounds = [whole.out_features * rank // count for rank in range(count + 1)]
        rows, cols, values = whole.weight.coo()
        self.parts = nn.ModuleList()
        for part, (first, last) in enumerate(itertools.pairwise(bounds)):
            mine = (rows >= first) & (rows < last)
            weight = rewire.nn.SparseWeight.from_coo(
                (last - first, 20), rows[mine] - first, cols[mine], values.detach()[mine]
            )
            weight.part = part
            assert whole.bias is not None
            own = SparseLinear.from_weight(weight, whole.bias.detach()[first:last])
            self.parts.append(rewire.distributed.alone(own))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x).t() for part in self.parts]).t()


def a_contiguous_output_stays_one() -> None:
    whole = layer(contiguous_output=True)
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    found = shard_rows(whole)(x)
    assert found.is_contiguous()
    assert torch.equal(found, whole(x))


def around(first: nn.Module) -> nn.Sequential:
    torch.manual_seed(9)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(13, 4))


def forward_and_backward_are_those_of_one_layer() -> None:
    whole = layer()
    divided = shard_rows(copy.deepcopy(whole))
    first, last = divided.rows.tolist()[:2]
    assert divided.shard.weight.shape == (last - first, 20)
    for shape in ((6, 20), (2, 3, 20), (20,)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        one, other = (x.clone().requires_grad_() for _ in range(2))
        expected, found = whole(one), divided(other)
        assert torch.equal(expected, found)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
        for model, y in ((whole, expected), (divided, found)):
            model.zero_grad()
            (y * weights).sum().backward()
        torch.testing.assert_close(one.grad, other.grad)
        rows, _, _ = whole.weight.coo()
        mine = whole.weight.active()[(rows >= first) & (rows < last)]
        assert whole.weight.values.grad is not None
        assert divided.shard.weight.values.grad is not None
        own = divided.shard.weight.values.grad[divided.shard.weight.active()]
        torch.testing.assert_close(whole.weight.values.grad[mine], own)
        assert whole.bias.grad is not None
        assert divided.shard.bias.grad is not None
        torch.testing.assert_close(whole.bias.grad[first:last], divided.shard.bias.grad)


def steps(model: nn.Module, optimizers: list[optim.Optimizer], made: list[Any], count: int) -> Any:
    for step in range(count):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 20, generator=g)
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        for optimizer in optimizers:
            optimizer.step()
        for method in made:
            method.step()
        if step % 5 == 4:
            for method in made:
                method.end_epoch()


def training_is_that_of_one_process() -> None:
    """To the bit: DEEP R and SET, values, connections, optimizer state and the dense rest."""
    settings: list[tuple[str, dict[str, Any]]] = [
        ("deep-r", {"l1": 0.02, "noise": 0.2}),
        ("set", {"every": 3, "new_values": "normal"}),
        ("rigl", {"every": 4, "skip_step": False}),  # the reference has several optimizers
    ]
    for name, options in settings:
        whole = layer()
        single = around(InOnePiece(whole, dist.get_world_size()))
        rewire.distributed.alone(single)
        divided = around(shard_rows(whole))
        assert isinstance(single[0], InOnePiece)
        optimizers = [optim.SGD(p.parameters(), 0.2, momentum=0.9) for p in single[0].parts]
        rest = optim.SGD(single[2].parameters(), 0.2, momentum=0.9)
        made = [
            methods.create(name, part, one, seed=3, **options)
            for part, one in zip(single[0].parts, optimizers, strict=True)
        ]
        steps(single, [*optimizers, rest], made, 30)

        optimizer = optim.SGD(divided.parameters(), 0.2, momentum=0.9)
        method = methods.create(name, divided, optimizer, seed=3, **options)
        before = divided[0].whole().weight.fingerprint()
        steps(divided, [optimizer], [method], 30)
        rank = dist.get_rank()
        mine, theirs = divided[0].shard, single[0].parts[rank]
        for (key, a), (_, b) in zip(
            mine.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), (name, key)
        momentum = (
            optimizer.state[mine.weight.values]["momentum_buffer"],
            optimizers[rank].state[theirs.weight.values]["momentum_buffer"],
        )
        assert torch.equal(*momentum)
        assert torch.equal(divided[2].weight, single[2].weight)
        assert method.stats()["grown"] == {"0.shard.weight": made[rank].stats()["grown"]["weight"]}
        assert sum(method.stats()["grown"].values()) > 5
        now = divided[0].whole()
        assert now.weight.connections == 70
        assert now.weight.fingerprint() != before
        x = torch.randn(5, 20, generator=torch.Generator().manual_seed(7))
        assert torch.equal(now(x), divided[0](x))
        assert torch.equal(single[0](x), divided[0](x))


def parts_of_a_deeper_network_stay_in_step() -> None:
    """A dense layer before it gets the sum of the gradients, so it stays equal on all ranks."""
    torch.manual_seed(3)
    front, whole = nn.Linear(20, 20), layer()
    model = nn.Sequential(front, nn.Tanh(), shard_rows(whole), nn.ReLU(), shard_rows(second()))
    optimizer = optim.Adam(model.parameters(), 0.01)
    method = methods.SET(model, optimizer, every=2, seed=1)
    steps(model, [optimizer], [method], 12)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, front.weight.tolist())
    assert all(theirs == everyone[0] for theirs in everyone)
    assert model[2].whole().weight.connections == 70


def gradients_are_clipped_as_those_of_one_layer() -> None:
    whole = layer()
    one, other = around(copy.deepcopy(whole)), around(shard_rows(whole))
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
    for max_norm in (0.1, 100.0):
        for model in (one, other):
            model.zero_grad()
            model(x).square().sum().backward()
        expected = nn.utils.clip_grad_norm_(one.parameters(), max_norm)
        found = rewire.distributed.clip_grad_norm_(other, max_norm)
        torch.testing.assert_close(found.float(), expected)
        torch.testing.assert_close(other[2].weight.grad, one[2].weight.grad)
        first, last = other[0].rows.tolist()[:2]
        torch.testing.assert_close(other[0].shard.bias.grad, one[0].bias.grad[first:last])


def second() -> SparseLinear:
    return SparseLinear(13, 4, connections=30, generator=torch.Generator().manual_seed(8))


def no_rank_has_the_whole_of_a_layer_on_the_meta_device() -> None:
    with torch.device("meta"):
        huge = SparseLinear(2_000_000, 300_000, connections=300_000)
    divided = shard_rows(huge, seed=4)
    count = dist.get_world_size()
    own = divided.shard.weight
    assert abs(own.connections - 300_000 / count) <= 1
    numbers = sum(t.numel() for t in (*own.parameters(), *own.buffers()))
    assert numbers < 3 * 300_000 / count * 3 + 2 * (2_000_000 + 300_000 / count)
    total = torch.tensor(own.connections)
    dist.all_reduce(total)
    assert int(total) == 300_000
    prints: list[Any] = [None] * count
    dist.all_gather_object(prints, (own.cols[:50].tolist(), own.values[:50].tolist()))
    assert len({str(p) for p in prints}) == count  # each has drawn its own
    bound = 1 / own.fan_in().clamp(min=1).sqrt()[own.rows.long()]
    assert bool((own.values.abs() <= bound).all())
    small = shard_rows(SparseLinear(20, 13, connections=70, device="meta"), seed=4)
    again = shard_rows(SparseLinear(20, 13, connections=70, device="meta"), seed=4)
    assert torch.equal(small.whole().weight.to_dense(), again.whole().weight.to_dense())
    assert small.whole().weight.connections == 70


def limits_and_priors_are_divided_too() -> None:
    edges = [(source, target) for target in range(13) for source in (target, target + 7)]
    more = [(source, target) for source in range(0, 20, 2) for target in range(13)]
    known = layer(
        connections=60, edges=edges, frozen=edges[:4], allowed=more, limits=Limits(fan_in=6)
    )
    divided = shard_rows(known)
    assert divided.whole().weight.prior == known.weight.prior
    assert divided.whole().weight.limits == Limits(fan_in=6)
    model = around(divided)
    optimizer = optim.SGD(model.parameters(), 0.3)
    method = methods.SET(model, optimizer, every=1, seed=1)
    steps(model, [optimizer], [method], 8)
    after = divided.whole()
    assert known.weight.prior is not None
    assert known.weight.prior.violation(after.weight.index, 20) is None
    assert int(after.weight.fan_in().max()) <= 6
    assert sum(method.stats()["grown"].values()) > 5
    meta = layer(connections=60, frozen=edges[:4], allowed=[*edges, *more], device="meta")
    assert (
        shard_rows(meta).whole().weight.prior
        == layer(connections=60, frozen=edges[:4], allowed=[*edges, *more]).weight.prior
    )
    with pytest.raises(ValueError, match="do not see fan-out: only a limit on fan-in"):
        shard_rows(layer(limits=Limits(fan_out=9)))


def states_belong_to_their_rank() -> None:
    divided = shard_rows(layer())
    state = copy.deepcopy(divided.state_dict())
    other = shard_rows(layer())
    other.load_state_dict(state)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {k: v.tolist() for k, v in state.items()})
    theirs = everyone[(dist.get_rank() + 1) % dist.get_world_size()]
    wrong = {key: torch.tensor(value) for key, value in theirs.items()}
    with pytest.raises(ValueError, match="load the file that this rank saved"):
        divided.load_state_dict(wrong)
    assert all(torch.equal(v, divided.state_dict()[k]) for k, v in state.items())
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(divided)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(copy.deepcopy(divided)(x), divided(x))


def what_cannot_be_is_refused_on_all_ranks() -> None:
    torch.manual_seed(dist.get_rank())
    with pytest.raises(ValueError, match="the layers differ between ranks"):
        shard_rows(SparseLinear(20, 13, connections=70))
    with pytest.raises(ValueError, match=r"rank 0 of \d: .*no connection"):
        shard_rows(rewire.nn.from_edges([(0, 12)], 20, 13))
    model = nn.Sequential(shard_rows(layer()))
    with pytest.raises(RuntimeError, match="divided by shard_rows, so all ranks must read the"):
        rewire.distributed.prepare(model)
    mixed = nn.Sequential(shard_rows(layer()), second())
    with pytest.raises(RuntimeError, match=r"1\.weight is not prepared"):
        methods.SET(mixed, optim.SGD(mixed.parameters(), 0.1))
    rewire.distributed.alone(mixed)
    methods.SET(mixed, optim.SGD(mixed.parameters(), 0.1))
    assert [name for name, _ in sparse_weights(mixed)] == ["0.shard.weight", "1.weight"]


SCENES: list[Callable[[], None]] = [
    forward_and_backward_are_those_of_one_layer,
    a_contiguous_output_stays_one,
    training_is_that_of_one_process,
    parts_of_a_deeper_network_stay_in_step,
    gradients_are_clipped_as_those_of_one_layer,
    no_rank_has_the_whole_of_a_layer_on_the_meta_device,
    limits_and_priors_are_divided_too,
    states_belong_to_their_rank,
    what_cannot_be_is_refused_on_all_ranks,
]


def play(rank: int, folder: str, count: int) -> None:
    """One process plays all scenes, for starting processes takes longer than playing."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count)
    outcome = {scene.__name__: "was not reached" for scene in SCENES}
    try:
        for scene in SCENES:
            scene()
            outcome[scene.__name__] = ""
    except BaseException:  # the end: another rank may be anywhere now
        outcome[scene.__name__] = traceback.format_exc()
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(outcome))
    if not any(outcome.values()):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's own threads at times abort an ordinary exit, with everything done


@pytest.fixture(scope="module", params=[2, 3], ids=lambda count: f"{count} ranks")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    folder, count = tmp_path_factory.mktemp("rows"), request.param
    context = multiprocessing.spawn(play, (str(folder), count), nprocs=count, join=False)
    deadline = 300  # seconds; 20 on an idle machine
    while deadline and not context.join(timeout=1):
        deadline -= 1
    for process in context.processes:
        if process.is_alive():
            process.kill()
    files = [folder / f"rank{rank}.pickle" for rank in range(count)]
    return [pickle.loads(file.read_bytes()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_on_several_processes(scene: Callable[[], None], outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(scene.__name__, "the process ended") == "", f"rank {rank}"


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="not initialised"):
        shard_rows(layer())
