"""The arithmetic of sparse layers: y = W x, its two gradients, and the layouts in between.

`spmm`, `sddmm`, `spmm_sddmm`, `feature_major` and `batch_major` are functional and know no
autograd; `sparse_linear` is the differentiable product made of them, `sparse_conv` the same for
convolutions (`rewire.ops.conv_kernels`); `in_runs` and `in_rows` are differentiable changes of
layout; `Pair` is what a captured call of a layer can compute; `langevin_step_`, `regrow_` and
`walk_and_regrow_` are what DEEP R does to a pool in a step, `add_normal_` is what soft-DEEP R
needs; `above`, `extremes` and `weakest` choose by scores. On the CPU, in float32 and float64
(`NARROW` dtypes too in the products), they run native kernels if the library is there; everywhere
else, plain PyTorch.
"""

from rewire.ops.conv import sparse_conv
from rewire.ops.geometry import Geometry
from rewire.ops.kernels import batch_major, feature_major, sddmm, spmm, spmm_sddmm
from rewire.ops.langevin import add_normal_, langevin_step_
from rewire.ops.layout import in_rows, in_runs
from rewire.ops.linear import NARROW, sparse_linear
from rewire.ops.pairs import Capture, Pair
from rewire.ops.regrow import regrow_, walk_and_regrow_
from rewire.ops.top_scores import Draw, above, above_drawn, extremes, uniforms, weakest

__all__ = [
    "NARROW",
    "Capture",
    "Draw",
    "Geometry",
    "Pair",
    "above",
    "above_drawn",
    "add_normal_",
    "batch_major",
    "extremes",
    "feature_major",
    "in_rows",
    "in_runs",
    "langevin_step_",
    "regrow_",
    "sddmm",
    "sparse_conv",
    "sparse_linear",
    "spmm",
    "spmm_sddmm",
    "uniforms",
    "walk_and_regrow_",
    "weakest",
]
