"""The ways to compute one linear layer, forward and backward, that are timed against each other.

All of them get the same weights, the same x (batch, in) and gradient g (batch, out), and give the
output and the gradients of x, weight and bias by one call of `torch.autograd.grad`. Ordinary
contiguous x and g, unless said.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire.app.bench.timing import Contender
from rewire.app.errors import NotAvailable
from rewire.nn import SparseLinear, SparseWeight

__all__ = ["DENSE", "LAYERS", "OTHERS", "Layer", "Linear", "can_make", "make", "sparselab_layer"]

Result = tuple[Tensor, ...]
#: Those whose time does not depend on the density.
DENSE = ("dense", "onednn", "masked")
#: Other sparse ways, and how they are printed.
OTHERS = {"csr": "torch.sparse.mm", "sparseprop": "SparseProp", "sparselab": "SparseLab"}
LAYERS = (*DENSE, *OTHERS, "rewire", "rewire feature-major")


def can_make(kind: str) -> bool:
    """Whether the contender ``kind`` can be measured here."""
    if kind == "onednn":
        product = hasattr(torch.ops.mkldnn, "_linear_pointwise")
        return torch.backends.mkldnn.is_available() and product
    return kind not in ("sparseprop", "sparselab") or importlib.util.find_spec(kind) is not None


@dataclass(frozen=True)
class Layer:
    """A layer to time: sizes, connections, batch."""

    inputs: int
    outputs: int
    connections: int
    batch: int

    @classmethod
    def of(cls, inputs: int, outputs: int, density: float, batch: int) -> Layer:
        """With ``density`` of the potential connections, at least one."""
        return cls(inputs, outputs, max(1, round(density * inputs * outputs)), batch)

    @property
    def density(self) -> float:
        """Connections over potential connections."""
        return self.connections / (self.inputs * self.outputs)


@dataclass
class Linear:
    """The tensors that all contenders for a layer share; dense ones are made on demand."""

    layer: Layer
    seed: int = 0
    sparse: SparseLinear = field(init=False)
    x: Tensor = field(init=False)
    g: Tensor = field(init=False)

    def __post_init__(self) -> None:
        layer, generator = self.layer, torch.Generator().manual_seed(self.seed)
        self.sparse = SparseLinear(
            layer.inputs, layer.outputs, connections=layer.connections, generator=generator
        )
        self.x = torch.randn(layer.batch, layer.inputs, generator=generator)
        self.g = torch.randn(layer.batch, layer.outputs, generator=generator)

    @cached_property
    def dense(self) -> Tensor:
        """The weight as a dense matrix."""
        with torch.no_grad():
            return self.sparse.weight.to_dense()

    @property
    def weight(self) -> SparseWeight:
        """The weight as a pool."""
        return self.sparse.weight


def _gradients(
    forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], g: Tensor
) -> Any:
    leaf = x.detach().requires_grad_()  # keeps the strides
    inputs = [leaf, *parameters]

    def run() -> Result:
        y = forward(leaf)
        return (y, *torch.autograd.grad(y, inputs, g))

    return run


def _dense(p: Linear) -> Callable[[], Result]:
    twin = nn.Linear(p.layer.inputs, p.layer.outputs)
    with torch.no_grad():
        twin.weight.copy_(p.dense)
        twin.bias.copy_(p.sparse.bias)
    return _gradients(twin, p.x, list(twin.parameters()), p.g)  # type: ignore[no-any-return]


def _masked(p: Linear) -> Callable[[], Result]:
    weight = p.dense.clone().requires_grad_()
    bias = p.sparse.bias.detach().clone().requires_grad_()
    mask = (p.dense != 0).to(weight.dtype)
    return _gradients(lambda x: F.linear(x, weight * mask, bias), p.x, [weight, bias], p.g)  # type: ignore[no-any-return]


def _onednn(p: Linear) -> Callable[[], Result]:
    """oneDNN's inner product three times, without autograd and therefore without its overhead.

    `F.linear` of float32 goes to MKL here; ONEDNN_VERBOSE=1 shows brg_matmul for this operator and
    nothing for that one. The transposed operands are handed over as they are: oneDNN reads them in
    place.
    """
    product = torch.ops.mkldnn._linear_pointwise
    weight, bias, x, g = p.dense, p.sparse.bias.detach(), p.x, p.g

    def run() -> Result:
        y = product(x, weight, bias, "none", [], "")
        grad_x = product(g, weight.t(), None, "none", [], "")
        grad_weight = product(g.t(), x.t(), None, "none", [], "")
        return y, grad_x, grad_weight, g.sum(0)

    return run


def _csr(p: Linear) -> Callable[[], Result]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that CSR is in beta
        weight = p.dense.to_sparse_csr().requires_grad_()
    bias = p.sparse.bias.detach().clone().requires_grad_()
    return _gradients(lambda x: torch.sparse.mm(weight, x.t()).t() + bias, p.x, [weight, bias], p.g)  # type: ignore[no-any-return]


def _sparseprop(p: Linear) -> Callable[[], Result]:
    from sparseprop.modules import SparseLinear as Theirs

    theirs: Any = Theirs(p.dense, nn.Parameter(p.sparse.bias.detach().clone()))
    return _gradients(theirs, p.x, [theirs.W_val, theirs.bias], p.g)  # type: ignore[no-any-return]


def sparselab_layer(weight: Tensor, bias: Tensor | None) -> Any:
    """SparseLab's layer with the connections and values of a dense (outputs, inputs) weight."""
    import numpy
    from sparselab import PaddedCSR, SparseLinear

    layer: Any = SparseLinear(weight.shape[1], weight.shape[0], bias is not None)
    layer._csr = PaddedCSR.from_dense(weight)
    layer._values = nn.Parameter(torch.from_numpy(numpy.asarray(layer._csr.values)))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _sparselab(p: Linear) -> Callable[[], Result]:
    theirs = sparselab_layer(p.dense, p.sparse.bias)
    return _gradients(theirs, p.x, [theirs._values, theirs.bias], p.g)  # type: ignore[no-any-return]


def _rewire(p: Linear) -> Callable[[], Result]:
    return _gradients(p.sparse, p.x, [p.weight.values, p.sparse.bias], p.g)  # type: ignore[no-any-return]


def _feature_major(p: Linear) -> Callable[[], Result]:
    x, g = (t.t().contiguous().t() for t in (p.x, p.g))
    return _gradients(p.sparse, x, [p.weight.values, p.sparse.bias], g)  # type: ignore[no-any-return]


_MAKE: dict[str, Callable[[Linear], Callable[[], Result]]] = dict(
    zip(
        LAYERS,
        (_dense, _onednn, _masked, _csr, _sparseprop, _sparselab, _rewire, _feature_major),
        strict=True,
    )
)


def make(
    kind: str, problem: Linear, *, label: str | None = None, threads: int | None = None
) -> Contender:
    """The contender ``kind`` (of `LAYERS`). Raises `NotAvailable` if it cannot be measured here."""
    if not can_make(kind):
        raise NotAvailable(f"{OTHERS.get(kind, kind)} is not installed")
    return Contender(label or kind, _MAKE[kind](problem), threads)
