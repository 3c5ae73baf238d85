"""What `rewire train` does between reading its options and showing the result."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rewire import budget
from rewire.app import data, models
from rewire.app.data import Dataset
from rewire.app.errors import TrainError
from rewire.app.train import baselines, loop
from rewire.app.train.config import (
    FREE_ON_RESUME,
    TrainConfig,
    check_name,
    difference,
    make_config,
    read_options,
)
from rewire.app.train.display import DownloadBar, Lines, LiveBar
from rewire.app.train.method_options import parse_method_options
from rewire.app.train.observer import Observer
from rewire.app.train.ranks import Ranks
from rewire.app.train.run_dir import RunDir
from rewire.app.train.signals import Signals
from rewire.app.train.tracking import Tracking


def config_to_start(given: Mapping[str, Any], pairs: Sequence[str]) -> TrainConfig:
    """Check the options of a new run: fields of the configuration and ``--set``."""
    config = read_options(given)
    data.check(config.data)
    models.parse(config.model)
    check_name("--method", config.method, baselines.available())
    if config.distribution is not None:
        check_name("--distribution", config.distribution, budget.DISTRIBUTIONS)
    return make_config({**given, "method_options": parse_method_options(config.method, pairs)})


def config_to_resume(place: RunDir, given: Mapping[str, Any], pairs: Sequence[str]) -> TrainConfig:
    """The options of the run that is there; any that is given again must be the same."""
    config = place.read_config()
    line = difference(config, given)
    if line is None and pairs:
        options = parse_method_options(config.method, pairs)
        line = difference(config, {"method_options": config.method_options | options})
    if line is not None:
        raise TrainError(
            f"--resume: {line}; leave the option out, or start another run with another --run-dir"
        )
    changed = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return make_config(config.model_dump() | changed)


def fresh_folder(config: TrainConfig) -> Path:
    """runs/digits-deep-r-0, or the first of ...-2, ...-3 that does not exist."""
    parts = [Path(config.data).stem, config.model, config.method, str(config.seed)]
    words = [re.sub(r"[^\w.-]+", "-", part) for part in parts if part != "mlp"]
    base = Path("runs") / "-".join(words)
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def load_data(config: TrainConfig, progress: data.Progress | None = None) -> Dataset:
    """The data set that the options mean; raises `DataError`."""
    return data.load(
        config.data,
        data_dir=config.data_dir,
        mirror=config.mirror,
        progress=progress,
        options=data.FileOptions.of(config),
    )


def execute(
    config: TrainConfig,
    place: RunDir,
    signals: Signals,
    *,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    log: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> None:
    """Load the data and train, watched by whatever the terminal can show and by the trackers that
    ``log`` names.
    """
    ranks = ranks or Ranks()
    if not resume and ranks.first:
        place.check_free(overwrite=overwrite)  # before anything is downloaded
    if not ranks.first:
        ranks.wait()  # for the first rank's download
    console = Console(highlight=False, soft_wrap=True, quiet=quiet)
    with contextlib.closing(DownloadBar(console)) as download:
        dataset = load_data(config, download)
    if ranks.first:
        ranks.wait()
    signals.training = True
    with warnings.catch_warnings(), contextlib.ExitStack() as until:
        warnings.showwarning = _in_one_line
        watcher = Observer()
        if not quiet:
            watcher = LiveBar(console) if console.is_terminal else Lines(console)
            until.callback(watcher.close)
        if log:
            watcher = tracking = Tracking(watcher, log, place.path, config.model_dump(mode="json"))
            until.callback(tracking.close)
        loop.run(
            config,
            dataset,
            place,
            resume=resume,
            overwrite=overwrite,
            observer=watcher,
            stop=signals,
            ranks=ranks,
        )


def _in_one_line(message: Warning | str, *where: Any, **options: Any) -> None:
    """Show a warning as a line of its own, without where in the code it was raised."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
