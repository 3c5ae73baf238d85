"""The vector kernels, compiled for another processor by a cross compiler and run in an emulator.

Without torch and Python: `processors/harness.cpp` calls them, compares products with plain loops,
and prints random numbers, which are compared with those of this machine.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rewire import random
from rewire.topology import position_signs

CPU = Path(__file__).parents[2] / "src" / "rewire" / "ops" / "cpu"
HARNESS = Path(__file__).parent / "processors" / "harness.cpp"
SOURCES = [
    HARNESS,
    CPU / "product" / "kernels_portable.cpp",
    *sorted(CPU.glob("*/kernels.cpp")),
    CPU / "simd" / "target.cpp",
]
#: As setup.py builds them, with less optimization: the products take minutes to build.
FLAGS = ["-O1", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]


@pytest.mark.slow
def test_kernels_on_aarch64(tmp_path: Path) -> None:
    """NEON is what the compiler targets there by default."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip(
            "needs a cross compiler and an emulator (on Debian: apt-get install "
            "g++-aarch64-linux-gnu qemu-user)"
        )
    told = _run(_built(compiler, tmp_path), emulator)
    verdicts = [line for line in told if line.startswith(("ok ", "WRONG "))]
    assert len(verdicts) == 32
    assert not [line for line in verdicts if line.startswith("WRONG")]
    bits = random.bits(12345678901, 7, 3, torch.arange(1000, 1070)).tolist()
    assert _numbers(told, "bits") == bits
    i = torch.arange(50)
    assert _numbers(told, "sign") == position_signs(3 * i, i * i, 99, 5).tolist()
    normals = 2 * random.normal(12345678901, 7, 3, 64)
    found = torch.tensor([float(line.split()[1]) for line in told if line.startswith("normal ")])
    torch.testing.assert_close(found, normals, rtol=1e-5, atol=1e-5)


def _built(compiler: str, folder: Path) -> Path:
    def build(source: Path) -> Path:
        made = folder / f"{source.parent.name}-{source.stem}.o"
        command = [compiler, *FLAGS, f"-I{CPU}", "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, SOURCES))
    program = folder / "harness"
    subprocess.run([compiler, *map(str, objects), "-static", "-o", str(program)], check=True)
    return program


def _run(program: Path, emulator: str) -> list[str]:
    done = subprocess.run([emulator, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def _numbers(told: list[str], what: str) -> list[int]:
    return [int(line.split()[1]) for line in told if line.startswith(f"{what} ")]
