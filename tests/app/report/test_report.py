"""The report: right numbers, whole page, nothing from the network, nothing that breaks out of its
place.
"""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from rewire.app import report, run_files
from rewire.app.errors import ReportError
from rewire.app.report import figures
from rewire.app.report.page import render
from rewire.app.report.read import Fan, Run, _Tensors, read_run
from rewire.storage import files

VOID = {"meta", "br", "hr", "link", "img", "input"}


def make_run(folder: Path, *, finished: bool = True, inputs: int = 6, epochs: int = 3) -> None:
    """A run directory of known content: 6 -> 3 -> 2, with an empty slot in the first layer."""
    folder.mkdir(exist_ok=True)
    tensors = {
        "0.weight.rows": np.array([0, 0, 2, -1], np.int32),
        "0.weight.cols": np.array([1, 5, 1, -1], np.int32),
        "2.weight.rows": np.array([1, 0], np.int32),
        "2.weight.cols": np.array([0, 0], np.int32),
    }
    info = {
        "layers": [
            {"name": "0.weight", "inputs": inputs, "outputs": 3, "connections": 3},
            {"name": "2.weight", "inputs": 3, "outputs": 2, "connections": 2},
        ],
        "image_shape": [2, 3],
        "samples": {"train": 10, "validation": 2, "test": 4},
    }
    (folder / "config.json").write_text(
        json.dumps(
            {"data": "toy", "method": "m", "seed": 1, "epochs": epochs, "data_dir": "/secret/place"}
        )
    )
    lines = [
        {
            "epoch": e,
            "step": e,
            "train_accuracy": e / 10,
            "train_loss": 1 / e,
            "validation_accuracy": 0.5,
            "validation_loss": 0.7,
            "connections": [3, 2],
            "turnover": [0.5, 0.0],
        }
        for e in range(1, epochs + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if finished:
        (folder / "metrics.jsonl").write_text(text)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        result = {
            "test_accuracy": 0.75,
            "test_loss": 0.4,
            "seconds": 125.0,
            "steps": 1234,
            "info": info,
            "versions": {"torch": "2.x"},
            "connections": 5,
            "possible_connections": 24,
            "density": 5 / 24,
        }
        (folder / "result.json").write_text(json.dumps(result))
        bind(folder)
    else:
        (folder / "metrics.jsonl").write_text(text + '{"epoch": 4, "torn')
        tensors = {f"state.model.{name}": tensor for name, tensor in tensors.items()}
        safetensors.numpy.save_file(tensors, folder / "checkpoint-9.safetensors")
        commit = {"file": "checkpoint-9.safetensors", "info": info}
        config = json.loads((folder / "config.json").read_text())
        commit |= {
            "format": 2,
            "epoch": epochs,
            "step": 9,
            "seconds": 1.5,
            "state": {"minus infinity": -math.inf},
            "sha256": files.sha256_file(folder / "checkpoint-9.safetensors"),
            "metrics_bytes": len(text),
            "metrics_sha256": files.sha256_bytes(text.encode()),
            "config_sha256": run_files.config_sum(config),
        }
        commit["this_sha256"] = run_files.own_sum(commit)
        (folder / "checkpoint.json").write_text(json.dumps(commit))


def bind(folder: Path) -> None:
    """Write the checksums of a finished run as it is now."""
    sums = {
        name: files.sha256_file(folder / name)
        for name in ("metrics.jsonl", "model.safetensors", "result.json")
    }
    config = run_files.config_sum(json.loads((folder / "config.json").read_text()))
    (folder / "checksums.json").write_text(
        json.dumps({"format": 2, "config_sha256": config, "files": sums})
    )


class Balanced(HTMLParser):
    """Checks that every element that opens closes, and keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data.strip())


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def charts(page: str) -> dict:
    found = re.search(
        r'<script type="application/json" '
        r'id="figures">(.*?)</script>',
        page,
        re.DOTALL,
    )
    assert found is not None
    return json.loads(found[1])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    make_run(tmp_path)
    return read_run(tmp_path)


def test_topology_is_counted(run: Run) -> None:
    first, second = run.layers
    assert first.fan_in is not None
    assert first.fan_out is not None
    assert first.fan_in.all().tolist() == [2, 0, 1]
    assert first.fan_out.all().tolist() == [0, 2, 0, 0, 0, 1]
    assert (first.fan_out.unused, first.fan_out.mean, first.fan_out.low, first.fan_out.high) == (
        4,
        0.5,
        0,
        2,
    )
    assert (first.connections, second.connections) == (3, 2)
    picture = figures.pixels(run)
    assert picture is not None
    assert picture.data[0]["z"] == [[0, 2, 0], [0, 0, 1]]
    assert "4 of 6 pixels have none" in picture.note


def test_page(tmp_path: Path, run: Run) -> None:
    path = report.write(tmp_path)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    parser = parse(page)
    text = " ".join(parser.texts)
    for part in (
        "75.00%",
        "2 min 5 s",
        "1,234 steps",
        "connections of 24",
        "20.83%",
        "torch",
        "2.x",
        "m on toy",
    ):
        assert part in text, part
    assert "/secret/place" not in page
    assert parser.links == []  # nothing is fetched
    drawn = charts(page)
    assert len(drawn) == 2 + 2 + 1 + 4
    for name, chart in drawn.items():
        assert f'id="{name}"' in page
        assert chart["layout"]["xaxis"]["title"]["text"]
        assert chart["layout"]["yaxis"]["title"]["text"]
        assert len({trace.get("name") for trace in chart["data"]}) == len(chart["data"])


def test_unfinished_run(tmp_path: Path) -> None:
    make_run(tmp_path, finished=False)
    page = report.write(tmp_path).read_text()
    assert "This run is not finished: 3 of 3 epochs." in page
    assert "test accuracy" not in page
    parse(page)


def test_run_without_an_epoch_or_an_image(tmp_path: Path) -> None:
    make_run(tmp_path, inputs=7, epochs=0)
    page = render(read_run(tmp_path))
    parse(page)
    assert len(charts(page)) == 4
    assert "Where the network looks" not in page


def test_text_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>&<b>"
    make_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"method": evil, "data": evil, evil: evil})
    )
    bind(tmp_path)
    page = report.write(tmp_path).read_text()
    parse(page)
    assert "<script>alert" not in page


@pytest.mark.parametrize("spread", [0, 5, 39, 40, 41, 1000])
def test_histogram_counts_everything_in_few_bars(spread: int) -> None:
    counts = np.concatenate([np.arange(7, 8 + spread), [7, 7]])
    fan = Fan(len(counts), np.arange(len(counts)), counts)
    chart = figures._histogram("", "", fan, "x", "y", "#000")
    bars = chart.data[0]
    assert sum(bars["y"]) == len(counts)
    assert 1 <= len(bars["x"]) <= figures.BARS
    assert bars["y"][0] >= 3


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="has no config"):
        report.write(tmp_path)
    make_run(tmp_path)
    for name, content, message in (
        (
            "model.safetensors",
            b"x",
            r"model\.safetensors is damaged: it was changed after the run "
            r"was finished",
        ),
        ("result.json", b"{", r"result\.json is damaged: it was changed"),
        ("metrics.jsonl", b"{\n", r"metrics\.jsonl is damaged: it was changed"),
        ("checksums.json", b"{}", r"checksums\.json is damaged: 'format' is missing"),
        ("config.json", b"[]", "not an object"),
    ):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ReportError, match=message):
            report.write(tmp_path)
        (tmp_path / name).write_bytes(good)
    (tmp_path / "result.json").unlink()
    with pytest.raises(ReportError, match="neither a result nor a checkpoint yet"):
        report.write(tmp_path)


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        ("rows", np.array([0, 0, 2**30, -1], np.int32), "has 1073741824, allowed are 0 to 2"),
        ("rows", np.zeros((0, 4), np.int32), "is no list of positions"),
        ("cols", np.array([1.0, 5.0, 1.0, -1.0]), "is no list of positions"),
        ("cols", np.array([-1, 5, 1, -1], np.int32), "has other empty slots than its columns"),
        ("shape", np.array([[2**62, 6, 1]]), "is no size of a weight"),
        ("shape", np.array([0, 6]), "is no size of a weight"),
    ],
)
def test_positions_that_cannot_be(
    tmp_path: Path, part: str, tensor: np.ndarray, reason: str
) -> None:
    """Also where the checksums were made anew; a layer of any size costs what its connections
    cost.
    """
    make_run(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors[f"0.weight.{part}"] = tensor
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    bind(tmp_path)
    with pytest.raises(ReportError, match=reason):
        read_run(tmp_path)
    tensors |= {
        "0.weight.shape": np.array([2**62, 2**61]),
        "0.weight.rows": np.array([0, 2**60, 2**62 - 1, -1]),
    }
    tensors["0.weight.cols"] = np.array([0, 0, 2**61 - 1, -1])
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    bind(tmp_path)
    assert str(2**62) in render(read_run(tmp_path))


def test_a_shape_that_numpy_cannot_count(tmp_path: Path) -> None:
    """The file is right: it has no number in 0 x 2^62 x 4."""
    header = json.dumps(
        {"x": {"dtype": "I32", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}
    ).encode()
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ReportError, match="x has the shape"):
        _Tensors(tmp_path / "f").get("x")
