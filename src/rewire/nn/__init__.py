"""Sparse weights, layers made of them, and the conversion of models."""

from rewire.nn.convert.cut import to_sparse
from rewire.nn.convert.densify import densify
from rewire.nn.convert.sparsify import sparsify
from rewire.nn.finetune.adapt import adapt
from rewire.nn.finetune.adapter import Adapter, load_adapter
from rewire.nn.frozen.freeze import freeze
from rewire.nn.frozen.weight import FrozenWeight, frozen_weights
from rewire.nn.inspect.cost import Cost, LayerCost, cost
from rewire.nn.inspect.summary import Summary, WeightSummary, summary
from rewire.nn.layers.absent import Absent
from rewire.nn.layers.attention import SparseMultiheadAttention
from rewire.nn.layers.conv import SparseConv1d, SparseConv2d, SparseConv3d
from rewire.nn.layers.linear import SparseLinear, from_edges
from rewire.nn.layers.recurrent import SparseGRU, SparseLSTM, SparseRNN
from rewire.nn.layers.srelu import SReLU
from rewire.nn.optimizers.ages import Moments
from rewire.nn.optimizers.followers import (
    OptimizerFollower,
    follow_optimizer,
    register_initial_state,
)
from rewire.nn.optimizers.groups import param_groups
from rewire.nn.weight.candidates import Candidates
from rewire.nn.weight.events import Event, Follower
from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight

__all__ = [
    "Absent",
    "Adapter",
    "Candidates",
    "Cost",
    "Event",
    "Follower",
    "FrozenWeight",
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
    "adapt",
    "cost",
    "densify",
    "follow_optimizer",
    "freeze",
    "from_edges",
    "frozen_weights",
    "load_adapter",
    "param_groups",
    "register_initial_state",
    "sparse_weights",
    "sparsify",
    "summary",
    "to_sparse",
]
