"""Connections as a list of edges, one a row: weight, source, target, value.

``source`` is the input (column) and ``target`` the output (row) of the weight as a matrix. A list
of edges has no biases. Parquet keeps the shapes of the weights in its metadata; in CSV they are not
there, and who reads it gives them.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rewire.export.lists.entries import Entries, State, array_of, entries_of, put, state_of
from rewire.storage import columns, files, reading
from rewire.storage.reading import FileError

__all__ = ["COLUMNS", "read_csv", "read_parquet", "write_csv", "write_parquet"]

COLUMNS = ("weight", "source", "target", "value")
_SHAPES = b"rewire.shapes"
_ROWS = 65536

Shapes = Mapping[str, Sequence[int]]


def write_csv(model: nn.Module, path: Path) -> int:
    """Write the connections as text, in the fewest digits that give the same values; returns the
    bytes. Memory beside the lists: one piece of the text.
    """
    files.write_pieces(path, _lines(model))
    return path.stat().st_size


def _lines(model: nn.Module) -> Iterator[bytes]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, entries in entries_of(state_of(model)).items():
        values = array_of(entries.values)
        for first in range(0, len(values), _ROWS):
            part = slice(first, first + _ROWS)
            sources, targets = entries.cols[part].tolist(), entries.rows[part].tolist()
            rows = zip(sources, targets, values[part].astype(str), strict=True)
            writer.writerows((name, *row) for row in rows)
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()


def write_parquet(model: nn.Module, path: Path) -> int:
    """Write the connections as a Parquet table; returns the bytes."""
    import pyarrow
    from pyarrow import parquet

    found = entries_of(state_of(model))
    shapes = json.dumps({name: list(e.shape) for name, e in found.items()})
    kinds = {e.values.dtype for e in found.values()}
    schema = pyarrow.schema(
        {
            "weight": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
            "source": pyarrow.int64(),
            "target": pyarrow.int64(),
            "value": pyarrow.float64() if torch.float64 in kinds else pyarrow.float32(),
        },
        metadata={_SHAPES: shapes.encode()},
    )
    file = io.BytesIO()
    with parquet.ParquetWriter(file, schema) as writer:
        for number, entries in enumerate(found.values()):
            codes = pyarrow.array(np.full(len(entries.rows), number, dtype=np.int32))
            arrays = [
                pyarrow.DictionaryArray.from_arrays(codes, list(found)),
                pyarrow.array(entries.cols.numpy()),
                pyarrow.array(entries.rows.numpy()),
                pyarrow.array(
                    array_of(entries.values).astype(schema.field(3).type.to_pandas_dtype())
                ),
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
    content = file.getbuffer()
    files.write_pieces(path, [content])
    return len(content)


# --- reading --------------------------------------------------------------------------------------


def read_csv(path: Path, shapes: Shapes | None = None) -> State:
    """The state in a CSV file with a header; the column ``weight`` may be missing where ``shapes``
    has one entry.

    Args:
        shapes: of the dense weights by name, because the file does not have them.

    Raises OSError or FileError. Memory: a few times the file's size.
    """
    rows = columns.CsvRows(path, COLUMNS[1:], COLUMNS[:1])
    sources: dict[str, array[int]] = {}
    targets: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    only = [_only(shapes)]  # where the file has no column for it
    for source, target, value, *named in rows:
        (name,) = named or only
        try:
            if name not in sources:
                sources[name], targets[name] = array("q"), array("q")
                values[name] = array("d")
            sources[name].append(int(source))
            targets[name].append(int(target))
            values[name].append(float(value))
        except (ValueError, OverflowError) as error:
            raise FileError(f"{path}, line {rows.line}: {reading.brief(error)}") from None
    lists = {
        name: (np.asarray(sources[name]), np.asarray(targets[name]), np.asarray(values[name]))
        for name in sources
    }
    narrow = {n: (s, t, v.astype(np.float32)) for n, (s, t, v) in lists.items()}
    return _state(path, narrow, shapes)


def read_parquet(path: Path, shapes: Shapes | None = None) -> State:
    """The state in a Parquet file; ``shapes`` as in `read_csv`, for files of other programs."""
    import pyarrow

    found, metadata = columns.read_parquet(path, COLUMNS[1:], COLUMNS[:1])
    if shapes is None and _SHAPES in metadata:
        shapes = _parsed(path, reading.parse_json(metadata[_SHAPES], f"{path}, its shapes,"))
    arrays = {name: found[name].to_numpy() for name in COLUMNS[1:]}
    try:
        names = (
            np.asarray(found["weight"].cast(pyarrow.string()).to_pylist(), dtype=object)
            if "weight" in found
            else np.full(len(found["value"]), _only(shapes), dtype=object)
        )
    except pyarrow.ArrowException as error:
        raise FileError(f"{path}: column weight has no names ({reading.brief(error)})") from None
    for name in ("source", "target"):
        if arrays[name].dtype.kind not in "iu":
            raise FileError(f"{path}: {name} is {arrays[name].dtype}, needed are whole numbers")
    if arrays["value"].dtype.kind != "f":
        raise FileError(f"{path}: value is {arrays['value'].dtype}, needed are floats")
    lists = {}
    for name in dict.fromkeys(names.tolist()):
        here = names == name
        lists[str(name)] = tuple(arrays[c][here] for c in COLUMNS[1:])
    return _state(path, lists, shapes)


def _parsed(path: Path, given: Any) -> Shapes:
    if not isinstance(given, dict) or not all(
        isinstance(s, list) and all(type(n) is int for n in s) for s in given.values()
    ):
        raise FileError(f"{path} is damaged: its shapes are {reading.brief(given)}")
    return given


def _only(shapes: Shapes | None) -> str:
    """The name of the weight where the file does not say."""
    return next(iter(shapes)) if shapes and len(shapes) == 1 else "weight"


def _state(path: Path, lists: Mapping[str, Any], shapes: Shapes | None) -> State:
    state: State = {}
    for name in {**(shapes or {}), **lists}:
        if shapes is None or name not in shapes:
            raise FileError(
                f"{path} does not say the shape of {name!r}: give it with shapes=, on the command "
                f"line --shape {name}=ROWSxCOLS"
            )
        empty = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        sources, targets, values = (torch.from_numpy(np.array(a)) for a in lists.get(name, empty))
        put(state, name, Entries(tuple(shapes[name]), targets.long(), sources.long(), values))
    return state
