"""`c`: a network as one C99 header and one source that need nothing but the standard library."""

from __future__ import annotations

import copy
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewire._version import __version__
from rewire.export.csource.plan import TYPES, Matrix, Plan, c_float, smallest
from rewire.export.csource.trace import plan_of
from rewire.nn.frozen import quantize
from rewire.nn.frozen.freeze import freeze
from rewire.nn.frozen.quantize import Values
from rewire.nn.layers.adapted import refuse_adapted
from rewire.nn.weight.listing import sparse_weights
from rewire.storage.files import write_atomic

__all__ = ["CExport", "CWeight", "c"]

#: Words of C that a name cannot be.
_WORDS = frozenset(
    [
        "auto",
        "break",
        "case",
        "char",
        "const",
        "continue",
        "default",
        "do",
        "double",
        "else",
        "enum",
        "extern",
        "float",
        "for",
        "goto",
        "if",
        "inline",
        "int",
        "long",
        "main",
        "register",
        "restrict",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "switch",
        "typedef",
        "union",
        "unsigned",
        "void",
        "volatile",
        "while",
    ]
)


@dataclass(frozen=True)
class CWeight:
    """A weight as it was written.

    Attributes:
        bytes: of its arrays, scales and bias included.
        error: the root of sum (w - w')^2 / sum w^2; 0 for floats.
        bound: outputs of the layer are off by at most this times the largest magnitude among its
            inputs.
    """

    name: str
    stored: str
    connections: int
    shape: tuple[int, int]
    bytes: int
    error: float
    bound: float


@dataclass(frozen=True)
class CExport:
    """What `c` wrote.

    Attributes:
        header, source: the files.
        inputs, outputs: floats that the function reads and writes.
        workspace: floats that it needs to work in.
        constant_bytes: of weights and other constants.
        multiply_adds: of one call.
        bound: outputs for the example are off by at most this from those of the exact weights, but
            for the rounding of sums; 0 for floats, None where no bound is known (recurrent layers
            with rounded weights).
    """

    header: Path
    source: Path
    inputs: int
    outputs: int
    workspace: int
    constant_bytes: int
    multiply_adds: int
    bound: float | None
    weights: tuple[CWeight, ...]

    def __str__(self) -> str:
        lines = [
            f"{w.name:<14} {w.connections:,} {w.stored} weights in {w.bytes:,} bytes"
            + (f", relative error {w.error:.2g}" if w.error else "")
            for w in self.weights
        ]
        return "\n".join(
            [
                *lines,
                f"constants      {self.constant_bytes:,} bytes",
                f"workspace      {4 * self.workspace:,} bytes",
                f"multiply-adds  {self.multiply_adds:,}",
                f"C source       {self.header}, {self.source}",
            ]
        )


