"""Models in files that are not for further training: C source, programs of torch.export, packed
ternary weights.
"""

from rewire.export.csource.write import CExport, CWeight, c
from rewire.export.program import save_program
from rewire.export.ternary import PackedWeight, PackResult, load_ternary, pack_ternary, save_ternary

__all__ = [
    "CExport",
    "CWeight",
    "PackResult",
    "PackedWeight",
    "c",
    "load_ternary",
    "pack_ternary",
    "save_program",
    "save_ternary",
]
