"""What `rewire train` does between reading its options and showing the result."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rewire import budget, methods
from rewire.app import data
from rewire.app.train import loop
from rewire.app.train.config import FREE_ON_RESUME, TrainConfig, check_name, difference, make_config
from rewire.app.train.display import DownloadBar, Lines, LiveBar
from rewire.app.train.errors import TrainError
from rewire.app.train.observer import Silent
from rewire.app.train.options import parse_method_options
from rewire.app.train.run_dir import RunDir
from rewire.app.train.signals import Signals
from rewire.nn.layers.initial import INITS


def config_to_start(given: dict[str, Any], pairs: Sequence[str] | None) -> TrainConfig:
    """Check the options of a new run."""
    check_name("--data", given.get("data", "digits"), data.available())
    method = given.get("method", TrainConfig.model_fields["method"].default)
    check_name("--method", method, methods.available())
    if "distribution" in given:
        check_name("--distribution", given["distribution"], budget.DISTRIBUTIONS)
    if "init" in given:
        check_name("--init", given["init"], INITS)
    options = parse_method_options(method, pairs or [])
    return make_config(given | {"method_options": options})


def config_to_resume(
    place: RunDir, given: dict[str, Any], pairs: Sequence[str] | None
) -> TrainConfig:
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
    base = Path("runs") / f"{config.data}-{config.method}-{config.seed}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def execute(
    config: TrainConfig,
    place: RunDir,
    signals: Signals,
    *,
    resume: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Load the data and train, watched by whatever the terminal can show."""
    if not resume:
        place.check_free(overwrite=overwrite)  # before anything is downloaded
    console = Console(highlight=False, soft_wrap=True, quiet=quiet)
    with contextlib.closing(DownloadBar(console)) as download:
        folder = Path(config.data_dir) if config.data_dir is not None else None
        dataset = data.load(config.data, data_dir=folder, mirror=config.mirror, progress=download)
    signals.training = True
    with warnings.catch_warnings():
        warnings.showwarning = _in_one_line
        if quiet:
            loop.run(
                config,
                dataset,
                place,
                resume=resume,
                overwrite=overwrite,
                observer=Silent(),
                stop=signals,
            )
            return
        with contextlib.closing(
            LiveBar(console) if console.is_terminal else Lines(console)
        ) as watcher:
            loop.run(
                config,
                dataset,
                place,
                resume=resume,
                overwrite=overwrite,
                observer=watcher,
                stop=signals,
            )


def _in_one_line(message: Warning | str, *where: Any, **options: Any) -> None:
    """Show a warning as a line of its own, without where in the code it was raised."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
