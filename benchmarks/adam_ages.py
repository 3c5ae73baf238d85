"""The loss around RigL's updates, with Adam's bias correction by each connection's own age, and
without.

    python benchmarks/adam_ages.py [--out docs/results/adam_ages.json] [--picture
    docs/results/adam_ages.svg]

A Transformer of two layers (width 64, four heads) learns the characters of Python's standard
library, its weights sparse at 20 %, with AdamW; RigL replaces 30 % of the connections every 100
steps. Two runs of each seed differ in ``moments`` only: "aged" and "cleared". At the steps around
every update the loss on the same held-out text is measured; the figure shows its mean over updates
and seeds, as the difference to the loss before the update. A step that updates moves no parameter
(RigL's rule), so step 0 shows what dropping and growing alone do. A few minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewire
from rewire.methods import RigL

WIDTH, CONTEXT, BATCH, DENSITY, EVERY, RATE = 64, 64, 16, 0.2, 100, 3e-3
BEFORE, AFTER = 3, 25  # steps around an update at which the loss is measured
COLORS = {"cleared": "#c8452d", "aged": "#1f6fb2"}


def text() -> Tensor:
    """Modules of the standard library that every installation has, as character codes below 128."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "datetime", "doctest", "inspect", "pathlib", "tarfile", "typing")
    found = [p.read_bytes() for n in names if (p := folder / f"{n}.py").exists()]
    return torch.tensor([c for source in found for c in source if c < 128], dtype=torch.int64)


class Characters(nn.Module):
    """Predicts each next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 128)
        self.mask: Tensor
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embedding(x) + self.place, mask=self.mask)
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]


def pieces(codes: Tensor, starts: Tensor) -> Tensor:
    return codes[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss_on(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def run(moments: Any, seed: int, steps: int) -> dict[str, Any]:
    """Losses at steps -BEFORE .. AFTER around each update, and the last one; on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    codes = text()
    model = Characters()
    rewire.sparsify(model, density=DENSITY, only=["body.*"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    method = RigL(model, optimizer, every=EVERY, moments=moments, seed=seed)
    split = codes.numel() * 9 // 10
    train, held_out = codes[:split], codes[split:]
    judge = pieces(held_out, torch.linspace(0, held_out.numel() - CONTEXT - 2, 32).long())
    generator = torch.Generator().manual_seed(seed)
    found: list[list[float]] = []
    for step in range(1, steps + AFTER + 1):
        batch = pieces(
            train, torch.randint(train.numel() - CONTEXT - 1, (BATCH,), generator=generator)
        )
        optimizer.zero_grad()
        loss_on(model, batch).backward()
        optimizer.step()
        if step <= steps:
            method.step()
        near = (step + BEFORE) % EVERY
        if step >= EVERY - BEFORE and near <= BEFORE + AFTER:
            if not near:
                found.append([])
            with torch.no_grad():
                found[-1].append(float(loss_on(model, judge)))
    return {"moments": moments, "seed": seed, "around": found, "last": found[-1][-1]}


def mean(runs: list[dict[str, Any]], moments: str) -> list[float]:
    """By step around an update: the mean difference to the loss one step before it."""
    rows = [
        [x - around[BEFORE - 1] for x in around]
        for r in runs
        if r["moments"] == moments
        for around in r["around"]
    ]
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def picture(runs: list[dict[str, Any]]) -> str:
    """The two curves, as SVG."""
    width, height, left, top, right, bottom = 720, 380, 64, 40, 16, 48
    curves = {moments: mean(runs, moments) for moments in COLORS}
    high = max(max(curve) for curve in curves.values()) * 1.1
    low = min(min(curve) for curve in curves.values()) - 0.05 * high

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - right) * (step + BEFORE) / (BEFORE + AFTER)
        return x, top + (height - top - bottom) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">Held-out loss around an update of RigL, AdamW, '
        f"mean of {sum(len(r['around']) for r in runs) // 2} updates</text>",
    ]
    unit = 0.1 if high - low > 0.35 else 0.05 if high - low > 0.15 else 0.02
    for k in range(-20, 60):
        if low <= k * unit <= high:
            (x, y), (end, _) = at(-BEFORE, k * unit), at(AFTER, k * unit)
            parts.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            )
            parts.append(
                f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{k * unit:+.2f}</text>'
            )
    for step in (0, 5, 10, 15, 20, 25):
        x, y = at(step, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{step}</text>')
    x, y = at(0, low)
    parts.append(
        f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{y:.1f}" stroke="#999" '
        'stroke-dasharray="4 3"/>'
    )
    axis = (left + width - right) / 2
    parts.append(
        f'<text x="{axis}" y="{height - 10}" text-anchor="middle">steps after the update</text>'
    )
    names = {
        "cleared": "before: correction of the optimizer's step (moments='cleared')",
        "aged": "now: correction of each connection's own age (the default)",
    }
    for row, (moments, color) in enumerate(COLORS.items()):
        points = " ".join(
            "{:.1f},{:.1f}".format(*at(i - BEFORE, v)) for i, v in enumerate(curves[moments])
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        y = top + 16 + 18 * row
        parts.append(
            f'<line x1="{axis - 90}" y1="{y - 4}" x2="{axis - 66}" y2="{y - 4}" stroke="{color}" '
            'stroke-width="2"/>'
        )
        parts.append(f'<text x="{axis - 60}" y="{y}">{names[moments]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    tasks = [(moments, seed, options.steps) for seed in range(options.seeds) for moments in COLORS]
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(run, *zip(*tasks, strict=True)))
    for one in runs:
        shown = mean([one], one["moments"])
        after = f"after an update {shown[BEFORE]:+.3f}, one step later {shown[BEFORE + 1]:+.3f}"
        end = f"at most {max(shown[BEFORE + 1 :]):+.3f}, after {AFTER} steps {shown[-1]:+.3f}"
        print(
            f"seed {one['seed']}, {one['moments']}: {after}, {end}; last {one['last']:.3f}",
            flush=True,
        )
    if options.out:
        report = {
            "steps": options.steps,
            "every": EVERY,
            "rate": RATE,
            "density": DENSITY,
            "mean": {moments: [round(x, 5) for x in mean(runs, moments)] for moments in COLORS},
            "runs": [r | {"around": [[round(x, 5) for x in a] for a in r["around"]]} for r in runs],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps(report, separators=(",", ":")).replace('{"moments"', '\n{"moments"') + "\n"
        )
    if options.picture:
        options.picture.write_text(picture(runs))


if __name__ == "__main__":
    main()
