"""The formats in which networks leave and enter: one table, from which options, help and errors
come.

The table loads nothing: each format names the functions that write and read it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FORMATS", "Format", "format_of", "readable"]


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        name: the option of ``rewire export`` without its dashes.
        endings: what the name of a file ends with; of a folder nothing.
        holds: what is in it, in one sentence.
        writes: "module:function" that takes a model and a path; "" if nothing writes it.
        reads: "module:function" that takes a path and gives a state; "" if nothing reads it.
        settings: keyword arguments of the writer: "example", "values", "name", "dense", "neurons".
        packages: what it needs besides the library itself, by the name that Python imports.
        extra: the extra of this distribution that installs them.
        memory: "O(K)", or "O(M)" where the format has every position of a weight.
    """

    name: str
    endings: tuple[str, ...]
    holds: str
    writes: str = ""
    reads: str = ""
    settings: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = ""
    memory: str = "O(K)"

    @property
    def metavar(self) -> str:
        """What its option takes."""
        return "FILE" if self.endings else "FOLDER"

    def writer(self) -> Callable[..., Any]:
        """The function that writes it. Raises ImportError if a package is missing."""
        return self._function(self.writes)

    def reader(self) -> Callable[[Path], Any]:
        """The function that reads it. Raises ImportError if a package is missing."""
        return self._function(self.reads)

    def require(self) -> None:
        """Raise ImportError, with the line to type, if a package is missing."""
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            raise ImportError(
                f"the format {self.name} needs {' and '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not installed: "
                f"pip install 'torch-rewire[{self.extra}]'"
            )

    def _function(self, name: str) -> Callable[..., Any]:
        self.require()
        module, _, attribute = name.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return found


_LISTS = "rewire.export.lists"
_ARRAYS = f"{_LISTS}.arrays"
_EDGES = f"{_LISTS}.edges"

#: All formats by name.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "sparse",
            (".safetensors",),
            "The state_dict with sparse weights as slots, which rewire.load reads.",
            "rewire.export.states:write_sparse",
            "rewire.export.states:read_safetensors",
        ),
        Format(
            "csr",
            (".npz",),
            "Each sparse weight by row (data, indices, indptr), and all other tensors.",
            f"{_ARRAYS}:write_csr",
            f"{_ARRAYS}:read_npz",
        ),
        Format(
            "coo",
            (".npz",),
            "Each sparse weight as coordinates (data, row, col), and all other tensors.",
            f"{_ARRAYS}:write_coo",
            f"{_ARRAYS}:read_npz",
        ),
        Format(
            "scipy",
            (),
            "A file for each sparse weight, which scipy.sparse.load_npz reads, and one for the "
            "other tensors.",
            f"{_ARRAYS}:write_scipy",
            f"{_ARRAYS}:read_folder",
        ),
        Format(
            "parquet",
            (".parquet",),
            "The connections alone, a row each: weight, source, target, value.",
            f"{_EDGES}:write_parquet",
            f"{_EDGES}:read_parquet",
            packages=("pyarrow",),
            extra="data",
        ),
        Format(
            "csv",
            (".csv",),
            "The connections alone as text, with the columns of parquet.",
            f"{_EDGES}:write_csv",
            f"{_EDGES}:read_csv",
        ),
        Format(
            "state-dict",
            (".safetensors",),
            "The state_dict of the dense twin, with zeros where there is no connection.",
            "rewire.export.states:write_dense",
            "rewire.export.states:read_safetensors",
            settings=("dense",),
            memory="O(M)",
        ),
        Format(
            "graphml",
            (".graphml",),
            "Units and connections as a graph, for pictures.",
            "rewire.export.graphml:write",
        ),
        Format(
            "onnx",
            (".onnx",),
            "The network for onnxruntime, sparse weights as sparse initialisers.",
            "rewire.export.onnx_graph:write",
            settings=("example", "dense"),
            packages=("onnx", "onnxscript"),
            extra="onnx",
        ),
        Format(
            "nir",
            (".nir",),
            "A graph for neuromorphic programs, with the connections as metadata.",
            "rewire.export.nir_graph:write",
            settings=("example", "neurons", "dense"),
            packages=("nir",),
            extra="nir",
            memory="O(M)",
        ),
        Format(
            "program",
            (".pt2",),
            "A program of torch.export.",
            "rewire.export.program:write",
            settings=("example", "values"),
        ),
        Format(
            "c",
            (),
            "C99 source there: NAME.h and NAME.c.",
            "rewire.export.csource.write:write",
            settings=("example", "values", "name"),
        ),
        Format(
            "checkpoint",
            (".pt", ".pth", ".bin"),
            "A state_dict that torch.save wrote, read without running any code in it.",
            reads="rewire.export.states:read_checkpoint",
        ),
    )
}


def format_of(path: str | Path, name: str | None = None, *, writing: bool = False) -> Format:
    """The format called ``name``, or the one that the ending of ``path`` means.

    Args:
        writing: whether it is to be written, else it is to be read.

    Raises ValueError for an unknown name, for a format that cannot be written (or read), for an
    ending that no format has, and for one that several formats with different content have.
    """
    able = {f.name: f for f in FORMATS.values() if (f.writes if writing else f.reads)}
    if name is not None:
        if name not in able:
            what = "written" if writing else "read"
            raise ValueError(f"format {name!r} cannot be {what}, allowed are {', '.join(able)}")
        return able[name]
    place = Path(path)
    ending = place.suffix.lower()
    fits = [f for f in able.values() if ending in f.endings or not (f.endings or ending)]
    if not writing:
        if place.is_dir():
            fits = [f for f in able.values() if not f.endings]
        fits = list({f.reads: f for f in fits}.values())  # one reader tells them apart
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ValueError(
            f"{place.name} can be {' or '.join(f.name for f in fits)}: give one of them as format="
        )
    endings = dict.fromkeys(ending for f in able.values() for ending in f.endings)
    raise ValueError(
        f"{place}: the ending is {ending or 'missing'}, allowed are {', '.join(endings)}"
    )


def readable() -> tuple[str, ...]:
    """The endings of files that can be read."""
    endings = (ending for f in FORMATS.values() if f.reads for ending in f.endings)
    return tuple(dict.fromkeys(endings))
