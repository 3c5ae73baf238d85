"""A layer of 4 * 10^10 potential connections lives in memory that a thousandth of them would not
fit into.
"""

from __future__ import annotations

import sys

import pytest

from interpreter import run_python

SCRIPT = """
import io, resource, sys, warnings
import torch
from torch import optim
import rewire
from rewire.nn import SparseLinear, follow_optimizer

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
x = torch.randn(2, 4, requires_grad=True)
layer = SparseLinear(4, 4, connections=3)  # load everything that is loaded lazily
layer(x).sum().backward()
start = megabytes()

n, k = 200_000, 1_000_000
layer = SparseLinear(n, n, connections=k)
optimizer = optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
method = rewire.methods.DeepR(layer, optimizer, l1=1e-3, noise=0.01, seed=1)
x = torch.randn(2, n, requires_grad=True)
for _ in range(2):
    optimizer.zero_grad()
    layer(x).pow(2).mean().backward()
    optimizer.step()
    method.step()
assert x.grad.isfinite().all()
assert method.stats()["dropped"]["weight"] > 1000, method.stats()
assert layer.weight.connections == k
layer.weight.reorder()
layer.weight.resize(k + 1000)
rewire.summary(layer)
file = io.BytesIO()
torch.save(layer.state_dict(), file)
file.seek(0)
again = SparseLinear(n, n, connections=10)
again.load_state_dict(torch.load(file))
assert again.weight.fingerprint() == layer.weight.fingerprint()
with torch.no_grad():
    assert torch.equal(again(x), layer(x))
print(int(megabytes() - start))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("native", ["", "0"])
def test_nothing_allocates_rows_times_cols(native: str) -> None:
    done = run_python(
        "import warnings\nwarnings.simplefilter('ignore')" + SCRIPT, REWIRE_NATIVE=native
    )
    assert done.returncode == 0, done.stderr
    # Pool, index, momentum, signs, gradients, a second layer, the file: some 20 numbers a
    # connection, 20 a row. rows x cols would be 40,000 MB as bytes and 5,000 MB as bits.
    assert int(done.stdout) < 700
