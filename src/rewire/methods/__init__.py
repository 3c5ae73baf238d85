"""Training methods, one protocol for all: `penalty`, `step`, `end_epoch`, `finalize`."""

from rewire.methods.base import Method, Pool
from rewire.methods.cosine_set import CoDACoRSET, CoDASET, CoPACoRSET, CoPASET, CoRSET
from rewire.methods.ctre import CTRE
from rewire.methods.deep_r import DeepR
from rewire.methods.differentiable import Differentiable
from rewire.methods.dsr import DSR
from rewire.methods.gmp import GMP
from rewire.methods.granet import GraNet
from rewire.methods.group import Group
from rewire.methods.halo import Halo
from rewire.methods.itop import ITOP
from rewire.methods.l1 import L1
from rewire.methods.magnitude import Magnitude
from rewire.methods.mest import MEST
from rewire.methods.noiseout import NoiseOut
from rewire.methods.one_shot import OneShot
from rewire.methods.registry import MethodInfo, Parameter, available, create, info, register
from rewire.methods.rewirer import Rewirer
from rewire.methods.rigl import RigL
from rewire.methods.set import SET
from rewire.methods.shrink import Shrinking
from rewire.methods.snfs import SNFS
from rewire.methods.snip import SNIP
from rewire.methods.soft_deep_r import SoftDeepR
from rewire.methods.srigl import SRigL
from rewire.methods.static import Static
from rewire.methods.ternary import Ternary
from rewire.methods.top_kast import TopKAST

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
    "register",
]
