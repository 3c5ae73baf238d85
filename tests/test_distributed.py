"""DDP on two processes: topologies that agree, and what happens where they do not."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn, optim
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import rewire
from rewire.distributed import TopologyMismatch, prepare
from rewire.nn import (
    Event,
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseGRU,
    SparseLinear,
    SparseLSTM,
    SparseMultiheadAttention,
    SparseRNN,
    sparse_weights,
)

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux",
    reason="needs gloo on Linux",
)


def model(roomy: bool = False) -> nn.Sequential:
    """``roomy``: with slots for all that may ever be active, as methods that move budget between
    layers need.
    """
    return nn.Sequential(
        SparseLinear(20, 30, connections=150, capacity=600 if roomy else None),
        nn.BatchNorm1d(30),
        nn.ReLU(),
        SparseLinear(30, 4, density=0.5, capacity=120 if roomy else None),
    )


def train(ddp: nn.Module, optimizer: optim.Optimizer, method: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 20)  # each rank has its own
        nn.functional.cross_entropy(ddp(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        method.step()


def start(
    seed: int | None = None, **options: Any
) -> tuple[nn.Module, nn.Sequential, optim.Optimizer, Any]:
    torch.manual_seed(100 + dist.get_rank())  # values, topology and data differ between ranks
    plain = model(roomy=options.get("scope") == "network")
    assert prepare(plain, seed=seed) is plain
    ddp = DistributedDataParallel(plain)
    optimizer = optim.SGD(plain.parameters(), lr=0.2, momentum=0.5)
    return (
        ddp,
        plain,
        optimizer,
        rewire.methods.DeepR(plain, optimizer, **{"l1": 1e-2, "noise": 0.1} | options),
    )


def same_everywhere(value: Any) -> bool:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pickle.dumps(value))
    return all(pickle.loads(other) == pickle.loads(everyone[0]) for other in everyone)


def agree_after_200_steps(steps: int = 200, **options: Any) -> None:
    torch.manual_seed(100 + dist.get_rank())
    assert not same_everywhere([w.fingerprint() for _, w in sparse_weights(model())])
    ddp, plain, optimizer, method = start(**options)
    before = [w.fingerprint() for _, w in sparse_weights(plain)]
    assert same_everywhere(before)
    assert same_everywhere(method.seed)
    train(ddp, optimizer, method, steps)
    assert sum(method.stats()["dropped"].values()) > 2 * steps
    assert [w.fingerprint() for _, w in sparse_weights(plain)] != before
    state = {
        k: v.tolist()
        for k, v in plain.state_dict().items()
        if "running" not in k and "num_batches" not in k
    }
    assert same_everywhere(state)
    assert same_everywhere(method.stats())
    # Only the batch norm's statistics are broadcast at each step: no index list, no slot.
    buffers = {id(b): name for name, b in plain.named_buffers()}
    assert {buffers[id(b)] for b in ddp.modules_buffers} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def agree_where_budget_moves_between_layers() -> None:
    agree_after_200_steps(50, scope="network", l1=1e-2)


def agree_where_fan_in_is_kept() -> None:
    agree_after_200_steps(50, scope="neuron", signs="redrawn")


class Last(nn.Module):
    """A recurrent or attention layer that reads (batch, 20) as 5 positions of 4 features; sums over
    positions.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 5, 4)
        y = self.body(x, x, x) if isinstance(self.body, SparseMultiheadAttention) else self.body(x)
        return y[0].sum(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 5)),
        SparseConv1d(4, 2, 3, padding=1, density=0.5),
        nn.Flatten(),
        nn.Linear(10, 4),
    ),
    "conv2d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2, 5)), SparseConv2d(2, 4, (2, 5), groups=2, density=0.5), nn.Flatten()
    ),
    "conv3d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2, 5)), SparseConv3d(1, 4, (2, 2, 5), density=0.5), nn.Flatten()
    ),
    "rnn": lambda: Last(SparseRNN(4, 4, batch_first=True, density=0.5)),
    "lstm": lambda: Last(SparseLSTM(4, 2, bidirectional=True, batch_first=True, density=0.5)),
    "gru": lambda: Last(SparseGRU(4, 4, batch_first=True, density=0.5)),
    "attention": lambda: Last(SparseMultiheadAttention(4, 2, batch_first=True, density=0.5)),
}


