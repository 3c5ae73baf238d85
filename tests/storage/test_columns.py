"""Columns of tables against the csv module and pyarrow, and tables that are refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from rewire.storage.columns import CsvRows, is_number, read_parquet
from rewire.storage.reading import FileError

TABLE = 'weight, target ,"note",source\na,1,"x, y",2\n\nb,3,"two\nlines",4\n'


def test_cells_are_those_of_the_csv_module(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(TABLE, encoding="utf-8-sig")
    rows = CsvRows(path, ("source", "target"), ("weight", "colour"))
    assert rows.names == ["source", "target", "weight"]
    with path.open(newline="", encoding="utf-8-sig") as file:
        theirs = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(file)]
    found, lines = [], []
    for row in rows:
        found.append(row)
        lines.append(rows.line)
    assert found == [[row[name] for name in rows.names] for row in theirs]
    assert lines == [2, 5]  # where each row ends in the file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no column source and target.*it has nothing"),
        (b"source,end\n1,2\n", "no column target: needed are source and target.*source, end"),
        (b"source,target\n1,2\n3\n", r"t\.csv, line 3: it has fewer columns"),
        (b"source,target\n\xff,2\n", "it is not UTF-8 text"),
        (b'source,target\n"' + b"x" * 200_000 + b'",2\n', "cannot be read as CSV"),
    ],
)
def test_bad_tables_are_refused_in_a_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(FileError, match=said) as caught:
        list(CsvRows(path, ("source", "target")))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        CsvRows(tmp_path / "none.csv", ("source",))


def test_columns_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"a": [1, 2], "b": [0.5, None], "c": ["x", "y"]}, metadata={"k": "v"})
    parquet.write_table(table, path)
    columns, metadata = read_parquet(path, ("c", "a"), ("b", "d"))
    assert {name: column.to_pylist() for name, column in columns.items()} == {
        "c": ["x", "y"],
        "a": [1, 2],
        "b": [0.5, None],
    }
    assert metadata[b"k"] == b"v"
    with pytest.raises(FileError, match="column b has entries that are missing"):
        read_parquet(path, ("b",))
    with pytest.raises(FileError, match="no column d: needed are a and d, and it has a, b, c"):
        read_parquet(path, ("a", "d"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileError, match="cannot be read as Parquet"):
        read_parquet(path, ("a",))


def test_numbers_and_words() -> None:
    assert [is_number(word) for word in ("1", "-2.5e3", "nan", "", "x", "1,5")] == [
        *(True, True, True),
        *(False, False, False),
    ]
