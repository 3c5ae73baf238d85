"""Samples of one's own: from a table or arrays to a `Dataset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewire.app.data.dataset import Dataset, Goal
from rewire.app.data.options import FileOptions
from rewire.app.data.rows import Rows, SparseRows
from rewire.app.data.splitting import check_classes, stratified
from rewire.app.errors import DataError

__all__ = ["MOST_CLASSES", "MOST_WORDS", "Table", "goal_of", "make_dataset"]

#: Whole numbers with more different values than this are taken for quantities.
MOST_CLASSES = 50
#: A column with more different words than this, such as names, would be more inputs than samples.
MOST_WORDS = 1000


@dataclass(frozen=True)
class Table:
    """Samples as they were read.

    Attributes:
        x: a DataFrame of pandas, an array (samples, features) or a sparse matrix of SciPy.
        y: targets (samples,), or (samples, targets); numbers, words or truth values.
        names: of the features; of a DataFrame its columns.
        targets: names of the targets.
        shape: of one sample, where it is more than a row.
        image_shape: the same, where it is an image.
    """

    x: Any
    y: NDArray[Any]
    names: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("target",)
    shape: tuple[int, ...] = ()
    image_shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def is_frame(self) -> bool:
        """Whether x is a DataFrame."""
        return hasattr(self.x, "iloc")


def goal_of(y: NDArray[Any], options: FileOptions) -> Goal:
    """Whether classes or numbers are to be found, from what the targets look like.

    Words, truth values and whole numbers with at most `MOST_CLASSES` different values are classes.
    """
    if options.task != "auto":
        return options.task
    if y.ndim > 1:
        return "regression"
    if y.dtype.kind in "iu" or (y.dtype.kind == "f" and bool((y == np.round(y)).all())):
        return "classification" if len(np.unique(y)) <= MOST_CLASSES else "regression"
    return "regression" if y.dtype.kind == "f" else "classification"


def make_dataset(
    name: str, parts: Mapping[str, Table], options: FileOptions, sha256: Mapping[str, str]
) -> Dataset:
    """A data set of the parts "train" and, where they are given, "test" and "validation".

    Without a test part a share of the samples is held out, of each class in proportion. What words
    there are in a column, and which of them become inputs, is decided by the training samples.

    Raises DataError for missing values, with the names of the columns, for a target with one class,
    and for a class that is missing in a part.
    """
    for part, table in parts.items():
        _check_shapes(name, part, table)
        _check_targets(name, part, table)
        if part != "train":
            _check_same(name, part, parts["train"], table)
    whole = np.concatenate([table.y for table in parts.values()])
    goal = goal_of(whole, options)
    classes, targets = _encode(name, goal, {p: t.y for p, t in parts.items()}, parts["train"])
    index = {part: torch.arange(len(table)) for part, table in parts.items()}
    places = {part: part for part in parts}
    if "test" not in parts:
        index["train"], index["test"] = _hold_out(name, targets["train"], goal, options)
        places["test"] = "train"
    labels = {part: targets[places[part]][index[part]] for part in places}
    if goal == "classification":
        every = torch.cat(list(labels.values()))
        advice = "leave the class out, add samples, or choose another share or file"
        for part, y in labels.items():
            said = "training" if part == "train" else part
            check_classes(y, classes, said, every, advice)
    names, inputs = _inputs(name, parts, places, index)
    given = parts["train"]
    return Dataset(
        name,
        inputs["train"],
        labels["train"],
        inputs["test"],
        labels["test"],
        classes,
        given.image_shape,
        sha256,
        given.shape,
        inputs.get("validation"),
        labels.get("validation"),
        standardise=True,
        stratify=goal == "classification",
        feature_names=names,
        target_names=given.targets if goal == "regression" else (),
    )


def _check_shapes(name: str, part: str, table: Table) -> None:
    """Refuse what is no table of numbers with one target, or one row of targets, for each row."""
    x, y = table.x, table.y
    if len(getattr(x, "shape", ())) != 2 or y.ndim not in (1, 2) or x.shape[0] != len(y):
        raise DataError(
            f"{name}: the {part} part has inputs of shape {tuple(getattr(x, 'shape', ()))} and "
            f"targets of shape {y.shape}; allowed are (samples, features), and (samples,) or "
            "(samples, targets)"
        )
    if not x.shape[1]:
        raise DataError(f"{name}: there is no column besides the target")
    if not table.is_frame and x.dtype.kind not in "biuf":
        raise DataError(f"{name}: the inputs of the {part} part are {x.dtype}, needed are numbers")
    if table.is_frame and not x.columns.is_unique:
        repeated = x.columns[x.columns.duplicated()][0]
        raise DataError(f"{name}: the {part} part has two columns called {str(repeated)!r}")


def _check_targets(name: str, part: str, table: Table) -> None:
    if not len(table):
        raise DataError(f"{name}: the {part} part has no sample")
    missing = np.array([v is None or v != v for v in table.y.ravel()]).reshape(table.y.shape)
    columns = np.atleast_1d(missing.any(0)) if table.y.ndim > 1 else [missing.any()]
    bad = [n for n, found in zip(table.targets, columns, strict=True) if found]
    if bad:
        raise DataError(
            f"{name}: the target {bad[0]!r} is missing in {int(missing.sum())} of {len(table)} "
            "samples; leave these samples out"
        )
    if table.y.dtype.kind == "f" and not np.isfinite(table.y).all():
        raise DataError(f"{name}: the target {table.targets[0]!r} has infinite numbers")


def _check_same(name: str, part: str, train: Table, other: Table) -> None:
    """Refuse a part with other columns than the training part."""
    if train.is_frame != other.is_frame:
        raise DataError(
            f"{name}: of the training part and the {part} part one is a DataFrame and one an "
            "array; give both as the same"
        )
    if train.is_frame:
        missing = [c for c in train.x.columns if c not in other.x.columns]
        if missing:
            raise DataError(f"{name}: the {part} part has no column {missing[0]!r}")
    elif train.x.shape[1] != other.x.shape[1]:
        raise DataError(
            f"{name}: training samples have {train.x.shape[1]} features, {part} samples "
            f"{other.x.shape[1]}"
        )


def _encode(
    name: str, goal: Goal, y: Mapping[str, NDArray[Any]], train: Table
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Names of the classes, and targets as numbers."""
    if goal == "regression":
        try:
            floats = {p: v.astype(np.float64).reshape(len(v), -1) for p, v in y.items()}
        except (TypeError, ValueError):
            raise DataError(
                f"{name}: --task regression needs numbers, and the target {train.targets[0]!r} "
                "has words"
            ) from None
        if all(bool((v == floats["train"][0]).all()) for v in floats.values()):
            raise DataError(f"{name}: the target {train.targets[0]!r} has one value only")
        return (), {p: torch.from_numpy(v.astype(np.float32)) for p, v in floats.items()}
    if train.y.ndim > 1:
        raise DataError(f"{name}: --target has several columns, which only a regression has")
    shown = {p: np.array([_word(v) for v in values]) for p, values in y.items()}
    try:  # numbers in the order of numbers
        names = [_word(v) for v in np.unique(np.concatenate(list(y.values())))]
    except TypeError:  # numbers and words together
        names = sorted({word for words in shown.values() for word in words.tolist()})
    if len(names) < 2:
        raise DataError(
            f"{name}: the target {train.targets[0]!r} has one class only, {names[0]!r}; needed are "
            "two or more"
        )
    number = {word: i for i, word in enumerate(names)}
    return tuple(names), {
        p: torch.tensor([number[word] for word in words]) for p, words in shown.items()
    }


