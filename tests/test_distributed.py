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
from rewire.nn import Event, SparseLinear, sparse_weights
from scenes import (
    a_seed_can_be_given,
    agree_after_200_steps,
    agree_where_budget_moves_between_layers,
    agree_where_fan_in_is_kept,
    differences_beside_a_base_agree,
    every_layer_type_trains,
    growth_by_gradients_is_that_of_one_process,
    methods_by_gradient_and_magnitude_agree,
    model,
    same_everywhere,
    similarities_are_those_of_all_ranks_data,
    start,
    step,
    train,
)

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux",
    reason="needs gloo on Linux",
)


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
    differences_beside_a_base_agree,
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
