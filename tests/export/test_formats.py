"""Every format of the table: what is written is read back, here and by the programs it is for."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import safetensors.torch
import torch
from scipy import sparse
from torch import nn

import rewire
from interpreter import run_python
from mixed import Mixed, mixed, same
from rewire.export import states
from rewire.formats import FORMATS, format_of
from rewire.nn import SparseLinear, SparseWeight

LISTS = {"sparse": "m.safetensors", "csr": "m.npz", "coo": "m.npz", "scipy": "folder"}
EDGES = {"parquet": "m.parquet", "csv": "m.csv"}


@pytest.mark.parametrize("name", LISTS)
def test_a_network_comes_back(name: str, tmp_path: Path) -> None:
    model = mixed()
    path = tmp_path / LISTS[name]
    size = rewire.export.save(model, path, name)
    files = [path] if path.is_file() else list(path.iterdir())
    assert size == sum(file.stat().st_size for file in files)
    same(rewire.export.read(path), model)


@pytest.mark.parametrize("name", EDGES)
def test_connections_come_back(name: str, tmp_path: Path) -> None:
    model = mixed()
    path = tmp_path / EDGES[name]
    assert rewire.export.save(model, path) == path.stat().st_size
    again = rewire.load(Mixed(), path, strict=False)
    expected = dict(rewire.sparse_weights(model))
    for weight_name, weight in rewire.sparse_weights(again):
        for found, wanted in zip(weight.coo(), expected[weight_name].coo(), strict=True):
            assert torch.equal(found, wanted), weight_name


def test_float64_and_bfloat16_are_exact(tmp_path: Path) -> None:
    for kind, name in ((torch.float64, "parquet"), (torch.float64, "csr"), (torch.bfloat16, "csr")):
        weight = SparseWeight((5, 6), 12, dtype=kind)
        weight.values.data.normal_()
        model = nn.Sequential(SparseLinear.from_weight(weight))
        path = tmp_path / f"m.{'npz' if name == 'csr' else name}"
        rewire.export.save(model, path, name)
        found = rewire.export.read(path)["0.weight.values"]
        assert torch.equal(found.double(), weight.coo()[2].double())


def test_scipy_has_the_same_matrices(tmp_path: Path) -> None:
    model = mixed()
    matrices = rewire.export.to_scipy(model)
    rewire.export.save(model, tmp_path / "folder", "scipy")
    for name, weight in rewire.sparse_weights(model):
        dense = weight.to_dense().detach().reshape(weight.matrix_shape).numpy()
        assert np.array_equal(matrices[name].toarray(), dense)
        loaded = sparse.load_npz(tmp_path / "folder" / f"{name}.npz")
        assert np.array_equal(loaded.toarray(), dense)
        assert loaded.has_canonical_format
    rewire.export.save(model, tmp_path / "m.npz", "csr")
    with np.load(tmp_path / "m.npz") as arrays:
        parts = tuple(arrays[f"conv.weight.{p}"] for p in ("data", "indices", "indptr"))
        built = sparse.csr_array(parts, shape=(6, 12))
        assert arrays["conv.weight.shape"].tolist() == [6, 3, 4]
        assert np.array_equal(arrays["conv.bias"], model.conv.bias.detach().numpy())
    assert np.array_equal(built.toarray(), matrices["conv.weight"].toarray())


@pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
def test_matrices_of_scipy_are_read(kind: str, tmp_path: Path) -> None:
    matrix = sparse.random_array((7, 9), density=0.3, format=kind, rng=1, dtype=np.float32)
    sparse.save_npz(tmp_path / "fc.weight.npz", matrix, compressed=True)
    state = rewire.export.read(tmp_path / "fc.weight.npz")
    weight = SparseWeight((7, 9), 1)
    weight.load_state_dict({k.removeprefix("fc.weight."): t for k, t in state.items()})
    assert np.array_equal(weight.to_dense().detach().numpy(), matrix.toarray())


def test_edges_are_what_they_say(tmp_path: Path) -> None:
    model = mixed()
    rewire.export.save(model, tmp_path / "m.csv")
    with open(tmp_path / "m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    dense = {n: w.to_dense().reshape(w.matrix_shape) for n, w in rewire.sparse_weights(model)}
    assert len(rows) == sum(w.connections for _, w in rewire.sparse_weights(model))
    for row in rows:
        there = dense[row["weight"]][int(row["target"]), int(row["source"])].item()
        assert np.float32(row["value"]) == np.float32(there)


def test_the_dense_state_is_that_of_the_twin(tmp_path: Path) -> None:
    model = mixed()
    rewire.export.save(model, tmp_path / "dense.safetensors", "state-dict")
    twin = Mixed().eval()
    twin.load_state_dict(safetensors.torch.load_file(tmp_path / "dense.safetensors"))
    x = torch.randn(2, 3, 20)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))


def test_the_graph_is_read_by_networkx(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    model = rewire.sparsify(layers, density=0.5, exclude="4")
    rewire.export.save(model, tmp_path / "g.graphml")
    graph = networkx.read_graphml(tmp_path / "g.graphml")
    assert graph.is_directed()
    assert graph.number_of_nodes() == 6 + 5 + 4 + 2
    ends = {"0.weight": "0.weight_inputs", "2.weight": "0.weight", "4.weight": "2.weight"}
    for name, before in ends.items():
        weight: Any = model.get_submodule(name[0]).weight
        dense = weight.to_dense() if isinstance(weight, SparseWeight) else weight
        for row, col in dense.nonzero().tolist():
            edge = graph.edges[f"{before}:{col}", f"{name}:{row}"]
            assert np.float32(edge["weight"]) == np.float32(dense[row, col].item())
    assert (
        graph.number_of_edges() == sum(w.connections for _, w in rewire.sparse_weights(model)) + 8
    )
    assert graph.nodes["2.weight:3"] == {"layer": "2.weight", "unit": 3}
    assert networkx.has_path(graph, next(iter(graph.edges))[0], "4.weight:0")


def test_layers_that_code_joins_have_groups_of_their_own(tmp_path: Path) -> None:
    model = mixed()
    rewire.export.save(model, tmp_path / "g.graphml")
    graph = networkx.read_graphml(tmp_path / "g.graphml")
    shapes = [w.matrix_shape for _, w in rewire.sparse_weights(model)]
    assert graph.number_of_nodes() == sum(rows + cols for rows, cols in shapes)
    assert graph.number_of_edges() == sum(w.connections for _, w in rewire.sparse_weights(model))


# --- limits and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LISTS, *EDGES, "graphml"])
def test_the_sparse_path_makes_no_dense_array(name: str, tmp_path: Path) -> None:
    """500,000 x 20,000: 40 GB as a dense array, under a limit of 3 GB of memory."""
    path = tmp_path / {**LISTS, **EDGES, "graphml": "m.graphml"}[name]
    code = f"""
