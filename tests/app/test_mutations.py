"""Files that were damaged or changed, at random, thousands of them: refused in one line, or of no
other content.

`REWIRE_MUTATIONS` says how many (before a release: 5000). Half of the changed files have their
checksums made anew, as somebody would who means it: then their content may be taken, but no reader
may do anything but take it or refuse it in one line. Memory is limited for all: what is legitimate
takes half of it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import resource
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mutations
import rewire
from rewire.app import cli, data, run_files
from rewire.app.data import digits, mnist
from rewire.app.errors import DataError, ReportError, StoppedError, TrainError
from rewire.app.report.page import _sections
from rewire.app.report.read import read_run
from rewire.app.train import loop
from rewire.app.train.config import make_config
from rewire.app.train.run_dir import RunDir
from rewire.export import load_ternary, save_ternary
from rewire.nn import SparseLinear
from rewire.posterior import Posterior
from rewire.storage import files
from rewire.storage import tensors as tensor_file

COUNT = int(os.environ.get("REWIRE_MUTATIONS", "250"))
SLACK = 1 << 20  # bytes that a reader may take beyond twice what the file as it was takes
ADDRESS_SPACE = 256 << 20  # and what all of the process may grow by, with what Python does not see


# --- what is read ---------------------------------------------------------------------------------


class Reader:
    """A kind of file or folder: how to read it, what may be raised, and which of its files may be
    changed.

    read: from the folder to what was read, as something that can be compared.
    seal: make the checksums of a changed folder right.
    """

    def __init__(
        self,
        folder: Path,
        names: list[str],
        read: Callable[[Path], Any],
        refusals: tuple[type[Exception], ...],
        seal: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder, self.names, self.read, self.refusals, self.seal = (
            folder,
            names,
            read,
            refusals,
            seal,
        )
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        tracemalloc.start()
        self.expected = read(folder)
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def plain(value: Any) -> Any:
    """Anything as something that can be compared with ==, to the last bit."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            list(value.shape),
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def report_of(folder: Path) -> Any:
    """All that a report shows, without the options that decide nothing; the page is made, too."""
    run = read_run(folder)
    _sections(run, {})
    layers = [
        [v.name, v.inputs, v.outputs, v.connections]
        + [
            [f.size, plain(f.units), plain(f.counts)]
            for f in (v.fan_in, v.fan_out)
            if f is not None
        ]
        for v in run.layers
    ]
    config = {key: value for key, value in run.config.items() if key not in run_files.FREE}
    return [config, run.metrics, run.result, run.info, layers]


def resumed(folder: Path) -> Any:
    """All that a run goes on with."""
    place = RunDir(folder)
    config = place.read_config()
    saved = place.read_checkpoint(config)
    metrics = (folder / "metrics.jsonl").read_bytes()[: saved.metrics.bytes]
    return [
        config.sha256(),
        saved.epoch,
        saved.step,
        saved.seconds,
        saved.info,
        plain(saved.state),
        metrics,
    ]


def resumed_at_the_end(folder: Path) -> Any:
    """What a finished run says again."""
    return RunDir(folder).read_result()


def seal_run(folder: Path) -> None:
    """Make the checksums of a run right, as far as its files can be read."""
    config = run_files.config_sum(json.loads((folder / "config.json").read_text()))
    path = folder / "checkpoint.json"
    if path.exists():
        commit = json.loads(path.read_text())
        metrics = (folder / "metrics.jsonl").read_bytes()
        commit["config_sha256"] = config
        commit["metrics_bytes"] = len(metrics)
        commit["metrics_sha256"] = files.sha256_bytes(metrics)
        for tensors in folder.glob("checkpoint-*.safetensors"):
            commit["sha256"] = files.sha256_file(tensors)
        commit["this_sha256"] = run_files.own_sum(commit)
        path.write_text(json.dumps(commit))
    path = folder / "checksums.json"
    if path.exists():
        sums = json.loads(path.read_text())
        sums["config_sha256"] = config
        sums["files"] = {name: files.sha256_file(folder / name) for name in sums["files"]}
        path.write_text(json.dumps(sums))


def seal_tensors(folder: Path) -> None:
    """Make the checksum right that a file of tensors carries itself."""
    for path in folder.iterdir():
        tensors, metadata = tensor_file.read(path)
        if "sha256" in metadata:
            metadata["sha256"] = tensor_file.content_sha256(tensors, metadata)
            path.write_bytes(tensor_file.pack(tensors, metadata))


def ternary_model() -> nn.Module:
    layer = SparseLinear(9, 4, connections=7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.weight.values.copy_(0.5 * (1 - 2 * (torch.arange(7) % 2)))
    return nn.Sequential(layer, nn.BatchNorm1d(4))


def dense_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4))


IMAGES = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7)


