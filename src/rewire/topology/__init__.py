"""Which connections exist: positions and their index, sampling, and topologies within limits.

Nothing here depends on weights or autograd.
"""

from rewire.topology.index import (
    Index,
    Lists,
    TopologyError,
    build_index,
    check_integers,
    check_slots,
    empty_index,
    fingerprint,
    index_dtype,
    matrix_size,
    position_signs,
    raise_problem,
    replace_,
)
from rewire.topology.prior import Positions, Prior, active_keys, contains, dormant_keys
from rewire.topology.sampling import (
    candidates,
    sample,
    sample_dormant,
    sample_dormant_in_rows,
    sample_in_rows,
)

__all__ = [
    "Index",
    "Lists",
    "Positions",
    "Prior",
    "TopologyError",
    "active_keys",
    "build_index",
    "candidates",
    "check_integers",
    "check_slots",
    "contains",
    "dormant_keys",
    "empty_index",
    "fingerprint",
    "index_dtype",
    "matrix_size",
    "position_signs",
    "raise_problem",
    "replace_",
    "sample",
    "sample_dormant",
    "sample_dormant_in_rows",
    "sample_in_rows",
]
