"""Loads the C++ library with the native kernels, if it was built.

The library registers its functions as ``torch.ops.rewire.*``. The first call here reads two
environment variables: ``REWIRE_NATIVE=0`` leaves the library out, so that everything runs in plain
PyTorch, and ``REWIRE_CPU_CAPABILITY`` = ``portable``, ``avx2`` or ``avx512`` limits the instruction
set.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["NativeKernelsUnavailable", "available", "describe", "instruction_set", "reason"]

_FOLDER = Path(__file__).parent / "ops" / "cpu"
_CAPABILITIES = ("portable", "avx2", "avx512")


class NativeKernelsUnavailable(UserWarning):
    """The native kernels are missing or do not load: results are the same, but take much longer."""


class _State(NamedTuple):
    operators: frozenset[str]
    reason: str  # why the library is not used; empty if it is
    instruction_set: str | None


@functools.cache
def _load() -> _State:
    """Load the library on the first call, and warn if it is missing though it was not left out."""
    cap = os.environ.get("REWIRE_CPU_CAPABILITY", "")
    if cap and cap not in _CAPABILITIES:
        raise ValueError(
            f"REWIRE_CPU_CAPABILITY is {cap!r}; allowed are {', '.join(_CAPABILITIES)}"
        )
    if os.environ.get("REWIRE_NATIVE", "") == "0":
        return _State(frozenset(), "switched off by REWIRE_NATIVE=0", None)
    patterns = "_C*.so", "_C*.pyd", "_C*.dylib"
    built = [path for pattern in patterns for path in sorted(_FOLDER.glob(pattern))]
    if not built:
        reason = "the C++ extension is not built"
    else:
        try:
            torch.ops.load_library(built[0])
            found = frozenset(
                name.removeprefix("rewire::").partition(".")[0]
                for name in torch._C._dispatch_get_all_op_names()
                if name.startswith("rewire::")
            )
            return _State(found, "", torch.ops.rewire.instruction_set())
        except OSError as error:
            reason = f"the C++ extension does not load: {error}"
    warnings.warn(
        "rewire computes in plain PyTorch, many times slower than with native kernels, because "
        f"{reason}. Reinstall it where a C++17 compiler is present, or set REWIRE_NATIVE=0 to "
        "accept this silently.",
        NativeKernelsUnavailable,
        stacklevel=2,
    )
    return _State(frozenset(), reason, None)


def available(operator: str = "distinct") -> bool:
    """Whether the library is in use and has ``torch.ops.rewire.<operator>``."""
    return operator in _load().operators


def reason() -> str:
    """Why the library is not in use; empty if it is."""
    return _load().reason


def instruction_set() -> str | None:
    """``portable`` (the compiler's default), ``avx2`` or ``avx512``; None without the library."""
    return _load().instruction_set


def describe() -> str:
    """One line for ``rewire --version``."""
    name = instruction_set()
    return f"native kernels ({name})" if name else f"plain PyTorch reference ({reason()})"