def similarities_are_those_of_all_ranks_data() -> None:
    torch.manual_seed(3)
    whole = torch.randn(30, 20)
    plain = prepare(
        nn.Sequential(
            SparseLinear(20, 30, connections=150), nn.ReLU(), SparseLinear(30, 4, density=0.5)
        )
    )
    optimizer = optim.SGD(plain.parameters(), lr=0.2)
    mine = whole[:12] if dist.get_rank() else whole[12:]
    method = rewire.methods.CoPACoRSET(plain, optimizer, data=[mine], output_layer=True)
    source = method.drop.source
    source.record(method.pools, 0, 1)
    centred = whole - whole.mean(0)  # the data, from the mean over all ranks
    for pool, x, y in zip(
        method.pools, (centred, plain[0](whole)), (plain[0](whole), plain(whole)), strict=True
    ):
        expected = nn.functional.cosine_similarity(y.t()[:, None], x.t()[None], dim=2).abs()
        torch.testing.assert_close(source.of(pool).block(0, y.shape[1]), expected.detach())
    train(DistributedDataParallel(plain), optimizer, method, 3)
    method.end_epoch()
    assert method.stats()["updates"] == 1
    assert same_everywhere([w.fingerprint() for _, w in sparse_weights(plain)])


def every_layer_type_trains() -> None:
    """The gradient is the mean over ranks: two processes of 8 samples each equal one that sees all
    16.
    """
    for name, build in LAYERS.items():
        torch.manual_seed(100 + dist.get_rank())
        plain = prepare(build())
        ddp = DistributedDataParallel(plain)  # the ranks agree on the values from here on
        alone = rewire.distributed.alone(copy.deepcopy(plain))
        alone_optimizer = optim.SGD(alone.parameters(), lr=0.2)
        alone_method = rewire.methods.DeepR(alone, alone_optimizer, l1=1e-2, noise=0.1, seed=5)
        optimizer = optim.SGD(plain.parameters(), lr=0.2)
        method = rewire.methods.DeepR(plain, optimizer, l1=1e-2, noise=0.1, seed=5)
        for step in range(4):
            x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
            mine = x[8 * dist.get_rank() :][:8]
            for network, batch, opt, m in (
                (ddp, mine, optimizer, method),
                (alone, x, alone_optimizer, alone_method),
            ):
                opt.zero_grad()
                nn.functional.cross_entropy(network(batch), batch[:, :4].argmax(1)).backward()
                opt.step()
                m.step()
        assert sum(method.stats()["grown"].values()) > 0, name
        for (key, value), (_, other) in zip(
            plain.state_dict().items(), alone.state_dict().items(), strict=True
        ):
            torch.testing.assert_close(value, other, msg=f"{name}: {key}", rtol=1e-3, atol=1e-5)
        assert same_everywhere({k: v.tolist() for k, v in plain.state_dict().items()}), name


def growth_by_gradients_is_that_of_one_process() -> None:
    """Each rank captures its own samples; the sum over ranks decides, so all choose as one process
    with all samples.
    """
    make: dict[str, Callable[..., Any]] = {
        "exact": partial(rewire.methods.RigL, every=2, candidates=None),
        "sampled": partial(rewire.methods.RigL, every=2, candidates=40),
        "momentum": partial(rewire.methods.SNFS, every=3, window=2),
        "all momentum": partial(rewire.methods.SNFS, every=3, window=2, exact=True),
        "fan-in": partial(rewire.methods.SRigL, every=2, fraction=0.5),
    }
    for name, build in make.items():
        torch.manual_seed(100 + dist.get_rank())
        first, last = (
            SparseLinear(20, 30, connections=150, capacity=320),
            SparseLinear(30, 4, density=0.5, capacity=120),
        )
        plain = prepare(nn.Sequential(first, nn.ReLU(), last)).double()
        ddp = DistributedDataParallel(plain)
        alone = rewire.distributed.alone(copy.deepcopy(plain))
        networks = []
        for own, network in ((plain, ddp), (alone, alone)):
            optimizer = optim.SGD(own.parameters(), lr=0.2)
            networks.append((network, optimizer, build(own, optimizer, seed=5)))
        for step in range(8):
            x = torch.randn(
                16, 20, generator=torch.Generator().manual_seed(step), dtype=torch.float64
            )
            mine = x[8 * dist.get_rank() :][:8]
            for (network, opt, m), batch in zip(networks, (mine, x), strict=True):
                opt.zero_grad()
                nn.functional.cross_entropy(network(batch), batch[:, :4].argmax(1)).backward()
                opt.step()
                m.step()
        assert sum(networks[0][2].stats()["grown"].values()) > 0, name
        found = [[w.fingerprint() for _, w in sparse_weights(n)] for n in (plain, alone)]
        assert found[0] == found[1], name
        assert same_everywhere({k: v.tolist() for k, v in plain.state_dict().items()}), name


