"""The command `rewire train`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewire.app.cli.failures import CommandError, resumable
from rewire.app.cli.options import given_of, option, train_options, with_options
from rewire.app.train.option import RUN
from rewire.app.train.signals import Signals

if TYPE_CHECKING:  # torch is loaded when a run begins, so that --help is quick
    from rewire.app.train.run_dir import RunDir


_OF_RUNS = train_options()
#: Where a run is, and what becomes of one that is there already.
_PLACE = {
    "run_dir": option(
        Path, RUN, "FOLDER", r"Where the results go. \[default: runs/DATA-METHOD-SEED, a new one]"
    ),
    "resume": option(
        bool,
        RUN,
        "",
        "Continue the run in --run-dir with its options, to the same bits.",
        "--resume",
    ),
    "overwrite": option(bool, RUN, "", "Replace the run in --run-dir.", "--overwrite"),
    "log": option(
        str,
        RUN,
        "NAMES",
        "Also log to tensorboard, mlflow or wandb; several with commas. Give it again with "
        "--resume.",
    ),
    "quiet": option(bool, RUN, "", "Print errors only.", "--quiet", "-q"),
}


@with_options(_OF_RUNS | _PLACE)
def train(**given: Any) -> None:
    """Train a sparse network; leaves checkpoint, metrics, result and report in a run directory."""
    options, place_of = given_of(given, _OF_RUNS), given_of(given, _PLACE)
    pairs = options.pop("method_options", [])
    folder: Path | None = place_of.get("run_dir")
    resume, overwrite, quiet = (name in place_of for name in ("resume", "overwrite", "quiet"))
    if resume and overwrite:
        raise CommandError("--resume goes on with a run, --overwrite replaces it: give one of them")
    if resume and folder is None:
        raise CommandError("--resume: give the run with --run-dir FOLDER")
    with Signals() as signals, resumable(lambda: folder, signals):
        from rewire.app.train import command, tracking
        from rewire.app.train.ranks import connect
        from rewire.app.train.run_dir import RunDir

        trackers = tracking.parse(place_of.get("log"))
        ranks = connect()
        quiet = quiet or not ranks.first
        if (ranks.several or ranks.restarts) and folder is None:
            raise CommandError(
                "--run-dir: torchrun starts several processes, and starts them again, so all of "
                "them must be told where the run is: give --run-dir FOLDER"
            )
        if ranks.restarts and folder is not None:  # the run that a process was lost from goes on
            resume = ranks.of_first(resume or RunDir(folder).has_run())
        if resume:
            assert folder is not None  # refused above
            place = RunDir(folder)
            config = command.config_to_resume(place, options, pairs)
            if place.is_finished():
                if not ranks.first:
                    return
                if not quiet:
                    print(f"the run in {folder} is finished")
                _show_result(place, quiet)
                return
        else:
            config = command.config_to_start(options, pairs)
            folder = folder or command.fresh_folder(config)
            place = RunDir(folder)
        # until the report is written
        with place.lock() if ranks.first else contextlib.nullcontext():
            command.execute(
                config,
                place,
                signals,
                resume=resume,
                overwrite=overwrite and not resume,
                quiet=quiet,
                log=trackers if ranks.first else (),
                ranks=ranks,
            )
            signals.training = False
            if ranks.first:
                _show_result(place, quiet)
        ranks.leave()


def _show_result(place: RunDir, quiet: bool) -> None:
    """Make the report, if there is none yet, and print how the run ended."""
    from rewire.app import report
    from rewire.app.train.display import result_lines
    from rewire.app.train.run_dir import REPORT

    page = place.path / REPORT
    result = place.read_result()
    if not page.exists():
        report.write(place.path)
    if not quiet:
        print("\n".join([*result_lines(result), f"report         {page}"]))