def c(
    model: nn.Module,
    example: Tensor,
    folder: str | Path,
    *,
    name: str = "network",
    values: Values = "float",
) -> CExport:
    """Write ``name.h`` and ``name.c`` into ``folder``: ``model`` in eval mode, for inputs of the
    shape of ``example``.

    The C function ``name_run(input, output, workspace)`` allocates nothing, calls nothing but
    functions of ``math.h``, and keeps no state: the caller gives it the workspace. With
    ``NAME_MAIN`` defined, the source has a ``main`` that reads inputs as text and prints outputs.

    Args:
        model: sparse, frozen or dense. Linear layers, 1-D and 2-D convolutions, recurrent layers
            (from states of 0), BatchNorm (folded into the layer before it where it can be), the
            usual activations, pooling, softmax, and what moves or joins tensors can be written.
        example: (1, ...) in most cases; batches work as well, and are then part of the shape.
        values: how weights are written that are not rounded already: "float" (float32), "int8"
            (a scale for each row) or "ternary", see `rewire.freeze`. Biases are float32.

    Raises ValueError, before anything is written, which names the layer or the operation that
    cannot be exported. Cost: O(K log K) time, and a run of the model on the example.
    """
    quantize.check(values)
    if (
        not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name)
        or name in _WORDS
        or keyword.iskeyword(name)
    ):
        raise ValueError(f"name must be a name that C allows, not {name!r}")
    if not isinstance(example, Tensor) or example.dtype != torch.float32 or not example.numel():
        raise ValueError("example must be a tensor of float32 such as the model takes")
    refuse_adapted(model)
    sparse = any(sparse_weights(model))
    model = freeze(model) if sparse else copy.deepcopy(model).eval()
    plan, result = plan_of(model, example.clone(), values)
    written = _Writer(plan, name, example, result)
    header, source = Path(folder) / f"{name}.h", Path(folder) / f"{name}.c"
    texts = {header: written.header(), source: written.source()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_atomic(path, text.encode())
    assert plan.result is not None
    return CExport(
        header,
        source,
        example.numel(),
        result.numel(),
        plan.workspace,
        written.bytes,
        plan.multiply_adds,
        plan.result.error,
        tuple(written.weights),
    )


def write(
    model: nn.Module,
    folder: Path,
    *,
    example: Tensor,
    values: Values = "float",
    name: str = "network",
) -> CExport:
    """`c`, called as the writers of other formats are."""
    return c(model, example, folder, name=name, values=values)


class _Writer:
    """Makes the text of both files."""

    def __init__(self, plan: Plan, name: str, example: Tensor, result: Tensor) -> None:
        self._plan, self._name = plan, name
        self._example, self._result = example, result
        self.bytes = 0
        self.weights: list[CWeight] = []
        self._arrays = self._constants()

    def header(self) -> str:
        """The text of the header."""
        name, upper = self._name, self._name.upper()
        shapes = " x ".join(map(str, self._example.shape)), " x ".join(map(str, self._result.shape))
        return f"""\
/* Written by rewire {__version__}. */
#ifndef {upper}_H
#define {upper}_H

#define {upper}_INPUTS {self._example.numel()}
#define {upper}_OUTPUTS {self._result.numel()}
/* Floats of the workspace. */
#define {upper}_WORKSPACE {max(1, self._plan.workspace)}

#ifdef __cplusplus
extern "C" {{
#endif

/* Computes output ({shapes[1]}) from input ({shapes[0]}), both row-major. It allocates nothing and
   keeps nothing between calls; the workspace may hold anything before and after. The three arrays
   must not overlap. */
void {name}_run(const float input[{upper}_INPUTS], float output[{upper}_OUTPUTS],
                float workspace[{upper}_WORKSPACE]);

#ifdef __cplusplus
}}
#endif

#endif
"""

    def source(self) -> str:
        """The text of the source."""
        name, upper = self._name, self._name.upper()
        helpers = "\n".join(self._plan.helpers.values())
        steps = "".join(f"  {self._step(step)}\n" for step in self._plan.steps)
        unused = "" if self._plan.workspace else "  (void)workspace;\n"
        math = "#include <math.h>\n" if self._plan.uses_math else ""
        text = f"""\
/* Written by rewire {__version__}. C99, needs nothing but the standard library. */
#include "{name}.h"

{math}#include <stdint.h>

{self._arrays}
{helpers}
void {name}_run(const float input[{upper}_INPUTS], float output[{upper}_OUTPUTS],
                float workspace[{upper}_WORKSPACE]) {{
{unused}{steps}}}

#ifdef {upper}_MAIN
#include <stdio.h>

/* Reads inputs from the standard input, as text, and prints the outputs of each. */
int main(void) {{
  static float input[{upper}_INPUTS], output[{upper}_OUTPUTS], workspace[{upper}_WORKSPACE];
  for (;;) {{
    for (long i = 0; i < {upper}_INPUTS; ++i)
      if (scanf("%f", &input[i]) != 1) return i == 0 ? 0 : 1;
    {name}_run(input, output, workspace);
    for (long i = 0; i < {upper}_OUTPUTS; ++i)
      printf("%.9g%c", (double)output[i], i + 1 < {upper}_OUTPUTS ? ' ' : '\\n');
  }}
}}
#endif
"""
        return text.replace("@", f"{name}_")

    def _step(self, step: Any) -> str:
        def pointer(found: re.Match[str]) -> str:
            buffer = step.buffers[int(found[1])]
            if buffer.place == "workspace":
                return f"(workspace + {buffer.offset})"
            return str(buffer.place)

        return re.sub(r"\$(\d+)", pointer, step.code)

    def _constants(self) -> str:
        parts = [self._weight(matrix) for matrix in self._plan.matrices]
        for array, numbers in self._plan.arrays.items():
            parts.append(self._array("float", array, numbers))
        return "".join(parts)

    def _weight(self, m: Matrix) -> str:
        before = self.bytes
        parts = []
        if m.cols is not None:
            at, count = m.rows, m.shape[0]
            if m.stored == "ternary":
                at, count = 2 * m.rows + (m.values < 0), 2 * m.shape[0]
            order = torch.argsort(at * m.shape[1] + m.cols)
            ends = torch.bincount(at, minlength=count).cumsum(0)
            ptr = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
            parts.append(self._array(smallest(int(ptr[-1])), f"{m.name}_ptr", ptr))
            cols = m.cols[order] if len(order) else torch.zeros(1, dtype=torch.int64)
            parts.append(self._array(smallest(m.shape[1] - 1), f"{m.name}_cols", cols))
        else:
            order = torch.arange(m.values.numel())
        if m.stored != "ternary":
            kind = "int8_t" if m.stored == "int8" else "float"
            values = m.values[order] if len(order) else torch.zeros(1)
            parts.append(self._array(kind, f"{m.name}_values", values))
        if m.scale is not None:
            parts.append(self._array("float", f"{m.name}_scale", m.scale))
        if m.bias is not None:
            parts.append(self._array("float", f"{m.name}_bias", m.bias))
        count, size = m.values.numel(), self.bytes - before
        self.weights.append(CWeight(m.title, m.stored, count, m.shape, size, m.error, m.bound))
        return "".join(parts)

    def _array(self, kind: str, name: str, numbers: Tensor) -> str:
        given = numbers.tolist()
        self.bytes += TYPES[kind] * len(given)
        words = (
            [c_float(v) for v in numbers.float().tolist()] if kind == "float" else map(str, given)
        )
        return f"static const {kind} @{name}[] = {{\n{_lines(list(words))}}};\n"


def _lines(words: Sequence[str]) -> str:
    """Words with commas, in lines of at most 100 characters."""
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 96:
            lines.append(line)
            line = ""
        line += f"{word}, " if line else f"  {word}, "
    return "".join(f"{text.rstrip()}\n" for text in [*lines, line] if text)
