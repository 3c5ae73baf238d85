"""What `rewire bench` does between reading its options and the last line it prints."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rewire.app.bench import ceilings, compare, machine, sections, tables, targets
from rewire.app.bench import results_page as page
from rewire.app.bench.curves import Setting
from rewire.app.errors import BenchError, NotAvailable
from rewire.storage.files import write_atomic

__all__ = ["EXTRA", "FORMAT", "Run"]

#: Version of the results file.
FORMAT = 3
#: Sections that --targets takes besides the performance targets.
EXTRA = ("grid", "wide")


class Run:
    """One run of the command: measures, prints as it goes, and saves after every part, so that
    nothing is lost.

    Args:
        quick: fewer rounds and smaller problems. threads: None for as many as torch takes.
        cpu_time: one thread and its CPU seconds, for a busy machine.
        out: folder for bench.json and bench.html.
        names: targets and `EXTRA` sections to run; None for all. Raises `BenchError` for an unknown
            one.
        earlier: bench.json of a run to compare with. Raises `BenchError` if it is not one.
    """

    def __init__(
        self,
        *,
        quick: bool = False,
        threads: int | None = None,
        cpu_time: bool = False,
        out: Path,
        names: Sequence[str] | None = None,
        earlier: Path | None = None,
        setting: Setting | None = None,
        console: Console | None = None,
    ) -> None:
        wanted = None if names is None else [name.strip().lower() for name in names]
        self.extra = [name for name in EXTRA if wanted is None or name in wanted]
        try:
            self.targets = targets.choose(
                targets.TARGETS
                if wanted is None
                else [name for name in wanted if name not in EXTRA]
            )
        except BenchError as error:
            raise BenchError(f"{error}, {', '.join(EXTRA)}") from None
        self.earlier = None if earlier is None else compare.read(earlier, FORMAT)
        out.mkdir(parents=True, exist_ok=True)
        number = 1 if cpu_time else threads or torch.get_num_threads()
        self.out = out
        self.console = console or Console(highlight=False)
        usual = (
            Setting(number, 1.0, 5, True, cpu_time) if quick else Setting(number, cpu_time=cpu_time)
        )
        self.setting = setting or usual
        cores = machine.pin(self.setting.threads)
        top = ceilings.of(self.setting)
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "machine": machine.describe(cores),
            "ceilings": None if top is None else top.to_json(),
            "setting": {
                "quick": self.setting.quick,
                "seconds": self.setting.seconds,
                "rounds": self.setting.rounds,
                "cpu_time": self.setting.cpu_time,
            },
            "targets": [],
            "grid": [],
            "layer": None,
            "model": None,
            "wide": None,
            "earlier": None,
            "others": None,
            "seconds": 0.0,
        }
        self._start, self._load = time.perf_counter(), machine.Load()
        self._say(tables.machine(self.results["machine"]))
        self._say(tables.ceilings(self.results["ceilings"]))
        if self.setting.cpu_time:
            self._say(tables.CPU_TIME)

    def everything(self) -> None:
        """The grid, the targets and the wide network, as far as they were asked for."""
        if "grid" in self.extra:
            for curve in sections.grid(self.setting, self._progress):
                self.results["grid"].append(curve.to_json())
                self._show(tables.curve(self.results["grid"][-1]))
                self._save()
        self._run(self.targets)
        if "wide" in self.extra:
            self.results["wide"] = sections.wide(self.setting, self._progress)
            self._say(tables.wide(self.results["wide"]))
        self._finish()

    def layer(self, size: tuple[int, int], density: float, batch: int, memory: bool) -> None:
        """One linear layer, (outputs, inputs)."""
        try:
            self.results["layer"] = sections.layer(
                self.setting, *size, density, batch, memory=memory, progress=self._progress
            )
        except NotAvailable as error:
            raise BenchError(f"--memory: {error}") from None
        except (RuntimeError, MemoryError) as error:
            # Torch says so with a RuntimeError; a dense twin of a wide layer is easily too large.
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
            raise BenchError(
                f"--layer: {size[0]} x {size[1]} cannot be measured beside dense ones: {reason}"
            ) from None
        self._show(tables.layer(self.results["layer"]))
        self._finish()

    def model(
        self, source: str, shape: Sequence[int] | None, density: float, batch: int | None
    ) -> None:
        """Every layer of a model; of the mini-GPT also a whole training step."""
        self.results["model"] = sections.model(
            self.setting, source, shape, density, batch, self._progress
        )
        self._show(tables.model(self.results["model"]))
        if source == "gpt-40m":
            self._run(targets.choose(["p15"]))
        self._finish()

    def _run(self, chosen: Sequence[targets.Target]) -> None:
        for target in chosen:
            self._progress(f"{target.name}: {target.title}")
            result = targets.run(target, self.setting).to_json()
            self.results["targets"].append(result)
            self._show(tables.target(result))
            self._save()

    def _show(self, sheet: tables.Sheet) -> None:
        self.console.print(sheet.printed())

    def _say(self, text: str, style: str | None = None) -> None:
        # a terminal wraps better than a log with hard breaks
        self.console.print(text, soft_wrap=True, markup=False, style=style)

    def _progress(self, text: str) -> None:
        self._say(f"{time.perf_counter() - self._start:6.0f} s  {text}", "dim")

    def _save(self) -> None:
        self.results["seconds"] = time.perf_counter() - self._start
        self.results["others"] = self._load.others()
        text = json.dumps(self.results, indent=1, allow_nan=False)
        write_atomic(self.out / "bench.json", (text + "\n").encode())

    def _finish(self) -> None:
        self._save()
        if self.earlier is not None:
            sheet = compare.sheet(self.earlier, self.results)
            self.results["earlier"] = vars(sheet)
            self._show(sheet)
            self._save()
        write_atomic(self.out / "bench.html", page.render(self.results).encode())
        if self.results["targets"]:
            self._show(tables.verdicts(self.results["targets"]))
        self._say(tables.disturbance(self.results["others"]))
        self._say(
            f"{self.results['seconds']:.0f} seconds; {self.out / 'bench.json'}, "
            f"{self.out / 'bench.html'}"
        )
