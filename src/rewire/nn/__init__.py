"""Sparse weights, the layers made of them, and conversion of models."""

from rewire.nn.absent import Absent
from rewire.nn.activation import SReLU
from rewire.nn.ages import Moments
from rewire.nn.attention import SparseMultiheadAttention
from rewire.nn.candidates import Candidates
from rewire.nn.conv import SparseConv1d, SparseConv2d, SparseConv3d
from rewire.nn.convert import densify, param_groups, sparse_weights, sparsify
from rewire.nn.cost import Cost, LayerCost, cost
from rewire.nn.cut import to_sparse
from rewire.nn.events import Event, Follower
from rewire.nn.followers import OptimizerFollower, follow_optimizer, register_initial_state
from rewire.nn.linear import SparseLinear
from rewire.nn.recurrent import SparseGRU, SparseLSTM, SparseRNN
from rewire.nn.summary import Summary, WeightSummary, summary
from rewire.nn.weight import SparseWeight

__all__ = [
    "Absent",
    "Candidates",
    "Cost",
    "Event",
    "Follower",
    "LayerCost",
    "Moments",
    "OptimizerFollower",
    "SReLU",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparseRNN",
    "SparseWeight",
    "Summary",
    "WeightSummary",
    "cost",
    "densify",
    "follow_optimizer",
    "param_groups",
    "register_initial_state",
    "sparse_weights",
    "sparsify",
    "summary",
    "to_sparse",
]
