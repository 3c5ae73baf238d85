"""Training methods, one protocol for all: `penalty`, `step`, `end_epoch`, `finalize`."""

from rewire.methods.base import Method, Pool
from rewire.methods.deep_r import DeepR
from rewire.methods.differentiable import Differentiable
from rewire.methods.halo import Halo
from rewire.methods.registry import MethodInfo, Parameter, available, create, info, register
from rewire.methods.rewirer import Rewirer
from rewire.methods.set import SET
from rewire.methods.static import Static

__all__ = [
    "SET",
    "DeepR",
    "Differentiable",
    "Halo",
    "Method",
    "MethodInfo",
    "Parameter",
    "Pool",
    "Rewirer",
    "Static",
    "available",
    "create",
    "info",
    "register",
]
