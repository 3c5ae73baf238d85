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
from rewire.storage import files, reading
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
            columns = [
                pyarrow.DictionaryArray.from_arrays(codes, list(found)),
                pyarrow.array(entries.cols.numpy()),
                pyarrow.array(entries.rows.numpy()),
                pyarrow.array(
                    array_of(entries.values).astype(schema.field(3).type.to_pandas_dtype())
                ),
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
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
    text = io.StringIO(_text(path), newline="")
    rows = csv.reader(text)
    header = [cell.strip() for cell in next(rows, [])]
    places = _places(path, header)
    sources: dict[str, array[int]] = {}
    targets: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    only = _only(shapes)
    for row in rows:
        if not row:
            continue
        try:
            name = row[places["weight"]] if "weight" in places else only
            if name not in sources:
                sources[name], targets[name] = array("q"), array("q")
                values[name] = array("d")
            sources[name].append(int(row[places["source"]]))
            targets[name].append(int(row[places["target"]]))
            values[name].append(float(row[places["value"]]))
        except (IndexError, ValueError, OverflowError) as error:
            raise FileError(f"{path}, line {rows.line_num}: {reading.brief(error)}") from None
    lists = {
        name: (np.asarray(sources[name]), np.asarray(targets[name]), np.asarray(values[name]))
        for name in sources
    }
    narrow = {n: (s, t, v.astype(np.float32)) for n, (s, t, v) in lists.items()}
    return _state(path, narrow, shapes)


def _text(path: Path) -> str:
    try:
        return reading.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is no UTF-8 text (byte {error.start})") from None


def read_parquet(path: Path, shapes: Shapes | None = None) -> State:
    """The state in a Parquet file; ``shapes`` as in `read_csv`, for files of other programs."""
    import pyarrow
    from pyarrow import parquet

    content = reading.read_bytes(path)
    try:
        table = parquet.read_table(io.BytesIO(content))
        places = _places(path, table.column_names)
        kept = (table.schema.metadata or {}).get(_SHAPES)
        if shapes is None and kept is not None:
            shapes = _parsed(path, reading.parse_json(kept, f"{path}, its shapes,"))
        whole = {name: table.column(place) for name, place in places.items()}
        columns = {
            name: whole[name].to_numpy() for name in ("source", "target", "value") if name in whole
        }
        names = (
            np.asarray(whole["weight"].cast(pyarrow.string()).to_pylist(), dtype=object)
            if "weight" in whole
            else np.full(table.num_rows, _only(shapes), dtype=object)
        )
    except (pyarrow.ArrowException, OSError) as error:
        raise FileError(
            f"{path} is damaged: it is no Parquet file ({reading.brief(error)})"
        ) from None
    for name in ("source", "target"):
        if columns[name].dtype.kind not in "iu":
            raise FileError(f"{path}: {name} is {columns[name].dtype}, needed are whole numbers")
    if columns["value"].dtype.kind != "f":
        raise FileError(f"{path}: value is {columns['value'].dtype}, needed are floats")
    lists = {}
    for name in dict.fromkeys(names.tolist()):
        here = names == name
        lists[str(name)] = tuple(columns[c][here] for c in ("source", "target", "value"))
    return _state(path, lists, shapes)


def _parsed(path: Path, given: Any) -> Shapes:
    if not isinstance(given, dict) or not all(
        isinstance(s, list) and all(type(n) is int for n in s) for s in given.values()
    ):
        raise FileError(f"{path} is damaged: its shapes are {reading.brief(given)}")
    return given


def _places(path: Path, header: Sequence[str]) -> dict[str, int]:
    """Where each column is."""
    missing = [name for name in COLUMNS[1:] if name not in header]
    if missing:
        raise FileError(
            f"{path} has no column {missing[0]!r}; needed are {', '.join(COLUMNS)} and found are "
            f"{reading.brief(', '.join(header), 100)}"
        )
    return {name: header.index(name) for name in COLUMNS if name in header}


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
        try:
            put(state, name, Entries(tuple(shapes[name]), targets.long(), sources.long(), values))
        except ValueError as error:
            raise FileError(f"{path}: {name}: {error}") from None
    try:
        entries_of(state)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    return state
