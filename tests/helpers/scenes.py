"""Scenes that two processes play together, of methods that come to the same topology."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

import rewire
from rewire.distributed import prepare
from rewire.nn import (
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


def differences_beside_a_base_agree() -> None:
    """`rewire.adapt` before `prepare`: the base of rank 0 everywhere, and one topology."""
    torch.manual_seed(100 + dist.get_rank())
    plain = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    adapter = rewire.adapt(plain, density=0.2, train="2.bias")
    ddp = DistributedDataParallel(prepare(plain))
    base = [p.detach().clone() for p in plain.parameters() if not p.requires_grad]
    assert same_everywhere([p.tolist() for p in base])
    optimizer = optim.SGD(adapter.parameters(), lr=0.2)
    method = rewire.methods.RigL(plain, optimizer, every=3)
    train(ddp, optimizer, method, 12)
    assert method.stats()["updates"] == 4
    assert same_everywhere({k: v.tolist() for k, v in plain.state_dict().items()})
    now = [p for p in plain.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(base, now, strict=True))
    method.finalize()
    with pytest.raises(ValueError, match="is wrapped in DistributedDataParallel"):
        rewire.adapt(DistributedDataParallel(nn.Linear(2, 2)), density=0.5)


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


def step(ddp: nn.Module, optimizer: optim.Optimizer, method: Any = None) -> None:
    optimizer.zero_grad()
    ddp(torch.randn(16, 20)).square().mean().backward()
    optimizer.step()
    if method is not None:
        method.step()
