"""P14: a frozen layer without gradients, at the batch sizes of a deployed model."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewire.app.bench.contenders import Layer, Linear
from rewire.app.bench.curves import Setting
from rewire.app.bench.timing import Contender, Ratio
from rewire.app.bench.verdict import Figure, Measured, at_least, info, missing
from rewire.nn import freeze

__all__ = ["OTHERS", "P14", "forward"]

Call = Callable[[], object]

#: P14: least speed-up over the best of the others by (outputs, inputs), density.
P14: Mapping[tuple[int, int], Mapping[float, float]] = {
    (300, 784): {0.10: 1.0, 0.05: 1.0, 0.01: 1.0},
    (1024, 1024): {0.10: 1.3, 0.05: 2.0, 0.01: 2.0},
    (4096, 4096): {0.10: 1.3, 0.05: 2.0, 0.01: 2.0},
}
BATCHES = (1, 8, 64)


class _Csr(nn.Module):
    """A layer as one would write it with torch's own sparse matrices."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # says that CSR is in beta
            self.weight, self.bias = weight.to_sparse_csr(), bias

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:  # faster than the product with a matrix of one column
            return torch.addmv(self.bias, self.weight, x[0]).unsqueeze(0)
        y: Tensor = torch.sparse.mm(self.weight, x.t()).t() + self.bias
        return y


def _called(layer: nn.Module, p: Linear) -> Call:
    """All but onnxruntime are modules, so that the call of a module is part of all times."""
    layer.eval().requires_grad_(False)
    return lambda: layer(p.x)


def _dense(p: Linear, threads: int) -> Call:
    layer = nn.Linear(p.layer.inputs, p.layer.outputs)
    with torch.no_grad():
        layer.weight.copy_(p.dense)
        layer.bias.copy_(p.sparse.bias)
    return _called(layer, p)


def _csr(p: Linear, threads: int) -> Call:
    return _called(_Csr(p.dense, p.sparse.bias.detach()), p)


def _sparselab(p: Linear, threads: int) -> Call:
    """SparseLab's layer of this size and density, with connections of its own."""
    from sparselab import SparseLinear

    layer = SparseLinear(p.layer.inputs, p.layer.outputs, sparsity=1 - p.layer.density)
    return _called(layer, p)


def _onnxruntime(p: Linear, threads: int) -> Call:
    """The dense layer, as a graph of one node."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kept = {"weight": p.dense.numpy(), "bias": p.sparse.bias.detach().numpy()}
    sizes = {"x": [p.layer.batch, p.layer.inputs], "y": [p.layer.batch, p.layer.outputs]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in sizes.items())
    node = helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)
    numbers = [numpy_helper.from_array(array, name) for name, array in kept.items()]
    graph = helper.make_graph([node], "layer", [x], [y], numbers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {"x": p.x.numpy()}
    return lambda: session.run(None, given)


def _frozen(values: Any) -> Callable[[Linear, int], Call]:
    def make(p: Linear, threads: int) -> Call:
        return _called(freeze(p.sparse, values), p)

    return make


#: The others, and what each of them needs.
OTHERS: dict[str, tuple[Callable[[Linear, int], Call], tuple[str, ...]]] = {
    "dense": (_dense, ()),
    "csr": (_csr, ()),
    "sparselab": (_sparselab, ("sparselab",)),
    "onnxruntime": (_onnxruntime, ("onnx", "onnxruntime")),
}
#: Those whose time does not depend on the density.
_DENSE = ("dense", "onnxruntime")
_SHOWN = {"csr": "torch's CSR", "sparselab": "SparseLab", "dense": "nn.Linear"}
_FORMS = {"frozen": "float", "int8": "int8", "ternary": "ternary"}


def forward(
    setting: Setting,
    targets: Mapping[tuple[int, int], Mapping[float, float]] = P14,
    batches: Sequence[int] = BATCHES,
) -> Measured:
    """A frozen layer against the best of dense, CSR, SparseLab and onnxruntime, in one contest for
    each size and batch; int8 and ternary weights beside it.
    """
    lacking = {
        kind: [name for name in needs if importlib.util.find_spec(name) is None]
        for kind, (_, needs) in OTHERS.items()
    }
    kinds = [kind for kind in OTHERS if not lacking[kind]]
    figures: list[Figure] = []
    data = []
    for (outputs, inputs), densities in targets.items():
        for batch in batches:
            contest = _contest(setting, outputs, inputs, batch, list(densities), kinds)
            for density, target in densities.items():
                names = [_label(kind, density) for kind in kinds]
                best = min(names, key=contest.median)
                mine = _label("frozen", density)
                shown = best.partition(" @")[0]
                title = f"{outputs} x {inputs}, batch {batch}, {density:.0%}"
                note = (
                    f"{_us(contest.median(best))} ({_SHOWN.get(shown, shown)}) / "
                    f"{_us(contest.median(mine))}"
                )
                ratio = contest.ratio(best, mine)
                figures.append(at_least(title, ratio, target, note=note))
                for form in ("int8", "ternary"):
                    other: Ratio = contest.ratio(best, _label(form, density))
                    figures.append(info(f"{title}, {form}", other))
            medians = {name: contest.median(name) for name in contest.seconds}
            data.append({"outputs": outputs, "inputs": inputs, "batch": batch, "seconds": medians})
    for names in filter(None, lacking.values()):
        reason = f"{' and '.join(names)} not installed: pip install 'torch-rewire[bench]'"
        figures.append(missing(f"over {names[-1]}", reason))
    return figures, {"contests": data}


def _label(kind: str, density: float) -> str:
    return kind if kind in _DENSE else f"{kind} @ {density:g}"


def _contest(
    setting: Setting,
    outputs: int,
    inputs: int,
    batch: int,
    densities: Sequence[float],
    kinds: Sequence[str],
) -> Any:
    contenders = []
    for number, density in enumerate(densities):
        problem = Linear(Layer.of(inputs, outputs, density, batch))
        makers = {kind: OTHERS[kind][0] for kind in kinds if not number or kind not in _DENSE}
        makers |= {kind: _frozen(form) for kind, form in _FORMS.items()}
        for kind, make in makers.items():
            contenders.append(Contender(_label(kind, density), make(problem, setting.threads)))
    with torch.no_grad():
        return setting.contest(contenders)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us"