def methods_by_gradient_and_magnitude_agree() -> None:
    settings: dict[str, dict[str, Any]] = {
        "top-kast": {"every": 5},
        "snip": {"connections": [60, 30], "batches": 2},
        "one-shot": {"connections": [60, 30], "after": 7},
    }
    for name, options in settings.items():
        torch.manual_seed(100 + dist.get_rank())
        plain = prepare(model())
        ddp = DistributedDataParallel(plain)
        optimizer = optim.SGD(plain.parameters(), lr=0.2, momentum=0.5)
        method = rewire.methods.create(name, plain, optimizer, **options)
        before = [w.fingerprint() for _, w in sparse_weights(plain)]
        train(ddp, optimizer, method, 20)
        assert [w.fingerprint() for _, w in sparse_weights(plain)] != before
        # DDP's buckets stay as they are
        assert [w.capacity for _, w in sparse_weights(plain)] == [150, 60]
        state = {
            k: v.tolist()
            for k, v in plain.state_dict().items()
            if "running" not in k and "num_batches" not in k
        }
        assert same_everywhere(state), name
        own = method.state_dict()["own"]
        assert name != "top-kast" or same_everywhere(
            {k: v.tolist() for k, v in own["theta"].items()}
        )


def a_seed_can_be_given() -> None:
    *_, method = start(seed=41 if dist.get_rank() == 0 else 42)
    assert method.seed == 41
    assert same_everywhere(method.seed)


def a_one_sided_rewire_is_found() -> None:
    ddp, plain, optimizer, method = start()
    train(ddp, optimizer, method, 3)
    weight = plain[0].weight
    if dist.get_rank() == 1:
        free = (weight.to_dense() == 0).nonzero()[0]
        weight.rewire(torch.tensor([5]), free[:1], free[1:], 0.1)
    with pytest.raises(TopologyMismatch, match="topologies have diverged"):
        train(ddp, optimizer, method, 2)
    ddp.eval()
    ddp.module(torch.randn(3, 20))  # evaluation asks nobody


def another_rewire_on_each_rank_is_found() -> None:
    ddp, plain, optimizer, method = start()
    free = (plain[0].weight.to_dense() == 0).nonzero()[dist.get_rank()]
    plain[0].weight.rewire(torch.tensor([5]), free[:1], free[1:], 0.1)
    with pytest.raises(TopologyMismatch):
        train(ddp, optimizer, method, 1)


def a_one_sided_load_is_found() -> None:
    ddp, plain, optimizer, method = start()
    if dist.get_rank() == 1:
        plain.load_state_dict(model().state_dict())
    with pytest.raises(TopologyMismatch):
        train(ddp, optimizer, method, 1)


def the_same_rewire_everywhere_is_fine() -> None:
    ddp, plain, optimizer, method = start()
    weight = plain[0].weight
    free = (weight.to_dense() == 0).nonzero()[0]
    weight.rewire(torch.tensor([5]), free[:1], free[1:], 0.1)
    weight.reorder()
    plain.load_state_dict(plain.state_dict())
    train(ddp, optimizer, method, 2)


def resizing_is_refused() -> None:
    *_, plain, _, _ = start()
    weight = plain[0].weight
    with pytest.raises(RuntimeError, match="prepared for DDP cannot be resized"):
        weight.resize(200)
    with pytest.raises(RuntimeError, match="under DDP a pool cannot be resized"):
        plain[0].load_state_dict(SparseLinear(20, 30, connections=99).state_dict())
    assert weight.capacity == 150


def different_sizes_are_refused() -> None:
    plain = nn.Sequential(SparseLinear(20, 30, connections=150 + dist.get_rank()))
    with pytest.raises(ValueError, match=r"rank 1 has sparse weights .* build the same model"):
        prepare(plain)
    with pytest.raises(ValueError, match="check_every must be"):
        prepare(plain, check_every=0)


def step(ddp: nn.Module, optimizer: optim.Optimizer, method: Any = None) -> None:
    optimizer.zero_grad()
    ddp(torch.randn(16, 20)).square().mean().backward()
    optimizer.step()
    if method is not None:
        method.step()


