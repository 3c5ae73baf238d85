"""GraphML: units and connections as a graph, for Gephi, yEd, Cytoscape or networkx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from torch import nn

from rewire.export.chain import linear_weights, linked
from rewire.export.lists.entries import Entries, array_of, entries_of, state_of
from rewire.storage import files

__all__ = ["write"]

_HEAD = """<?xml version="1.0" encoding="utf-8"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns">
  <key id="layer" for="node" attr.name="layer" attr.type="string"/>
  <key id="unit" for="node" attr.name="unit" attr.type="int"/>
  <key id="weight" for="edge" attr.name="weight" attr.type="double"/>
  <graph id="network" edgedefault="directed">
"""
_TAIL = "  </graph>\n</graphml>\n"


def write(model: nn.Module, path: Path) -> int:
    """Write a directed graph: a node for each unit, an edge for each connection with its value;
    returns the bytes.

    Every weight of a layer leads from a group of units to another. In a `torch.nn.Sequential` of
    linear layers the outputs of one layer are the inputs of the next; elsewhere each weight has two
    groups of its own, because how layers are joined is then in the code of ``forward``. Dense
    linear layers of such a chain are drawn with the connections that are not 0. Units of a
    convolution are its output channels and the positions of its kernel.

    The file is written in pieces; about 80 bytes a connection.
    """
    files.write_pieces(path, (text.encode() for text in _pieces(model)))
    return path.stat().st_size


def _pieces(model: nn.Module) -> Iterator[str]:
    found = entries_of(state_of(model))
    for name, weight in linear_weights(model):
        rows, cols = weight.nonzero(as_tuple=True)
        found[name] = Entries(tuple(weight.shape), rows, cols, weight[rows, cols])
    before = linked(model)
    yield _HEAD
    inputs: dict[str, str] = {}
    for name, entries in found.items():
        outputs, features = entries.matrix_shape
        feeder = found.get(before.get(name, ""))
        if feeder is not None and feeder.matrix_shape[0] == features:
            inputs[name] = before[name]
        else:
            inputs[name] = f"{name} inputs"
            yield from _nodes(inputs[name], features)
        yield from _nodes(name, outputs)
    for name, entries in found.items():
        source, target = _id(inputs[name]), _id(name)
        lists = zip(
            entries.rows.tolist(),
            entries.cols.tolist(),
            array_of(entries.values).astype(str),
            strict=True,
        )
        for row, col, value in lists:
            yield (
                f'    <edge source="{source}:{col}" target="{target}:{row}">'
                f'<data key="weight">{value}</data></edge>\n'
            )
    yield _TAIL


def _nodes(group: str, count: int) -> Iterator[str]:
    layer = escape(group)
    for unit in range(count):
        yield (
            f'    <node id="{_id(group)}:{unit}"><data key="layer">{layer}</data>'
            f'<data key="unit">{unit}</data></node>\n'
        )


def _id(group: str) -> str:
    """A group in the id of a node, which has no spaces."""
    return escape(group.replace(" ", "_"), {'"': "&quot;"})
