"""Downloads against a real server on the loopback interface."""

import contextlib
import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewire.app.data import mnist
from rewire.app.data.download import download
from rewire.app.errors import DataError
from rewire.storage import files

CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; honours Range if `server.ranges`; breaks off as `server.breaks`
    says.
    """

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if server.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.breaks:
            body = body[: server.breaks.pop(0)]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.content, made.status, made.ranges = CONTENT, 200, True
        made.breaks, made.requests = [], []
        made.url = f"http://127.0.0.1:{made.server_address[1]}/file.gz"
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(url: str, target: Path) -> None:
    download(url, target, sha256=SHA256, size=len(CONTENT), help_line="use --data-dir", timeout=5)


def part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def test_whole(server, tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file.gz"
    seen = []
    download(
        server.url,
        target,
        sha256=SHA256,
        size=len(CONTENT),
        help_line="",
        progress=lambda name, done, total: seen.append((name, done, total)),
    )
    assert target.read_bytes() == CONTENT
    assert not part(target).exists()
    assert seen[-1] == ("file.gz", len(CONTENT), len(CONTENT))


def test_takes_up_a_broken_connection(server, tmp_path: Path) -> None:
    server.breaks = [100_000, 50_000]
    get(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-", "bytes=150000-"]


def test_next_call_continues(server, tmp_path: Path) -> None:
    server.breaks = [100_000, 0]  # nothing new the second time: give up, keep the part
    with pytest.raises(
        DataError,
        match=r"broke off after 100000 of 300000 .* again to continue, "
        r"or use --data-dir",
    ):
        get(server.url, tmp_path / "f")
    assert part(tmp_path / "f").stat().st_size == 100_000
    assert not (tmp_path / "f").exists()
    get(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=100000-"


def test_server_without_ranges_starts_again(server, tmp_path: Path) -> None:
    server.ranges = False
    part(tmp_path / "f").write_bytes(CONTENT[:1000])
    get(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-"]


def test_complete_part_needs_no_request(server, tmp_path: Path) -> None:
    part(tmp_path / "f").write_bytes(CONTENT)
    get(server.url, tmp_path / "f")
    assert server.requests == []


def test_part_that_is_too_long_is_thrown_away(server, tmp_path: Path) -> None:
    part(tmp_path / "f").write_bytes(CONTENT + b"x")
    get(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_wrong_content_is_deleted_and_both_sums_named(server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    found = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(DataError, match=f"sha256 {found}, expected {SHA256}; it was deleted"):
        get(server.url, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_shorter_file_on_the_server(server, tmp_path: Path) -> None:
    server.content = CONTENT[:1000]
    with pytest.raises(DataError, match="broke off after 1000 of 300000"):
        get(server.url, tmp_path / "f")


@pytest.mark.parametrize("status", [404, 416, 500])
def test_refusal(server, tmp_path: Path, status: int) -> None:
    server.status = status
    part(tmp_path / "f").write_bytes(CONTENT[:10])
    with pytest.raises(DataError, match=f"the server answered {status} .*; use --data-dir"):
        get(server.url, tmp_path / "f")
    assert part(tmp_path / "f").exists() == (status != 416)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"cannot be reached \(.*refused.*\); use "
        r"--data-dir",
    ) as caught:
        get(f"http://127.0.0.1:{free_port()}/f", tmp_path / "f")
    assert "\n" not in str(caught.value)


def test_no_url(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a URL"):
        get("somewhere", tmp_path / "f")


def test_folder_that_cannot_be_written(server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*f\.part: File exists"):
        get(server.url, tmp_path / "file" / "f")


def test_family_is_fetched_into_the_cache_once(
    server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiny files stand for the family; the second load asks nothing, a damaged copy is fetched
    again.
    """
    monkeypatch.setenv("REWIRE_DATA", str(tmp_path))
    file = mnist.IdxFile("file.gz", len(CONTENT), SHA256, "", (1,))
    family = mnist.Family("toy", server.url.removesuffix("file.gz"), ("a",), {"train_x": file})
    for expected in (1, 1):
        assert mnist._downloaded_folder(family, None, None) == tmp_path / "toy"
        assert len(server.requests) == expected
    (tmp_path / "toy" / "file.gz").write_bytes(b"damaged")
    mnist._downloaded_folder(family, server.url.removesuffix("/file.gz"), None)
    assert len(server.requests) == 2
    assert (tmp_path / "toy" / "file.gz").read_bytes() == CONTENT
    family = mnist.Family("toy2", f"http://127.0.0.1:{free_port()}", ("a",), {"train_x": file})
    with pytest.raises(
        DataError,
        match=r"give --data-dir FOLDER with the four .* of "
        r"toy2.*--mirror URL",
    ):
        mnist._downloaded_folder(family, None, None)


def test_progress_of_another_process_is_shown(server, tmp_path: Path) -> None:
    """Whoever waits for a file that another process fetches sees how far it is, and asks for
    nothing.
    """
    target, seen = tmp_path / "f", []
    part(target).write_bytes(CONTENT[:1000])

    def watch(name: str, done: int, total: int) -> None:
        seen.append((name, done, total))
        if len(seen) == 2:
            target.write_bytes(CONTENT)
            lock.close()

    lock = contextlib.ExitStack()
    lock.enter_context(files.lock_folder(tmp_path))
    download(
        server.url,
        target,
        sha256=SHA256,
        size=len(CONTENT),
        help_line="",
        timeout=5,
        progress=watch,
    )
    assert seen == [("f", 1000, len(CONTENT))] * 2
    assert server.requests == []


def test_without_locks_bytes_gather_under_a_name_of_their_own(
    server, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(
        "rewire.app.data.download.lock_folder", lambda *_, **__: contextlib.nullcontext(False)
    )
    part(tmp_path / "f").write_bytes(b"another process is writing here")
    get(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert part(tmp_path / "f").read_bytes() == b"another process is writing here"
    assert len(list(tmp_path.iterdir())) == 2