def unprepared_models_are_refused() -> None:
    for wrap in (False, True):
        plain = model()
        network = DistributedDataParallel(plain) if wrap else plain
        optimizer = optim.SGD(plain.parameters(), 0.1)
        with pytest.raises(
            RuntimeError,
            match=r"0\.weight is not prepared.*SET.*\n    model = "
            r"rewire\.distributed\.prepare",
        ):
            rewire.methods.SET(network, optimizer)
        with pytest.raises(RuntimeError, match="is not prepared"):
            rewire.methods.Group(network, optimizer, {"*": rewire.methods.RigL})
        assert not plain[0].weight.followers
    plain = rewire.distributed.alone(model())
    optimizer = optim.SGD(plain.parameters(), 0.1)
    method = rewire.methods.SET(plain, optimizer, seed=dist.get_rank())
    if dist.get_rank():  # and it asks nobody
        for _ in range(3):
            step(plain, optimizer, method)
        method.end_epoch()
    with pytest.raises(RuntimeError, match="prepared for DDP, so its ranks train together"):
        rewire.distributed.alone(prepare(model()))


def dense_methods_agree_or_are_refused() -> None:
    torch.manual_seed(7)
    dense = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    for name, options in {
        "halo": {"density": 0.3},
        "ternary": {"threshold": 0.2, "density": 0.3, "after_epochs": 1},
    }.items():
        torch.manual_seed(50 + dist.get_rank())
        plain = copy.deepcopy(dense)
        ddp = DistributedDataParallel(plain)
        optimizer = optim.Adam(plain.parameters(), 0.01)
        method = rewire.methods.create(name, plain, optimizer, **options)
        for _ in range(10):
            optimizer.zero_grad()
            (ddp(torch.randn(16, 20)).square().mean() + method.penalty()).backward()
            optimizer.step()
            method.step()
        method.end_epoch()
        method.finalize()
        assert same_everywhere([w.fingerprint() for _, w in sparse_weights(plain)]), name
        assert same_everywhere({k: v.tolist() for k, v in plain.state_dict().items()}), name
    for name, options in {
        "noiseout": {"data": [torch.randn(4, 20)], "targets": "none"},
        "differentiable": {},
    }.items():
        before = list(dense._modules["0"]._modules)
        with pytest.raises(RuntimeError, match=r"shapes of parameters.*rewire\.distributed\.alone"):
            rewire.methods.create(name, dense, optim.Adam(dense.parameters()), **options)
        assert list(dense._modules["0"]._modules) == before
        mine = rewire.distributed.alone(copy.deepcopy(dense))
        rewire.methods.create(name, mine, optim.Adam(mine.parameters()), **options)


def forwards_that_others_do_not_make_are_fine() -> None:
    ddp, plain, optimizer, method = start()
    for round_ in range(3):
        if dist.get_rank() == round_ % 2:
            plain(torch.randn(3, 20))  # the bare model, in training mode
            with torch.no_grad():
                plain(torch.randn(3, 20))
        step(ddp, optimizer, method)
        with ddp.no_sync():  # as many as each rank likes
            for _ in range(1 + dist.get_rank()):
                ddp.module(torch.randn(4, 20)).sum().backward()
        step(ddp, optimizer, method)
    assert same_everywhere(method.stats())
    # no buffers, about which DDP itself would meet
    linear = prepare(nn.Sequential(SparseLinear(20, 4, density=0.5)))
    ddp = DistributedDataParallel(linear)
    if dist.get_rank():
        ddp(torch.randn(3, 20))
        with torch.no_grad():
            ddp(torch.randn(3, 20))
    for _ in range(2):
        step(ddp, optim.SGD(linear.parameters(), 0.1))
    copied = copy.deepcopy(linear)
    if dist.get_rank():
        step(copied, optim.SGD(copied.parameters(), 0.1))  # a copy asks nobody


def divergence_is_found_before_the_step() -> None:
    ddp, plain, optimizer, method = start()
    step(ddp, optimizer, method)
    weight = plain[0].weight
    if dist.get_rank() == 1:
        free = (weight.to_dense() == 0).nonzero()[0]
        weight.rewire(torch.tensor([5]), free[:1], free[1:], 0.1)
    before = weight.values.detach().clone()
    with pytest.raises(TopologyMismatch, match="topologies have diverged"):
        step(ddp, optimizer, method)
    assert torch.equal(weight.values, before)
    with pytest.raises(TopologyMismatch, match="topologies have diverged"):
        method.end_epoch()


