"""Models in files of other programs, for exchange or for use without training.

`rewire.formats` has the table of formats; `rewire.load` reads some of them back.
"""

from rewire.export.csource.write import CExport, CWeight, c
from rewire.export.lists.arrays import to_scipy
from rewire.export.nir_graph import nir_graph, save_nir
from rewire.export.onnx_graph import OPSET, OnnxExport, OnnxWeight, save_onnx
from rewire.export.program import save_program
from rewire.export.read import read
from rewire.export.save import save
from rewire.export.states import DENSE_LIMIT
from rewire.export.ternary import PackedWeight, PackResult, load_ternary, pack_ternary, save_ternary

__all__ = [
    "DENSE_LIMIT",
    "OPSET",
    "CExport",
    "CWeight",
    "OnnxExport",
    "OnnxWeight",
    "PackResult",
    "PackedWeight",
    "c",
    "load_ternary",
    "nir_graph",
    "pack_ternary",
    "read",
    "save",
    "save_nir",
    "save_onnx",
    "save_program",
    "save_ternary",
    "to_scipy",
]
