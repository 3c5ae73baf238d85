"""A layer of 500,000 x 20,000 with a million known edges is built, trained and rewired in less than
2 GB.
"""

from __future__ import annotations

import sys

import pytest

from interpreter import run_python

SCRIPT = """
import resource
import torch
from rewire import methods, topology
from rewire.nn import SparseLinear

n_in, n_out, k = 500_000, 20_000, 1_000_000
g = torch.Generator().manual_seed(0)
keys = torch.randint(0, n_in * n_out, (2 * k,), generator=g).unique()
allowed = torch.stack([keys % n_in, keys // n_in])
edges = allowed[:, torch.randperm(keys.numel(), generator=g)[:k]]
layer = SparseLinear(
    n_in, n_out, edges=edges, allowed=allowed, frozen=torch.arange(k) < k // 10, generator=g
)
wanted = torch.sort(edges[1] * n_in + edges[0]).values
assert torch.equal(topology.active_keys(layer.weight.index, n_in), wanted)
optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
for name, options in (
    ("deep-r", {"l1": 1e-2, "noise": 0.05}),
    ("set", {"every": 1}),
    ("rigl", {"every": 1}),
):
    method = methods.create(name, layer, optimizer, seed=0, **options)
    optimizer.zero_grad()
    layer(torch.randn(32, n_in, generator=g)).square().mean().backward()
    optimizer.step()
    method.step()
    assert method.stats()["grown"]["weight"] > 1000, method.stats()
    method.finalize()
now = topology.active_keys(layer.weight.index, n_in)
assert now.numel() == k
assert bool(topology.contains(keys, now).all())
frozen = edges[1, : k // 10] * n_in + edges[0, : k // 10]
assert bool(topology.contains(now, frozen).all())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_a_million_edges_of_ten_thousand_million() -> None:
    done = run_python(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2000
