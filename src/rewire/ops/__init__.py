"""The arithmetic of sparse layers: y = W x, its two gradients, and changes of memory layout.

- `spmm`, `sddmm`, `spmm_sddmm`, `feature_major` and `batch_major` are plain functions, without
  gradients. `sparse_linear` is the differentiable product made of them, `sparse_conv` the
  differentiable convolution.
- `for_products`, `in_runs` and `in_rows` change the layout of activations; gradients pass.
- `frozen_linear` and `frozen_conv` are for frozen weights, which have no slots and no gradients.
- `Pair` is a captured call of a layer: input, and gradient of the output.
- `langevin_step_`, `regrow_` and `walk_and_regrow_` are the steps of DEEP R, `add_normal_` is for
  soft-DEEP R.
- `above`, `above_drawn`, `extremes` and `weakest` choose by scores.

On the CPU native kernels compute float32 and float64 (products also `NARROW` dtypes), if the C++
library is there; everything else runs in plain PyTorch.
"""

from rewire.ops.conv import sparse_conv
from rewire.ops.frozen import FrozenLists, frozen_conv, frozen_linear
from rewire.ops.geometry import Geometry
from rewire.ops.kernels import batch_major, feature_major, sddmm, spmm, spmm_sddmm
from rewire.ops.langevin import add_normal_, langevin_step_
from rewire.ops.layout import for_products, in_rows, in_runs
from rewire.ops.linear import NARROW, sparse_linear
from rewire.ops.pairs import Capture, Pair
from rewire.ops.regrow import regrow_, walk_and_regrow_
from rewire.ops.top_scores import Draw, above, above_drawn, extremes, uniforms, weakest

__all__ = [
    "NARROW",
    "Capture",
    "Draw",
    "FrozenLists",
    "Geometry",
    "Pair",
    "above",
    "above_drawn",
    "add_normal_",
    "batch_major",
    "extremes",
    "feature_major",
    "for_products",
    "frozen_conv",
    "frozen_linear",
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
