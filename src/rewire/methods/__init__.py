"""Training methods, one protocol for all: `penalty`, `step`, `end_epoch`, `finalize`."""

import sys

from rewire.methods.core.base import Method, Pool
from rewire.methods.core.group import Group
from rewire.methods.core.parameters import Parameter, parameter
from rewire.methods.core.registry import MethodInfo, available, create, info, load_package, register
from rewire.methods.deep_r.deep_r import DeepR
from rewire.methods.deep_r.soft_deep_r import SoftDeepR
from rewire.methods.dense_start.halo import Halo
from rewire.methods.dense_start.ternary import Ternary
from rewire.methods.differentiable.differentiable import Differentiable
from rewire.methods.dynamic.cosine_set import (
    CoDACoRSET,
    CoDASET,
    CoPACoRSET,
    CoPASET,
    CoRSET,
    CosineSET,
)
from rewire.methods.dynamic.ctre import CTRE
from rewire.methods.dynamic.dsr import DSR
from rewire.methods.dynamic.itop import ITOP
from rewire.methods.dynamic.mest import MEST
from rewire.methods.dynamic.rewirer import Rewirer, Rewiring
from rewire.methods.dynamic.rigl import RigL
from rewire.methods.dynamic.set import SET
from rewire.methods.dynamic.snfs import SNFS
from rewire.methods.dynamic.srigl import SRigL
from rewire.methods.dynamic.static import Static
from rewire.methods.dynamic.top_kast import TopKAST
from rewire.methods.noiseout.noiseout import NoiseOut
from rewire.methods.pruning.gmp import GMP
from rewire.methods.pruning.granet import GraNet
from rewire.methods.pruning.l1 import L1
from rewire.methods.pruning.magnitude import Magnitude
from rewire.methods.pruning.one_shot import OneShot
from rewire.methods.pruning.shrink import Shrinking
from rewire.methods.pruning.snip import SNIP

__all__ = [
    "CTRE",
    "DSR",
    "GMP",
    "ITOP",
    "L1",
    "MEST",
    "SET",
    "SNFS",
    "SNIP",
    "CoDACoRSET",
    "CoDASET",
    "CoPACoRSET",
    "CoPASET",
    "CoRSET",
    "CosineSET",
    "DeepR",
    "Differentiable",
    "GraNet",
    "Group",
    "Halo",
    "Magnitude",
    "Method",
    "MethodInfo",
    "NoiseOut",
    "OneShot",
    "Parameter",
    "Pool",
    "Rewirer",
    "Rewiring",
    "RigL",
    "SRigL",
    "Shrinking",
    "SoftDeepR",
    "Static",
    "Ternary",
    "TopKAST",
    "available",
    "create",
    "info",
    "parameter",
    "register",
]

load_package(sys.modules[__name__])  # a method needs no other entry than its own file
