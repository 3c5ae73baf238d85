"""The command line in processes: several at once, asked to stop, without rights, without memory."""

import errno
import hashlib
import http.server
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import Ended, Server

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

QUICK = ("train", "--hidden", "10", "--epochs", "2", "--batch-size", "300", "--threads", "1")
LONG = (*QUICK[:3], "--epochs", "100000", "--batch-size", "100", "--threads", "1")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Path:
    """A finished run."""
    folder = tmp_path / "run"
    assert server.run(*QUICK, "--run-dir", str(folder)) == Ended(0, "")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error(ended: Ended, code: int = 2) -> str:
    """The one line of a command that failed."""
    assert ended.code == code, ended
    assert ended.told.startswith("error: "), ended
    assert ended.told.count("\n") == 1, ended
    return ended.told.removeprefix("error: ").rstrip("\n")


def test_two_that_begin_at_once_in_one_folder(server: Server, tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / str(number)
        commands = [(*QUICK, "--run-dir", str(folder), "--seed", seed) for seed in ("1", "2", "3")]
        ended = server.together(commands)
        won = [seed for seed, e in zip((1, 2, 3), ended, strict=True) if e == Ended(0, "")]
        lines = [error(e) for e in ended if e.code]
        assert len(won) == 1
        assert all(
            "another process is training here" in line or "already has a run" in line
            for line in lines
        )
        assert json.loads((folder / "result.json").read_text())["seed"] == won[0]
        assert server.run("report", str(folder)) == Ended(0, "")


def test_overwriting_a_live_run_changes_nothing(server: Server, tmp_path: Path) -> None:
    """All that the run of the first process leaves is what it would have left alone."""
    live, alone = (tmp_path / name for name in ("live", "alone"))
    begin = (*QUICK, "--seed", "1", "--run-dir")
    # The first waits within its second epoch until the others have come and gone.
    wait = (
        "import pathlib, time\n"
        "from rewire.app.train import display\n"
        "def ended(self, record):\n"
        "    until = time.monotonic() + 100\n"
        "    (here / 'ready').touch()\n"
        "    while not (here / 'go').exists() and time.monotonic() < until: time.sleep(0.01)\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "display.Lines.epoch_ended = ended\n"
    )
    found: list[Ended] = []
    thread = threading.Thread(
        target=lambda: found.append(server.run(*begin, str(live), setup=wait))
    )
    thread.start()
    second = Server()
    try:
        while not (tmp_path / "ready").exists():
            assert thread.is_alive()
            threading.Event().wait(0.01)
        before = contents(live)
        for command in (
            (*QUICK, "--overwrite"),
            (*QUICK, "--overwrite", "--seed", "5"),
            ("train", "--resume"),
        ):
            command = (*command, "--run-dir", str(live))
            assert "another process is training here" in error(second.run(*command))
            assert contents(live) == before
        assert second.run("report", str(live)) == Ended(0, "")  # only reads
        (live / "report.html").unlink()
    finally:
        (tmp_path / "go").touch()
        thread.join()
        second.close()
    assert found == [Ended(0, "")]
    assert server.run(*begin, str(alone)) == Ended(0, "")
    assert (live / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_a_killed_run_locks_nobody_out(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        ended = server.run(
            *LONG, "--run-dir", str(tmp_path / "r"), "--overwrite", signals=[(1.5, signal.SIGKILL)]
        )
        assert ended == Ended(-signal.SIGKILL, "")
    assert server.run(*QUICK, "--run-dir", str(tmp_path / "r"), "--overwrite") == Ended(0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("apart", [0.0, 0.0005, 0.004, 0.02])
def test_signals_in_a_row(server: Server, tmp_path: Path, number: int, apart: float) -> None:
    """However soon a second and a third follow the first: one line, no traceback, and a run that
    can go on.
    """
    folder = tmp_path / "r"
    signals = [(0.6 + apart * i, number) for i in range(3)]
    ended = server.run(*LONG, "--run-dir", str(folder), signals=signals)
    line = error(ended, 128 + number) if ended.code >= 0 else ""
    if line:
        assert line.startswith("stopped")
    else:  # SIGTERM before there is a handler: the system ends the process, which says nothing
        assert ended == Ended(-number, "")
    if (folder / "checkpoint.json").exists():
        assert server.run("report", str(folder)) == Ended(0, "")


def test_other_commands_stop_in_one_line(server: Server, run: Path) -> None:
    for after in (0.0, 0.02, 0.1):
        signals = [(after, signal.SIGINT), (after + 0.004, signal.SIGINT)]
        ended = server.run("report", str(run), signals=signals)
        if ended.code not in (0, -signal.SIGINT):  # done before, or not begun
            assert error(ended, 130) == "stopped"


@pytest.mark.skipif(
    os.name != "posix" or os.getuid() != 0, reason="only root can have fewer rights for a moment"
)
def test_without_rights(server: Server, run: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to all others
        Path(name).chmod(0o755)
        shutil.copytree(run, Path(name) / "run")
        _check_without_rights(server, Path(name))


def _check_without_rights(server: Server, tmp_path: Path) -> None:
    run, closed, nobody = tmp_path / "run", tmp_path / "closed", 65534
    (closed / "inside").mkdir(parents=True)
    closed.chmod(0o700)
    # The package may lie where only root can read it.
    loaded = (
        "from rewire.app import data\n"
        "found = data.load('digits')\n"
        "data.load = lambda *_, **__: found\n"
    )
    for command in (
        (*QUICK, "--run-dir", str(closed / "inside" / "r")),
        (*QUICK, "--run-dir", str(closed / "inside" / "r"), "--overwrite"),
        ("train", "--resume", "--run-dir", str(closed / "inside")),
        ("report", str(closed / "inside")),
        (
            *QUICK,
            "--data",
            "mnist",
            "--data-dir",
            str(closed / "inside"),
            "--run-dir",
            str(tmp_path / "new"),
        ),
    ):
        assert "Permission denied" in error(server.run(*command, user=nobody)), command
    for command in (
        (*QUICK, "--run-dir", str(tmp_path / "new")),
        (*QUICK, "--run-dir", str(run), "--overwrite"),
    ):
        assert ("Permission denied") in error(server.run(*command, user=nobody, setup=loaded)), (
            command
        )
    before = contents(run)
    (run / "metrics.jsonl").chmod(0)
    for command in (("report", str(run)), ("train", "--resume", "--run-dir", str(run))):
        line = error(server.run(*command, user=nobody))
        assert "metrics.jsonl" in line
        assert "Permission denied" in line
    assert contents(run) == before


def test_names_that_cannot_be(server: Server, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in (
        ("x" * 256, "File name too long"),
        ("loop", "symbolic links"),
        ("loop/r", "symbolic links"),
    ):
        folder = str(tmp_path / name)
        for command in (
            (*QUICK, "--run-dir", folder),
            (*QUICK, "--run-dir", folder, "--overwrite"),
            ("train", "--resume", "--run-dir", folder),
            ("report", folder),
            (*QUICK, "--data", "mnist", "--data-dir", folder, "--run-dir", str(tmp_path / "new")),
        ):
            line = error(server.run(*command))
            assert any(
                r in line for r in (reason, "no run in", "not found in", "needed is a folder")
            ), line
    assert not (tmp_path / "new").exists()


def test_names_that_are_no_text(server: Server, tmp_path: Path) -> None:
    """Marks of the page's template, line ends, bytes that are no UTF-8, markup."""
    names = (
        "@FIGURES@",
        "@PLOTLY@@BODY@",
        "a\nb",
        os.fsdecode(b"\xff\xfe"),
        "<script>alert(1)<",
        "--help",
        "x" * 255,
    )
    for name in names:
        folder = tmp_path / name
        assert server.run(*QUICK, "--run-dir", str(folder)) == Ended(0, ""), name
        page = (folder / "report.html").read_bytes().decode()
        assert page.count("<!DOCTYPE html>") == 1
        assert page.count('id="figures"') == 1
        assert "<script>alert" not in page
        if "@" in name:
            assert f"run {name}, seed 0" in page
        (folder / "model.safetensors").write_bytes(b"x")
        assert "model.safetensors is damaged" in error(server.run("report", str(folder)))


def test_out_of_memory_is_one_line(server: Server, tmp_path: Path) -> None:
    """In building the network, in torch's and our own native code, while saving; and nothing is
    half written.
    """
    for number, command in enumerate(
        (
            ("--hidden", "60000000", "--density", "1e-8"),
            ("--hidden", "2000000,50000", "--density", "1e-8"),
            ("--hidden", "100000,100000", "--method", "magnitude"),
            ("--hidden", "1000", "--batch-size", "100000000", "--epochs", "1", "--density", "0.9"),
            ("--hidden", "100000000000"),
        )
    ):
        folder = tmp_path / str(number)
        ended = server.run(
            "train", "--epochs", "1", *command, "--run-dir", str(folder), memory=200 << 20
        )
        if ended == Ended(0, ""):  # a batch is never larger than the data
            assert "--batch-size" in command
            continue
        assert error(ended).startswith("out of memory"), command
        if folder.exists():
            assert not list(folder.glob(".unfinished-*"))
            assert not (folder / "result.json").exists()


def test_a_full_disk_is_one_line(server: Server, tmp_path: Path) -> None:
    """At every write in turn the system has no room left; afterwards the run ends as if it had
    had.
    """
    whole = tmp_path / "whole"
    assert server.run(*QUICK, "--run-dir", str(whole)) == Ended(0, "")
    for at in (1, 2, 4, 6, 8, 9, 10):
        folder = tmp_path / str(at)
        full = (
            "from rewire.storage import files\n"
            "def write(file, data, calls=[], real=files.write_bytes):\n"
            "    calls.append(1)\n"
            f"    if len(calls) == {at}:\n"
            "        real(file, data[:10])\n"
            f"        raise OSError({errno.ENOSPC}, 'No space left on device')\n"
            "    real(file, data)\n"
            "files.write_bytes = write\n"
        )
        line = error(server.run(*QUICK, "--run-dir", str(folder), setup=full))
        assert "No space left on device; make room" in line
        assert not list(folder.glob(".unfinished-*"))
        begun = (folder / "config.json").exists()
        again = ("train", "--resume") if begun else QUICK
        assert server.run(*again, "--run-dir", str(folder)) == Ended(0, "")
        assert (folder / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()
        assert server.run("report", str(folder)) == Ended(0, "")


class _Slow(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` in pieces, so that those who ask meet each other; counts what it was
    asked.
    """

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        content = self.server.content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for first in range(0, len(content), 20_000):
            self.wfile.write(content[first : first + 20_000])
            threading.Event().wait(0.02)

    def log_message(self, *_: object) -> None:
        pass


def test_first_downloads_at_once(server: Server, tmp_path: Path) -> None:
    """Three processes want the same file: one fetches it, all have it, whole; also if the first of
    them is killed.
    """
    content = os.urandom(400_000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Slow) as source:
        source.content, source.requests = content, []
        thread = threading.Thread(target=source.serve_forever)
        thread.start()
        try:
            fetch = (
                "os.environ['no_proxy'] = '127.0.0.1'\n"
                "import pathlib\n"
                "from rewire.app.data.download import download\n"
                "target = pathlib.Path(command[0])\n"
                f"download('http://127.0.0.1:{source.server_address[1]}/f', target, "
                f"size={len(content)},\n"
                f"    sha256='{hashlib.sha256(content).hexdigest()}', help_line='')\n"
                "os._exit(0)\n"
            )
            target = tmp_path / "new" / "file.gz"
            assert server.together([[str(target)]] * 3, setup=fetch) == [Ended(0, "")] * 3
            assert target.read_bytes() == content
            assert source.requests == ["/f"]
            assert [path.name for path in target.parent.iterdir()] == ["file.gz"]
            shutil.rmtree(target.parent)
            assert server.run(str(target), setup=fetch, signals=[(0.2, signal.SIGKILL)]) == Ended(
                -signal.SIGKILL, ""
            )
            assert server.together([[str(target)]] * 2, setup=fetch) == [Ended(0, "")] * 2
            assert target.read_bytes() == content
            assert [path.name for path in target.parent.iterdir()] == ["file.gz"]
        finally:
            source.shutdown()
            thread.join()
