"""What `import rewire` loads and how long it takes, and what the command says without its extra."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

#: Prints the packages that are there after the second piece of code and were not after the first.
LOADED = """
import sys
def packages():
    return {{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names
{}
before = packages()
{}
print(*packages() - before)
"""
#: What the library needs, and what these load themselves when a dense network trains.
NEEDED = """
import torch, numpy, safetensors.torch
model = torch.nn.Linear(8, 6)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model(torch.randn(4, 8)).square().sum().backward()
optimizer.step()
"""
#: All public parts of the library, and a training.
USED = """
import rewire
for name in rewire.__all__:
    getattr(rewire, name)
model = rewire.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU()), density=0.5)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
method = rewire.methods.RigL(model, optimizer, every=1)
model(torch.randn(4, 8)).square().sum().backward()
optimizer.step()
method.step()
method.finalize()
"""
#: One process loads torch; each child forked from it loads rewire, which the first one compiles.
#: Seconds of the processor, so that it does not matter what else the machine does.
TIMED = """
import os, time
import torch
for _ in range(6):
    child = os.fork()
    if not child:
        start = time.process_time()
        import rewire
        print(time.process_time() - start, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("before", "code"), [("", "import rewire"), (NEEDED, USED)], ids=["import", "use"]
)
def test_only_torch_numpy_and_safetensors_are_loaded(before: str, code: str) -> None:
    done = run(LOADED.format(before, code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["rewire"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows does not have")
def test_importing_takes_as_long_as_torch_and_a_fifth_of_a_second(tmp_path: Path) -> None:
    done = run(TIMED, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path))
    assert done.returncode == 0, done.stderr
    _, *seconds = map(float, done.stdout.split())
    assert len(seconds) == 5
    assert 0 < statistics.median(seconds) < 0.2


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_without_its_extra_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; import rewire.__main__ as r; r.main()"
    done = run(code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: the command rewire needs {missing}, which cannot be found; install it all with: "
        "pip install 'torch-rewire[app]'\n"
    )