def idx_file() -> tuple[bytes, mnist.IdxFile]:
    content = struct.pack(">BBBB3I", 0, 0, 8, 3, *IMAGES.shape) + IMAGES.tobytes()
    packed = gzip.compress(content, mtime=0)
    sums = files.sha256_bytes(packed), files.sha256_bytes(content)
    return packed, mnist.IdxFile("images.gz", len(packed), *sums, IMAGES.shape)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    """One reader of each kind, over files that are right."""
    base = tmp_path_factory.mktemp("files")
    options = {
        "hidden": [6],
        "density": [0.3],
        "epochs": 3,
        "batch_size": 400,
        "threads": 1,
        "lr": 0.3,
    }
    going, over = base / "going on", base / "finished"
    asked = iter([0] * 9 + [2] * 9)
    with pytest.raises(StoppedError):
        loop.run(make_config(options), data.load("digits"), RunDir(going), stop=lambda: next(asked))
    cut = {"method": "magnitude", "method_options": {}}
    loop.run(make_config(options | cut), data.load("digits"), RunDir(over))
    run, finished = (sorted(path.name for path in folder.iterdir()) for folder in (going, over))
    assert (len(run), len(finished)) == (4, 7)
    assert len((going / "metrics.jsonl").read_text().splitlines()) == 2

    for name in ("ternary", "adapter", "posterior", "idx", "digits"):
        (base / name).mkdir()
    model = ternary_model()
    save_ternary(model, base / "ternary" / "x")
    adapter = rewire.adapt(dense_model(), density=0.4, train="0.bias")
    adapter.model(torch.ones(3, 9))  # changes statistics
    adapter.save(base / "adapter" / "x")
    posterior = Posterior(model, burn_in=1, every=2, limit=8)
    for _ in range(7):
        posterior.update()
    posterior.save(base / "posterior" / "x")
    packed, described = idx_file()
    (base / "idx" / "x").write_bytes(packed)
    shipped = Path(digits.__file__).parent / "embedded" / digits.FILE
    (base / "digits" / digits.FILE).write_bytes(shipped.read_bytes())

    def load_posterior(folder: Path) -> Any:
        found = Posterior.load(folder / "x", ternary_model())
        return [found.burn_in, found.every, found.limit, found.steps, plain(found.samples)]

    def read_adapter(folder: Path) -> Any:
        return plain(dict(rewire.load_adapter(dense_model(), folder / "x").model.state_dict()))

    def read_digits(folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(digits.resources, "files", lambda _: folder.parent / "packed")
            (folder.parent / "packed").mkdir(exist_ok=True)
            embedded = folder.parent / "packed" / "embedded"
            embedded.unlink(missing_ok=True)
            embedded.symlink_to(folder)
            return plain(digits.read())

    return {
        "report": Reader(over, finished, report_of, (ReportError,), seal_run),
        "report of a run that goes on": Reader(going, run, report_of, (ReportError,), seal_run),
        "resume": Reader(going, run, resumed, (TrainError,), seal_run),
        "resume of a finished run": Reader(
            over, finished, resumed_at_the_end, (TrainError,), seal_run
        ),
        "ternary": Reader(
            base / "ternary",
            ["x"],
            lambda folder: plain(load_ternary(folder / "x")),
            (ValueError,),
            seal_tensors,
        ),
        "adapter": Reader(base / "adapter", ["x"], read_adapter, (ValueError,), seal_tensors),
        "posterior": Reader(base / "posterior", ["x"], load_posterior, (ValueError,), seal_tensors),
        "idx": Reader(
            base / "idx",
            ["x"],
            lambda folder: plain(mnist.read(folder / "x", described)),
            (DataError,),
        ),
        "digits": Reader(base / "digits", [digits.FILE], read_digits, (DataError,)),
    }


# --- and what must come of it ---------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The process may grow by `ADDRESS_SPACE` only."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def one_changed(folder: Path, reader: Reader, dice: random.Random) -> tuple[Path, str]:
    """A new folder with a reader's files, of which one is changed, and that one's name."""
    folder.mkdir()
    for name, content in reader.files.items():
        (folder / name).write_bytes(content)
    name = dice.choice(reader.names)
    (folder / name).write_bytes(mutations.changed(name, reader.files[name], dice))
    return folder, name


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is limited by way of /proc"
)
@pytest.mark.usefixtures("little_memory")
def test_changed_files_are_refused_or_of_no_other_content(
    readers: dict[str, Reader], tmp_path: Path
) -> None:
    kinds = list(readers)
    refused = taken = sealed = 0
    for number in range(COUNT):
        dice = random.Random(f"{number}")
        reader = readers[kinds[number % len(kinds)]]
        folder, name = one_changed(tmp_path / str(number), reader, dice)
        own = False
        if reader.seal is not None and dice.random() < 0.5:
            with contextlib.suppress(Exception):  # changed so much that nothing can be made of it
                reader.seal(folder)
                own = True
        sealed += own
        told = (
            f"mutation {number} of "
            f"{name}, "
            f"{kinds[number % len(kinds)]}{', checksums made anew' if own else ''}"
        )
        line = None
        tracemalloc.start()
        try:
            found = reader.read(folder)
        except reader.refusals as error:
            line = str(error)
        except Exception as error:
            raise AssertionError(f"{told}: {error!r}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if line is None:
            taken += 1
            assert own or found == reader.expected, told
        else:
            refused += 1
            assert "\n" not in line, told
            assert 0 < len(line) < 2000, told
        assert peak <= 2 * reader.peak + SLACK, (
            f"{told}: {peak:,} bytes, of the file as it was {reader.peak:,}"
        )
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    print(
        f"{COUNT} changed files: {refused} refused, {taken} with nothing changed that counts; "
        f"{sealed} sealed anew"
    )
    assert refused > COUNT / 2


def test_the_command_line_says_so_in_one_line(
    readers: dict[str, Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(max(COUNT // 50, 16)):
        dice = random.Random(f"command {number}")
        reader = readers[("report", "resume of a finished run", "resume")[number % 3]]
        folder, name = one_changed(tmp_path / str(number), reader, dice)
        # Training cannot be asked to go on with whatever somebody made of a checkpoint and sealed
        # anew.
        if number % 3 != 2 and dice.random() < 0.5 and reader.seal is not None:
            with contextlib.suppress(Exception):
                reader.seal(folder)
        command = (
            ("report", str(folder))
            if number % 3 == 0
            else ("train", "--resume", "--run-dir", str(folder), "-q")
        )
        code = cli.run(command)
        told = capsys.readouterr().err
        assert (code, told) == (0, "") or (
            code == 2 and told.startswith("error: ") and told.count("\n") == 1
        ), (number, name, command, told)
