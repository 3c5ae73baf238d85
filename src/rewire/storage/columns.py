"""Columns of tables, found by their names, in CSV and Parquet files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rewire.storage import reading
from rewire.storage.reading import FileError

__all__ = ["CsvRows", "ParquetColumns", "is_number", "read_parquet"]


class CsvRows:
    """The rows of a CSV file whose first line has names of columns; each as the cells of the
    ``needed`` columns and of those of the ``optional`` ones that there are.

    Raises OSError or FileError, also while rows are taken. Memory: a few times the file's size.

    Attributes:
        names: of the columns, in the order of the cells.
        line: where the last row taken ends in the file, for errors.
    """

    def __init__(self, path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
        try:
            text = reading.read_bytes(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise FileError(
                f"{path} cannot be read as CSV: it is not UTF-8 text (byte {error.start})"
            ) from None
        self._path, self._reader = path, csv.reader(io.StringIO(text, newline=""))
        header = [name.strip() for name in next(self._rows(), [])]
        self.names = _found(path, header, needed, optional)
        self._places = [header.index(name) for name in self.names]

    @property
    def line(self) -> int:
        """The number of the line that was read last; the first one is 1."""
        return self._reader.line_num

    def __iter__(self) -> Iterator[list[str]]:
        for row in self._rows():
            if row:
                try:
                    yield [row[place] for place in self._places]
                except IndexError:
                    raise FileError(
                        f"{self._path}, line {self.line}: it has fewer columns than the first line"
                    ) from None

    def _rows(self) -> Iterator[list[str]]:
        try:
            yield from self._reader
        except csv.Error as error:
            raise FileError(f"{self._path} cannot be read as CSV: {error}") from None


class ParquetColumns(NamedTuple):
    """Columns of a Parquet file (`pyarrow.ChunkedArray`) by name, and its metadata."""

    columns: dict[str, Any]
    metadata: Mapping[bytes, bytes]


def read_parquet(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> ParquetColumns:
    """The ``needed`` columns, which have no missing entries, and the ``optional`` ones that there
    are.

    Raises OSError, FileError, or ImportError without pyarrow. Memory: the file's size and that of
    the columns.
    """
    import pyarrow
    from pyarrow import parquet

    content = io.BytesIO(reading.read_bytes(path))
    try:
        header = parquet.read_schema(content)
        names = _found(path, header.names, needed, optional)
        table = parquet.read_table(content, columns=names)
        columns = {name: table.column(name) for name in names}
    except (pyarrow.ArrowException, OSError) as error:
        raise FileError(f"{path} cannot be read as Parquet: {reading.brief(error)}") from None
    for name in needed:
        if columns[name].null_count:
            raise FileError(f"{path}: column {name} has entries that are missing")
    return ParquetColumns(columns, header.metadata or {})


def is_number(text: str) -> bool:
    """Whether the text is a number as Python writes them."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _found(
    path: Path, header: Sequence[str], needed: Sequence[str], optional: Sequence[str]
) -> list[str]:
    """The columns to read; FileError unless all that are needed are there."""
    missing = [name for name in needed if name not in header]
    if missing:
        raise FileError(
            f"{path} has no column {' and '.join(missing)}: needed are {' and '.join(needed)}, "
            f"and it has {reading.brief(', '.join(header), 100) or 'nothing'}"
        )
    return [*needed, *(name for name in optional if name in header)]
