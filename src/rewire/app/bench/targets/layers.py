"""P1 to P4 and P13: a linear layer against the machine's ceiling, dense layers, other sparse ones,
and itself fed in another layout or on one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rewire.app.bench import ceilings, curves
from rewire.app.bench.contenders import OTHERS, Layer, Linear, can_make, make
from rewire.app.bench.curves import Curve, Setting
from rewire.app.bench.timing import Ratio
from rewire.app.bench.verdict import Figure, Measured, at_least, info, missing
from rewire.app.errors import NotAvailable

__all__ = ["against_ceiling", "against_sparse", "breaks_even", "row_major", "second_thread"]


#: P1: least speed-up over nn.Linear at batch 128 by (size, density), where the ceiling allows it.
P1: Mapping[tuple[int, float], float] = {
    (1024, 0.10): 7,
    (1024, 0.05): 12,
    (1024, 0.01): 20,
    (4096, 0.10): 7,
    (4096, 0.05): 12,
    (4096, 0.01): 45,
}
#: P1: least percent of the ceiling at batch 128.
P1_SHARE: Mapping[tuple[int, float], float] = {(1024, 0.10): 75.0, (4096, 0.10): 55.0}
#: P1: speed at the last number of rows, over that at the first.
P1_LASTING = 0.8
#: Rows for each size: a dense product of 4096 x 4096 takes seconds at more.
ROWS: Mapping[int, Sequence[int]] = {1024: (128, 1024, 8192), 4096: (128, 1024)}

#: P2: least speed-up over each other sparse way, by density; the rest: never slower.
P2: Mapping[float, float] = {0.01: 3.0, 0.05: 1.0, 0.10: 2.5, 0.20: 1.0, 0.50: 1.0}
#: Outputs, inputs, rows. At many rows only the densities with a target above 1 are measured.
P2_SHAPES = (
    (1024, 1024, 128),
    (4096, 4096, 128),
    (1024, 1024, 1024),
    (1024, 1024, 8192),
    (2560, 640, 1024),
    (640, 2560, 1024),
)

#: P13: least speed fed row-major, over that fed feature-major, by density.
P13: Mapping[float, float] = {0.10: 0.9, 0.01: 0.7}
P13_ROWS = (64, 128, 1024, 8192)


def against_ceiling(
    setting: Setting,
    targets: Mapping[tuple[int, float], float] = P1,
    rows: Mapping[int, Sequence[int]] = ROWS,
    shares: Mapping[tuple[int, float], float] = P1_SHARE,
) -> Measured:
    """P1: forward + backward, row-major, as a share of the machine's ceiling and over `nn.Linear`.

    A speed-up over dense has a target where the ceiling lets a sparse layer be so fast.
    """
    top = ceilings.of(setting)
    figures: list[Figure] = []
    data = []
    for size in dict.fromkeys(size for size, _ in targets):
        densities = [d for s, d in targets if s == size]
        found = []
        for count in rows[size][:2] if setting.quick else rows[size]:
            curve = curves.measure(size, size, count, densities, setting, ("dense", "rewire"))
            found.append(curve)
            data.append(curve.to_json())
            for density in densities:
                first = count == rows[size][0]
                goal = targets[size, density] if first else None
                figures += _beside(curve, density, top, shares.get((size, density)), goal)
        for density in densities:
            if (size, density) in shares and len(found) > 1:
                figures.append(_lasting(found[0], found[-1], density))
    if top is None:
        figures.append(missing("share of the ceiling", "the native kernels are not in use"))
    return figures, {"curves": data}


def _beside(
    curve: Curve,
    density: float,
    top: ceilings.Ceilings | None,
    least_share: float | None,
    least_speedup: float | None,
) -> list[Figure]:
    """A layer as a share of the ceiling, if that is known, and over dense."""
    name = f"{curve.outputs} x {curve.inputs}, {density:.0%}, {curve.batch} rows"
    sparse, dense = curve.seconds("rewire", density), curve.seconds("dense", density)
    ratio: Ratio = curve.ratio("dense", "rewire", density)
    note = f"{_ms(dense)} / {_ms(sparse)}"
    figures = []
    if top is not None:
        level = top.for_rows(curve.inputs, curve.batch)
        work = 6 * density * curve.inputs * curve.outputs * curve.batch
        share = 100 * work / sparse / level.flops
        shown = f"{work / sparse / 1e9:.3g} of {level.flops / 1e9:.3g} GFLOP/s (x in {level.name})"
        figures.append(
            info(f"{name}, share of the ceiling", share, "%", shown)
            if least_share is None or least_speedup is None
            else at_least(f"{name}, share of the ceiling", share, least_share, "%", shown)
        )
        most = dense * level.flops / work
        note += f"; the ceiling is {most:.3g} x"
        if least_speedup is not None and least_speedup > most:
            least_speedup = None
    name += ", over nn.Linear"
    return [
        *figures,
        info(name, ratio, note=note)
        if least_speedup is None
        else at_least(name, ratio, least_speedup, note=note),
    ]


def _lasting(few: Curve, many: Curve, density: float) -> Figure:
    """Speed a row at many rows, over that at few."""
    few_seconds, many_seconds = (c.seconds("rewire", density) / c.batch for c in (few, many))
    name = f"{few.outputs} x {few.inputs}, {density:.0%}, speed at {many.batch} rows over"
    return at_least(f"{name} {few.batch}", few_seconds / many_seconds, P1_LASTING)


def against_sparse(
    setting: Setting,
    shapes: Sequence[tuple[int, int, int]] = P2_SHAPES,
    targets: Mapping[float, float] = P2,
) -> Measured:
    """P2: against SparseProp, SparseLab and `torch.sparse.mm` on CSR, all row-major."""
    figures: list[Figure] = []
    data = []
    for outputs, inputs, rows in shapes:
        if setting.quick and rows * inputs * outputs > 1024**3:
            continue
        densities = [d for d, target in targets.items() if target > 1 or rows <= 128]
        if setting.quick and outputs > 1024:
            densities = [d for d in densities if d < 0.5]
        curve = curves.measure(inputs, outputs, rows, densities, setting, (*OTHERS, "rewire"))
        data.append(curve.to_json())
        for other in [kind for kind in curve.kinds if kind != "rewire"]:
            for density in densities:
                note = (
                    f"{_ms(curve.seconds(other, density))} / "
                    f"{_ms(curve.seconds('rewire', density))}"
                )
                ratio = curve.ratio(other, "rewire", density)
                name = f"{outputs} x {inputs}, {density:.0%}, {rows} rows, over {OTHERS[other]}"
                figures.append(at_least(name, ratio, targets[density], note=note))
    figures += [
        missing(f"over {shown}", f"{shown} is not installed")
        for kind, shown in OTHERS.items()
        if not can_make(kind)
    ]
    return figures, {"curves": data}


def row_major(
    setting: Setting,
    size: int = 1024,
    rows: Sequence[int] = P13_ROWS,
    targets: Mapping[float, float] = P13,
) -> Measured:
    """P13: the same layer fed feature-major, over row-major."""
    figures: list[Figure] = []
    data = []
    for count in rows:
        kinds = ("rewire", "rewire feature-major")
        curve = curves.measure(size, size, count, list(targets), setting, kinds)
        data.append(curve.to_json())
        for density, target in targets.items():
            ratio = curve.ratio("rewire feature-major", "rewire", density)
            figures.append(at_least(f"{size} x {size}, {density:.0%}, {count} rows", ratio, target))
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