def uneven_batches_under_join() -> None:
    for name in ("static", "set"):
        torch.manual_seed(3)
        plain = prepare(model(), seed=4)
        ddp = DistributedDataParallel(plain)
        optimizer = optim.SGD(plain.parameters(), lr=0.1)
        method = rewire.methods.create(name, plain, optimizer)
        for epoch in range(3):
            with Join([ddp]):
                for _ in range(2 + 2 * dist.get_rank() * (epoch != 1)):
                    step(ddp, optimizer, method)
            method.end_epoch()
        assert name == "static" or method.stats()["updates"] == 3
        assert same_everywhere(method.stats())
        assert same_everywhere(
            {k: v.tolist() for k, v in plain.state_dict().items() if "weight" in k}
        )
    with Join([ddp]):
        step(ddp, optimizer, method)
        with pytest.raises(RuntimeError, match=r"within .*Join.*end_epoch\(\) after the Join"):
            method.end_epoch()
    for name, options in {
        "deep-r": {"l1": 1e-2},
        "rigl": {"every": 1},
        "snfs": {"every": 1},
    }.items():
        plain = prepare(model(roomy=True), seed=4)
        ddp = DistributedDataParallel(plain)
        optimizer = optim.SGD(plain.parameters(), lr=0.1)
        method = rewire.methods.create(name, plain, optimizer, **options)

        def run(throw: bool = False, network=ddp, opt=optimizer, acting=method) -> None:  # type: ignore[no-untyped-def]
            with Join([network], throw_on_early_termination=throw):
                for _ in range(3 + 2 * dist.get_rank()):
                    step(network, opt, acting)

        with pytest.raises(RuntimeError, match=r"within .*Join.*DistributedSampler"):
            run()
        dist.barrier()


def join_may_throw_instead() -> None:
    ddp, _, optimizer, method = start()

    def run() -> None:
        with Join([ddp], throw_on_early_termination=True):
            for _ in range(3 + 2 * dist.get_rank()):
                step(ddp, optimizer, method)

    with pytest.raises(RuntimeError, match=r"exhausted (all )?inputs"):
        run()
    assert method.steps >= 3
    dist.barrier()


def other_settings_of_ddp_work() -> None:
    for options in (
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
    ):
        torch.manual_seed(100 + dist.get_rank())
        plain = prepare(model(), check_every=2)
        ddp = DistributedDataParallel(plain, **options)
        optimizer = optim.SGD(plain.parameters(), lr=0.2)
        method = rewire.methods.DeepR(plain, optimizer, l1=1e-2, noise=0.1)
        train(ddp, optimizer, method, 4)
        assert same_everywhere([w.fingerprint() for _, w in sparse_weights(plain)])


def preparing_at_the_wrong_time_is_refused() -> None:
    plain = prepare(model())
    with pytest.raises(RuntimeError, match="prepared already"):
        prepare(plain)
    with pytest.raises(RuntimeError, match="wrapped in DistributedDataParallel already"):
        prepare(DistributedDataParallel(model()))
    plain = model()
    late = DistributedDataParallel(plain)
    prepare(plain)
    larger = DistributedDataParallel(nn.Sequential(prepare(model())))
    for ddp in (late, larger):
        with pytest.raises(RuntimeError, match=r"before wrapping, and wrap that very model"):
            ddp(torch.randn(3, 20))


def sharded_models_are_refused_by_name() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module

    mesh = init_device_mesh("cpu", (2,))
    made = {
        r"fully_shard \(FSDP2\)": lambda: fully_shard(model(), mesh=mesh),
        "is a DTensor": lambda: distribute_module(model(), mesh),
    }
    for words, build in made.items():
        network = build()
        optimizer = optim.SGD(network.parameters(), 0.1)
        with pytest.raises(
            RuntimeError, match=f"{words}.*DistributedDataParallel.rewire.distributed.prepare"
        ):
            rewire.methods.SET(network, optimizer)
        with pytest.raises(RuntimeError, match=words):
            prepare(network)
    with pytest.raises(
        RuntimeError,
        match=r"are a "
        r"DTensor.*DistributedDataParallel.rewire.distributed.prepare",
    ):
        network(torch.randn(3, 20))
    half = nn.Sequential(
        fully_shard(nn.Linear(20, 20), mesh=mesh), SparseLinear(20, 4, density=0.5)
    )
    rewire.distributed.alone(half)  # what is sharded holds no sparse weight


