"""Layers made of lists of edges, in every form that they come in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewire
from rewire.nn import SparseLinear, from_edges

PAIRS = [(0, 1), (3, 1), (2, 0), (4, 5)]  # (source, target)
WANTED = {(1, 0), (1, 3), (0, 2), (5, 4)}  # (row, column)
SOURCES, TARGETS = (list(ends) for ends in zip(*PAIRS, strict=True))


def positions(layer: SparseLinear) -> set[tuple[int, int]]:
    rows, cols, _ = layer.weight.coo()
    return set(zip(rows.tolist(), cols.tolist(), strict=True))


@pytest.mark.parametrize(
    "edges",
    [
        PAIRS,
        tuple(PAIRS),
        iter(PAIRS),
        set(PAIRS),
        [list(pair) for pair in PAIRS],
        np.array(PAIRS),
        np.array(PAIRS, dtype=np.float64),
        torch.tensor([SOURCES, TARGETS]),
        torch.tensor([SOURCES, TARGETS], dtype=torch.int32),
        (torch.tensor(SOURCES), torch.tensor(TARGETS)),
        (np.array(SOURCES), np.array(TARGETS)),
    ],
    ids=lambda edges: type(edges).__name__,
)
def test_every_form_gives_the_same_layer(edges: Any) -> None:
    layer = from_edges(edges)
    assert (layer.in_features, layer.out_features) == (5, 6)
    assert positions(layer) == WANTED
    assert layer.weight.prior is None
    assert layer.weight.connections == 4
    x = torch.randn(3, 5)
    assert layer.bias is not None
    assert torch.allclose(layer(x), x @ layer.weight.to_dense().T + layer.bias)
    # values as large as those of a dense layer whose inputs are the row's connections
    assert float(layer.weight.values.detach().abs().max()) <= 1
    assert bool((layer.weight.values != 0).all())


@pytest.mark.parametrize("form", ["csr_array", "coo_matrix", "csc_array", "lil_matrix"])
def test_scipy_matrices_are_the_weight(form: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    dense = np.zeros((6, 5))
    dense[TARGETS, SOURCES] = 7.0
    matrix = getattr(sparse, form)(dense)
    layer = from_edges(matrix)
    assert layer.weight.shape == (6, 5)
    assert positions(layer) == WANTED
    with pytest.raises(ValueError, match=r"\(6, 5\), and the layer's weight is \(5, 6\).*\.T"):
        SparseLinear(6, 5, edges=matrix)
    zero = sparse.coo_matrix(([0.0], ([2], [1])), shape=(6, 5))  # an entry that is stored counts
    assert positions(from_edges(zero)) == {(2, 1)}


def csv_of(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_files(tmp_path: Path) -> None:
    lines = "\n".join(f"{t},{s},0.5" for s, t in PAIRS)
    path = csv_of(tmp_path / "edges.csv", f"target, source ,weight\n{lines}\n\n")
    assert positions(from_edges(path)) == WANTED
    assert positions(from_edges(str(path), 9, 9)) == WANTED
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"target": TARGETS, "value": [1.0] * 4, "source": SOURCES})
    parquet.write_table(table, tmp_path / "edges.parquet")
    assert positions(from_edges(tmp_path / "edges.parquet")) == WANTED
    named = pyarrow.table({"target": ["u", "v"], "source": ["b", "a"]})
    parquet.write_table(named, tmp_path / "named.parquet")
    layer = from_edges(tmp_path / "named.parquet", inputs=["a", "b", "c"], outputs=["u", "v"])
    assert (layer.in_features, positions(layer)) == (3, {(0, 1), (1, 0)})


def test_lists_that_rewire_writes_are_read(tmp_path: Path) -> None:
    layer = from_edges(PAIRS, frozen=True)
    for name in ("edges.csv", "edges.parquet"):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        rewire.export.save(layer, tmp_path / name)
        assert positions(from_edges(tmp_path / name)) == WANTED
        model = torch.nn.Sequential(layer, from_edges([(5, 1)]))
        rewire.export.save(model, tmp_path / f"two_{name}")
        with pytest.raises(
            ValueError, match=r"edges of 2 weights, such as 0\.weight and 1\.weight"
        ):
            from_edges(tmp_path / f"two_{name}")
    rewire.export.save(layer, tmp_path / "model.safetensors", "sparse")
    loaded = SparseLinear(5, 6, connections=9)
    rewire.load(loaded, tmp_path / "model.safetensors")
    assert loaded.weight.prior == layer.weight.prior


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", "no column source and target"),
        ("a.csv", "source,end\n1,2\n", "no column target.*it has source, end"),
        ("a.csv", "source,target\n1\n", "a.csv, line 2: it has fewer columns"),
        ("a.csv", "source,target\n1,x\n", r"targets of edges \(a.csv\) must be whole numbers"),
        ("a.csv", "source,target\n1,2.5\n", "must be whole numbers"),
        ("a.csv", "source,target\n1,99999999999999999999\n", "must be whole numbers"),
        ("a.parquet", "no Parquet", "cannot be read as Parquet"),
        ("a.txt", "1 2", "must end in .csv or .parquet"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=words):
        from_edges(csv_of(tmp_path / name, text))


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.csv is no file"):
        from_edges(tmp_path / "nothing.csv")


def test_names_of_units() -> None:
    genes, pathways = ["TP53", "BRCA1", "EGFR"], ["repair", "growth"]
    edges = [("BRCA1", "repair"), ("EGFR", "growth")]
    layer = from_edges(
        edges,
        inputs=genes,
        outputs=pathways,
        frozen=[("TP53", "repair")],
        allowed=[("TP53", "growth")],
    )
    assert positions(layer) == {(0, 1), (1, 2), (0, 0)}
    assert layer.weight.prior is not None
    assert str(layer.weight.prior) == "4 allowed positions, 1 frozen connections"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"inputs": genes}, "targets of edges must be whole numbers, not such as .*outputs="),
        ({"inputs": genes, "outputs": ["repair"]}, "'growth', which is not among the names"),
        ({"inputs": ["TP53", "TP53"], "outputs": pathways}, "must be distinct"),
    ]
    for bad, words in cases:
        with pytest.raises(ValueError, match=words):
            from_edges(edges, **bad)


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ([(0, 1), (0, 1)], "from 0 to 1 occurs more than once"),
        ([(0, 1, 2)], "entry 0 of edges is no pair"),
        ([0, 1], "entry 0 of edges is no pair"),
        (torch.tensor(PAIRS), r"\(4, 2\), and an edge_index is \(2, n\).*edges\.t\(\)"),
        (torch.full((2, 3), 0.5), "must be whole numbers"),
        (np.zeros((2, 3), dtype=int), r"array of shape \(2, 3\)"),
        (3, "edges is int"),
        ({"source": [1]}, "edges is dict"),
        ((np.zeros((2, 2), dtype=int), np.zeros(2, dtype=int)), "must be 1-D"),
    ],
    ids=str,
)
def test_what_is_no_list_of_edges(edges: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_edges(edges)


def test_edges_that_the_layer_does_not_have() -> None:
    words = "edge 1 of edges has source 3, and the layer has 3 inputs, numbered from 0 to 2"
    with pytest.raises(ValueError, match=re.escape(words)):
        SparseLinear(3, 6, edges=PAIRS)
    with pytest.raises(ValueError, match="edge 0 of allowed has target -1"):
        SparseLinear(5, 6, edges=PAIRS, allowed=[(0, -1)])
    with pytest.raises(ValueError, match="may have 3 connections, and 4 edges are given"):
        SparseLinear(5, 6, edges=PAIRS, connections=3)
    with pytest.raises(ValueError, match="exactly one of connections= and density="):
        SparseLinear(5, 6, allowed=PAIRS)


def test_what_is_frozen() -> None:
    def frozen(**given: Any) -> set[int]:
        prior = SparseLinear(5, 6, **given).weight.prior
        return set() if prior is None or prior.frozen is None else set(prior.frozen.tolist())

    assert frozen(edges=PAIRS, frozen=True) == {row * 5 + col for row, col in WANTED}
    assert frozen(edges=PAIRS, frozen=torch.tensor([True, False, False, True])) == {5, 29}
    assert frozen(edges=PAIRS, frozen=np.array([True, False, False, True])) == {5, 29}
    assert frozen(edges=PAIRS, frozen=[(1, 1)]) == {6}
    assert frozen(frozen=[(1, 1)], connections=9) == {6}
    assert frozen(edges=PAIRS) == set()
    with pytest.raises(ValueError, match="give edges= as well"):
        frozen(frozen=True, connections=3)
    with pytest.raises(ValueError, match="frozen has 2 entries for 4 edges"):
        frozen(edges=PAIRS, frozen=torch.tensor([True, False]))


def test_random_connections_beside_the_edges() -> None:
    g = torch.Generator().manual_seed(0)
    layer = SparseLinear(5, 6, edges=PAIRS, connections=11, generator=g)
    assert layer.weight.connections == 11
    assert positions(layer) >= WANTED
    inside = [(s, t) for s in range(3) for t in range(4)]
    layer = SparseLinear(5, 6, allowed=inside, density=0.3, generator=g)
    assert layer.weight.connections == 9
    assert positions(layer) <= {(t, s) for s, t in inside}
    assert layer.weight.positions == 12


def test_no_edges_at_all() -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        from_edges([])