import resource, torch, rewire
layer = rewire.nn.SparseLinear(20_000, 500_000, connections=1000)
model = torch.nn.Sequential(layer)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 10**9,) * 2)
rewire.export.save(model, {str(path)!r}, {name!r})
if rewire.formats.FORMATS[{name!r}].reads:
    other = torch.nn.Sequential(rewire.nn.SparseLinear(20_000, 500_000, connections=1))
    rewire.load(other, {str(path)!r}, strict=False)
    a, b = model[0].weight, other[0].weight
    assert all(torch.equal(x, y) for x, y in zip(a.coo(), b.coo()))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_large_dense_forms_are_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "DENSE_LIMIT", 359)
    path = tmp_path / "d.safetensors"
    with pytest.raises(ValueError, match=r"gru.weight_ih_l0 would have 360 bytes .* --dense"):
        rewire.export.save(mixed(), path, "state-dict")
    assert not path.exists()
    rewire.export.save(mixed(), path, "state-dict", dense=True)
    assert path.exists()


def test_formats_are_told_apart_by_ending_or_name(tmp_path: Path) -> None:
    assert format_of("a.parquet", writing=True).name == "parquet"
    assert format_of("a.npz").reads == FORMATS["csr"].reads  # its reader reads all of that ending
    assert format_of("a.PT").name == "checkpoint"
    with pytest.raises(ValueError, match=r"a.npz can be csr or coo: give one of them as format="):
        format_of("a.npz", writing=True)
    with pytest.raises(ValueError, match=r"the ending is .xyz, allowed are .safetensors"):
        format_of("a.xyz", writing=True)
    with pytest.raises(ValueError, match=r"'graphml' cannot be read, allowed are sparse, csr"):
        format_of("a", "graphml")
    with pytest.raises(ValueError, match="the format csr has no dense: it takes no settings"):
        rewire.export.save(mixed(), tmp_path / "a.npz", "csr", dense=True)
    with pytest.raises(ValueError, match="has no sparse weights"):
        rewire.export.save(nn.Linear(3, 3), tmp_path / "a.npz", "csr")


def test_what_is_missing_is_said_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in FORMATS.values():
        for package in found.packages:
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, package, None)
                patch.setattr("importlib.util.find_spec", lambda name: None)
                with pytest.raises(ImportError) as error:
                    (found.writer if found.writes else found.reader)()
            assert f"pip install 'torch-rewire[{found.extra}]'" in str(error.value)


def test_the_functions_of_the_table_are_there() -> None:
    for found in FORMATS.values():
        for get, name in ((found.writer, found.writes), (found.reader, found.reads)):
            assert not name or callable(get())


def test_the_table_loads_nothing() -> None:
    code = "import rewire.formats, sys; assert not {'torch', 'numpy', 'onnx'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
