"""Models in files that are not for further training."""

from rewire.export.ternary import PackedWeight, PackResult, load_ternary, pack_ternary, save_ternary

__all__ = ["PackResult", "PackedWeight", "load_ternary", "pack_ternary", "save_ternary"]