def _word(value: Any) -> str:
    """A class as people write it: 3.0 is "3"."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _hold_out(name: str, y: Tensor, goal: Goal, options: FileOptions) -> tuple[Tensor, Tensor]:
    """Numbers of the training and of the test samples."""
    count = round(options.test_share * len(y))
    if not 0 < count < len(y):
        raise DataError(
            f"{name}: --test-share {options.test_share:g} of {len(y)} samples leaves no sample to "
            f"{'test' if count == 0 else 'train'} on; choose another share, or give --test-data"
        )
    generator = torch.Generator().manual_seed(options.split_seed)
    if goal == "classification":
        return stratified(y, count, generator)
    order = torch.randperm(len(y), generator=generator)
    return order[count:].sort().values, order[:count].sort().values


def _inputs(
    name: str, parts: Mapping[str, Table], places: Mapping[str, str], index: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """Names of the features, and those of each part."""
    train = parts["train"]
    if train.is_frame:
        frames = {p: parts[places[p]].x.iloc[index[p].numpy()] for p in places}
        return _of_frames(name, frames)
    found: dict[str, Rows] = {}
    for part, place in places.items():
        x = parts[place].x
        if hasattr(x, "tocsr"):
            rows = SparseRows(x.tocsr()[index[part].numpy()])
            _refuse_missing(name, rows.matrix.data.reshape(-1, 1), ("some entries",))
            found[part] = rows
            continue
        with np.errstate(over="ignore"):
            values = np.asarray(x[index[part].numpy()], np.float32)
        _refuse_missing(name, values, train.names)
        found[part] = torch.from_numpy(values)
    return train.names, found


def _of_frames(name: str, frames: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """Columns of numbers as they are, of words as one input for each word."""
    from pandas.api import types

    names: list[str] = []
    columns: dict[str, list[NDArray[np.float32]]] = {part: [] for part in frames}
    missing: dict[str, int] = {}
    for column in frames["train"].columns:
        series = {part: frame[column] for part, frame in frames.items()}
        absent = sum(int(s.isna().sum()) for s in series.values())
        if absent:
            missing[str(column)] = absent
            continue
        first = series["train"]
        if types.is_numeric_dtype(first) and not types.is_complex_dtype(first):
            names.append(str(column))
            for part, s in series.items():
                if not types.is_numeric_dtype(s):
                    raise DataError(
                        f"{name}: the column {str(column)!r} has numbers in the training part, "
                        f"words in the {part} part"
                    )
                with np.errstate(over="ignore"):
                    columns[part].append(s.to_numpy(np.float32).reshape(-1, 1))
        elif types.is_datetime64_any_dtype(first) or types.is_timedelta64_dtype(first):
            raise DataError(
                f"{name}: the column {str(column)!r} has times; turn them into numbers, such as "
                "days, or leave the column out"
            )
        else:
            words = sorted({str(v) for v in first})
            if len(words) > MOST_WORDS:
                raise DataError(
                    f"{name}: the column {str(column)!r} has {len(words)} different words, such as "
                    f"{words[0]!r}; each would be an input, and allowed are {MOST_WORDS}: leave "
                    "the column out, or turn it into numbers"
                )
            names += [f"{column}={word}" for word in words]
            for part, s in series.items():
                texts = s.astype(str).to_numpy().reshape(-1, 1)
                columns[part].append((texts == np.array(words)).astype(np.float32))
    if missing:
        listed = ", ".join(f"{column!r} ({count})" for column, count in missing.items())
        raise DataError(
            f"{name}: values are missing (NaN) in {listed}; fill them in, or leave these columns "
            "or samples out"
        )
    found: dict[str, Rows] = {}
    for part, blocks in columns.items():
        values = np.concatenate(blocks, 1)
        _refuse_missing(name, values, names)
        found[part] = torch.from_numpy(values)
    return tuple(names), found


def _refuse_missing(name: str, values: NDArray[Any], names: Sequence[str]) -> None:
    """Raise DataError that names the columns with numbers that are none, or too large."""
    bad = ~np.isfinite(values)
    if not bad.any():
        return
    where = np.flatnonzero(bad.any(0))[:5]
    listed = ", ".join(
        f"{names[i] if i < len(names) else f'feature {i}'!r} ({int(bad[:, i].sum())})"
        for i in where
    )
    what = "values are missing (NaN)" if np.isnan(values).any() else "values are not finite"
    raise DataError(f"{name}: {what} in {listed}; fill them in, or leave them out")