def optimizers_that_share_state_between_ranks_follow() -> None:
    """ZeroRedundancyOptimizer: each rank has the state of its own pools, in an optimizer inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, in the import
        from torch.distributed.optim import ZeroRedundancyOptimizer
    for name, kind, key in (("set", optim.Adam, "exp_avg"), ("rigl", optim.SGD, "momentum_buffer")):
        torch.manual_seed(100 + dist.get_rank())
        plain = prepare(model())
        ddp = DistributedDataParallel(plain)
        options = {"momentum": 0.9} if kind is optim.SGD else {}
        optimizer = ZeroRedundancyOptimizer(plain.parameters(), kind, lr=0.05, **options)
        method = rewire.methods.create(name, plain, optimizer, every=2)
        grown: dict[str, int] = {}

        def note(event: Event, of: str) -> None:
            state = optimizer.optim.state.get(event.weight.values)  # noqa: B023
            if state:  # this rank's
                assert not state[key][event.slots].any()  # noqa: B023
                assert state[key].any()  # noqa: B023
                grown[of] = grown.get(of, 0) + event.slots.numel()  # noqa: B023

        for pool in method.pools:
            pool.weight.follow(partial(note, of=pool.name))
        train(ddp, optimizer, method, 6)
        assert method.stats()["steps"] == 6
        assert method.stats()["updates"] == 3
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, grown)
        assert set(everyone[0]) | set(everyone[1]) == {"0.weight", "3.weight"}
        assert not set(everyone[0]) & set(everyone[1])
        assert same_everywhere([w.values.tolist() for _, w in sparse_weights(plain)])
        method.finalize()
    optimizer = ZeroRedundancyOptimizer(
        plain.parameters(), optim.SGD, lr=0.05, overlap_with_ddp=True
    )
    with pytest.raises(ValueError, match="overlap_with_ddp=True steps within the backward pass"):
        rewire.methods.SET(plain, optimizer)


SCENES: list[Callable[[], None]] = [
    agree_after_200_steps,
    agree_where_budget_moves_between_layers,
    agree_where_fan_in_is_kept,
    every_layer_type_trains,
    methods_by_gradient_and_magnitude_agree,
    a_seed_can_be_given,
    a_one_sided_rewire_is_found,
    similarities_are_those_of_all_ranks_data,
    another_rewire_on_each_rank_is_found,
    growth_by_gradients_is_that_of_one_process,
    a_one_sided_load_is_found,
    the_same_rewire_everywhere_is_fine,
    resizing_is_refused,
    unprepared_models_are_refused,
    dense_methods_agree_or_are_refused,
    forwards_that_others_do_not_make_are_fine,
    divergence_is_found_before_the_step,
    optimizers_that_share_state_between_ranks_follow,
    uneven_batches_under_join,
    join_may_throw_instead,
    other_settings_of_ddp_work,
    preparing_at_the_wrong_time_is_refused,
    sharded_models_are_refused_by_name,
    different_sizes_are_refused,
]


def run(rank: int, folder: str) -> None:
    """One process plays all scenes, for starting processes takes longer than playing."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    outcome = {}
    try:
        for scene in SCENES:
            outcome[scene.__name__] = "was not finished"
            scene()
            outcome[scene.__name__] = ""
    except BaseException:  # the end: the other rank may be anywhere now
        outcome[scene.__name__] = traceback.format_exc()
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(outcome))
    if not any(outcome.values()):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    # torch's own threads at times abort an ordinary exit ("terminate called"), with everything done
    os._exit(0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ddp")
    context = multiprocessing.spawn(run, (str(folder),), nprocs=2, join=False)
    deadline = 300  # seconds; 30 on an idle machine
    while deadline and not context.join(timeout=1):
        deadline -= 1
    for process in context.processes:
        if process.is_alive():
            process.kill()
    files = [folder / f"rank{rank}.pickle" for rank in range(2)]
    return [pickle.loads(f.read_bytes()) if f.exists() else {} for f in files]


@pytest.mark.parametrize("scene", [scene.__name__ for scene in SCENES])
def test_two_processes(scene: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(scene, "not reached") == "", (
            f"rank {rank}: {outcome.get(scene, 'not reached')}"
        )


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="is not initialised"):
        prepare(model())
