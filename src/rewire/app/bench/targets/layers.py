"""P1 to P4: a linear layer against dense ones, other sparse ones, and itself on one thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rewire.app.bench import curves
from rewire.app.bench.contenders import Layer, Linear, has_sparseprop, make
from rewire.app.bench.curves import Setting
from rewire.app.bench.verdict import Figure, Measured, at_least, info, missing
from rewire.app.errors import NotAvailable

__all__ = ["against_dense", "against_sparse", "breaks_even", "second_thread"]


#: P1: least speed-up over nn.Linear by (size, density): feature-major, ordinary contiguous.
P1: Mapping[tuple[int, float], tuple[float, float]] = {
    (1024, 0.10): (8, 7),
    (1024, 0.05): (15, 12),
    (1024, 0.01): (30, 20),
    (4096, 0.10): (8, 7),
    (4096, 0.05): (15, 12),
    (4096, 0.01): (60, 45),
}
#: P2: least speed-up over each other sparse way, by density; the rest: never slower.
P2: Mapping[float, float] = {0.01: 3.0, 0.05: 1.0, 0.10: 2.5, 0.20: 1.0, 0.50: 1.0}


def against_dense(
    setting: Setting,
    targets: Mapping[tuple[int, float], tuple[float, float]] = P1,
    batch: int = 128,
) -> Measured:
    """P1: forward + backward against `nn.Linear`, for both layouts of x and gradient."""
    figures: list[Figure] = []
    data = []
    for size in dict.fromkeys(size for size, _ in targets):
        densities = [d for s, d in targets if s == size]
        kinds = ("dense", "rewire", "rewire feature-major")
        curve = curves.measure(size, size, batch, densities, setting, kinds)
        data.append(curve.to_json())
        for density in densities:
            for kind, target in zip(
                ("rewire feature-major", "rewire"), targets[size, density], strict=True
            ):
                layout = "contiguous" if kind == "rewire" else "feature-major"
                note = (
                    f"{_ms(curve.seconds('dense', density))} / {_ms(curve.seconds(kind, density))}"
                )
                ratio = curve.ratio("dense", kind, density)
                figures.append(
                    at_least(f"{size} x {size}, {density:.0%}, {layout}", ratio, target, note=note)
                )
    return figures, {"curves": data}


def against_sparse(
    setting: Setting,
    sizes: Sequence[int] = (1024, 4096),
    targets: Mapping[float, float] = P2,
    batch: int = 128,
) -> Measured:
    """P2: against SparseProp and `torch.sparse.mm` on CSR, ordinary contiguous x and gradient."""
    figures: list[Figure] = []
    data = []
    for size in sizes:
        densities = [d for d in targets if d < 0.5 or not setting.quick or size <= 1024]
        curve = curves.measure(
            size, size, batch, densities, setting, ("csr", "sparseprop", "rewire")
        )
        data.append(curve.to_json())
        for other in [kind for kind in curve.kinds if kind != "rewire"]:
            shown = "torch.sparse.mm" if other == "csr" else "SparseProp"
            for density in densities:
                note = (
                    f"{_ms(curve.seconds(other, density))} / "
                    f"{_ms(curve.seconds('rewire', density))}"
                )
                ratio = curve.ratio(other, "rewire", density)
                name = f"{size} x {size}, {density:.0%}, over {shown}"
                figures.append(at_least(name, ratio, targets[density], note=note))
    if not has_sparseprop():
        figures.append(missing("over SparseProp", "SparseProp is not installed"))
    return figures, {"curves": data}


def breaks_even(
    setting: Setting,
    size: int = 1024,
    batch: int = 128,
    densities: Sequence[float] = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0),
) -> Measured:
    """P3: the density where the layer takes as long as `nn.Linear` (MKL) and as oneDNN."""
    kinds = ("dense", "onednn", "rewire", "rewire feature-major")
    curve = curves.measure(size, size, batch, densities, setting, kinds)
    figures = []
    for dense, shown, target in (("dense", "nn.Linear", 60.0), ("onednn", "oneDNN", 25.0)):
        if dense not in curve.kinds:
            continue
        for kind, layout in (("rewire", "contiguous"), ("rewire feature-major", "feature-major")):
            found = curve.break_even(dense, kind)
            value = 100 * (max(densities) if found is None else found)
            note = "still faster at the highest density tried" if found is None else ""
            name = f"break-even with {shown}, {layout}"
            figures.append(
                at_least(name, value, target, "%", note)
                if kind == "rewire"
                else info(name, value, "%", note)
            )
    return figures, {"curves": [curve.to_json()]}


def second_thread(
    setting: Setting,
    size: int = 4096,
    batch: int = 128,
    densities: Sequence[float] = (0.01, 0.05, 0.10, 0.50),
    target: float = 1.7,
) -> Measured:
    """P4: forward + backward on one thread over the same on two, for both layouts."""
    if setting.cpu_time:
        raise NotAvailable("CPU seconds of two threads do not get fewer")
    kinds = {"rewire feature-major": "feature-major", "rewire": "contiguous"}
    contenders = []
    for density in densities:
        problem = Linear(Layer.of(size, size, density, batch))
        contenders += [
            make(kind, problem, label=f"{kind} @ {density:g}, {threads}", threads=threads)
            for kind in kinds
            for threads in (1, 2)
        ]
    timings = setting.contest(contenders)
    figures = []
    for density in densities:
        for kind, layout in kinds.items():
            one, two = (f"{kind} @ {density:g}, {threads}" for threads in (1, 2))
            note = f"{_ms(timings.median(one))} / {_ms(timings.median(two))}"
            name = f"{size} x {size}, {density:.0%}, {layout}"
            figures.append(at_least(name, timings.ratio(one, two), target, note=note))
    return figures, {}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
