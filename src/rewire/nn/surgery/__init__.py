"""Removes units (neurons, channels, recurrent states) from a network; optimizer state follows."""

from rewire.nn.surgery.fold import fold, takes_constants, why_no_constants
from rewire.nn.surgery.graph import Group, Site, UnitGraph, remove_units
from rewire.nn.surgery.resize import fit_shapes, load_resized

__all__ = [
    "Group",
    "Site",
    "UnitGraph",
    "fit_shapes",
    "fold",
    "load_resized",
    "remove_units",
    "takes_constants",
    "why_no_constants",
]
