"""`rewire.export.c`: the source compiles without a warning and computes what PyTorch does."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewire
from rewire import export
from rewire.export import CExport
from rewire.nn import SReLU

CC = shutil.which("cc")
ARM = shutil.which("arm-none-eabi-gcc")
FLAGS = ["-O2", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
compiled = pytest.mark.skipif(CC is None, reason="there is no C compiler (cc) here")


def run(made: CExport, *inputs: Tensor) -> Tensor:
    """What the compiled source prints for each of the inputs."""
    program, upper = made.source.with_suffix(""), made.source.stem.upper()
    command = [str(CC), *FLAGS, f"-D{upper}_MAIN", str(made.source), "-o", str(program), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    text = "\n".join(" ".join(f"{v:.9g}" for v in x.flatten().tolist()) for x in inputs)
    done = subprocess.run([program], input=text, check=True, capture_output=True, text=True)
    return torch.tensor([[float(v) for v in line.split()] for line in done.stdout.splitlines()])


class Given(nn.Module):
    """Layers, and what is done with them and x."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def trained_norms(model: nn.Module, *shape: int) -> nn.Module:
    """BatchNorms with statistics, factors and shifts that change something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model(torch.randn(8, *shape) + 0.5)
    return model.eval()


def convolutions() -> nn.Module:
    return trained_norms(
        nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, (3, 2), dilation=(1, 2), groups=2, padding="same"), nn.SiLU(),
            nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(6), nn.AvgPool2d(2, ceil_mode=True),
            nn.Flatten(), nn.Linear(24, 5), nn.Softmax(-1),
        ),
        2, 14, 12,
    )  # fmt: skip


def one_dimension() -> nn.Module:
    return trained_norms(
        nn.Sequential(
            nn.Conv1d(3, 6, 5, stride=2, padding=2), nn.BatchNorm1d(6), nn.ELU(0.7),
            nn.MaxPool1d(2), nn.Conv1d(6, 4, 3), nn.AvgPool1d(2, padding=1), nn.GELU(),
            nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(12, 4), nn.LogSoftmax(1),
        ),
        3, 30,
    )  # fmt: skip


def residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = F.relu(y + 0.5 * m.b(F.gelu(y, approximate="tanh"))) - y / 3
        return torch.cat([z.view(z.shape[0], -1), y * z], 1)[:, 3:17].clamp(-0.4, 2)

    return Given(forward, a=nn.Linear(9, 12), b=nn.Linear(12, 12, bias=False))


def pooled() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.adaptive_max_pool2d(m.c(x), (3, 2)).permute(0, 2, 3, 1)
        return x.mean(-1).flatten(1)

    return Given(forward, c=nn.Conv2d(2, 4, 3, padding=1))


def recurrent(make: Any, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = make(5, 6, num_layers=2, bidirectional=True, batch_first=True, **more)
        return Given(lambda m, x: m.head(m.r(x)[0][:, -1]), r=layer, head=nn.Linear(12, 3))

    return build


def last_state() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        _, (h, c) = m.r(x.transpose(0, 1))
        return torch.cat([h, c], -1)

    return Given(forward, r=nn.LSTM(5, 4))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(20, 30), SReLU(30), nn.Linear(30, 300), nn.PReLU(300)),
        (3, 20),
    ),
    "wide": (lambda: nn.Sequential(nn.Linear(400, 300, bias=False), nn.Tanh()), (1, 400)),
    "convolutions": (convolutions, (2, 2, 14, 12)),
    "one dimension": (one_dimension, (1, 3, 30)),
    "residual": (residual, (2, 9)),
    "pooled": (pooled, (2, 2, 7, 5)),
    "rnn": (recurrent(nn.RNN, nonlinearity="relu"), (2, 7, 5)),
    "gru": (recurrent(nn.GRU), (2, 7, 5)),
    "lstm": (recurrent(nn.LSTM, bias=False), (1, 7, 5)),
    "last state": (last_state, (2, 7, 5)),
}


@compiled
@pytest.mark.parametrize("density", [0.3, None])
@pytest.mark.parametrize("name", NETWORKS)
def test_computes_what_torch_does(name: str, density: float | None, tmp_path: Path) -> None:
    build, shape = NETWORKS[name]
    model = build()
    if density is not None:
        model = rewire.sparsify(model, density=density)
    model.eval()
    inputs = [torch.randn(shape) for _ in range(3)]
    made = export.c(model, inputs[0], tmp_path, name="net")
    with torch.no_grad():
        expected = torch.stack([model(x).flatten() for x in inputs])
    torch.testing.assert_close(run(made, *inputs), expected, rtol=1e-5, atol=1e-5)
    assert made.bound == 0
    assert (made.inputs, made.outputs) == (inputs[0].numel(), expected.shape[1])


@compiled
@pytest.mark.parametrize("values", ["int8", "ternary"])
@pytest.mark.parametrize("density", [0.3, None])
@pytest.mark.parametrize("name", NETWORKS)
def test_rounded_weights_stay_within_the_bound(
    name: str, density: float | None, values: Any, tmp_path: Path
) -> None:
    build, shape = NETWORKS[name]
    model = build()
    if density is not None:
        model = rewire.sparsify(model, density=density)
    model.eval()
    x = torch.randn(shape)
    made = export.c(model, x, tmp_path, name="net", values=values)
    with torch.no_grad():
        exact = model(x).flatten()
    off = float((run(made, x)[0] - exact).abs().max())
    assert off > 0
    if made.bound is None:
        assert name in ("rnn", "gru", "lstm", "last state")
        assert off < (0.1 if values == "int8" else 3)
    else:
        assert off <= made.bound + 1e-5
    float_bytes = export.c(model, x, tmp_path, name="net").constant_bytes
    assert made.constant_bytes < float_bytes


@compiled
@pytest.mark.parametrize("values", ["int8", "ternary"])
def test_a_frozen_model_is_written_as_it_is(values: Any, tmp_path: Path) -> None:
    model = rewire.sparsify(NETWORKS["convolutions"][0](), density=0.4)
    frozen, x = rewire.freeze(model, values), torch.randn(2, 2, 14, 12)
    with torch.no_grad():
        expected = frozen(x).flatten()
    made = export.c(frozen, x, tmp_path, name="net")
    torch.testing.assert_close(run(made, x)[0], expected, rtol=1e-5, atol=1e-5)


ACTIVATIONS = [
    nn.ReLU6(), nn.Hardtanh(-0.3, 0.8), nn.LeakyReLU(0.2), nn.CELU(0.8), nn.SELU(), nn.GELU("tanh"),
    nn.Sigmoid(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Softplus(2.0, 3.0), nn.Softsign(), nn.Mish(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Softmax(0), nn.Dropout(), nn.ReLU(inplace=True),
]  # fmt: skip


@compiled
def test_every_activation(tmp_path: Path) -> None:
    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.ModuleList(ACTIVATIONS)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([f(x + 0) for f in self.each], 1)

    x = torch.cat([torch.randn(2, 40), torch.tensor([[-90.0, 90, 0, 3, -3]] * 2)], 1)
    model = All().eval()
    made = export.c(model, x, tmp_path)
    torch.testing.assert_close(run(made, x)[0], model(x).flatten(), rtol=1e-5, atol=1e-5)


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return nn.Sequential(layer)


@compiled
def test_a_norm_over_another_dimension_than_the_layer_changes_is_not_folded(tmp_path: Path) -> None:
    for size in (4, 3):  # with 4 the numbers of channels and of outputs agree by chance
        model = trained_norms(nn.Sequential(nn.Linear(5, size), nn.BatchNorm1d(4)), 4, 5)
        x = torch.randn(1, 4, 5)
        made = export.c(model, x, tmp_path)
        torch.testing.assert_close(run(made, x)[0], model(x).flatten(), rtol=1e-5, atol=1e-5)


@compiled
def test_crossed_limits_and_arguments_by_name(tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        joined = torch.cat(tensors=[torch.add(input=x, other=x), x.clamp(0.5, -0.5)], dim=1)
        return torch.permute(input=joined, dims=(1, 0))

    model, x = Given(forward), torch.randn(2, 4)
    made = export.c(model, x, tmp_path)
    torch.testing.assert_close(run(made, x)[0], model(x).flatten())


def no_branch(m: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r"1 \(LayerNorm\) cannot be exported"),
        (Given(lambda m, x: torch.sort(x)[0]), "sort cannot be exported"),
        (Given(lambda m, x: x.cumsum(1)), "cumsum cannot be exported"),
        (Given(no_branch), "torch.fx cannot follow it"),
        (Given(lambda m, x: (x, x)), "must return one tensor"),
        (Given(lambda m, x: x / (x * x)), "divides by what the network computes"),
        (
            nn.Sequential(
                nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 1, 1, padding=1, padding_mode="circular")
            ),
            r"1 \(Conv1d\) cannot be exported to C: it pads by 'circular'",
        ),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), "depends on a batch"),
        (Given(lambda m, x: x[:, [2, 0, 3, 1]]), "getitem cannot be .* by a list or a mask"),
        (Given(lambda m, x: torch.div(x, 0.3, rounding_mode="floor")), "it has a rounding_mode"),
        (Given(lambda m, x: F.dropout(x, 0.5)), "it drops at random in eval mode too"),
        (hooked(), r"0 \(Linear\) cannot be exported to C: it has a forward hook"),
    ],
)  # fmt: skip
def test_refuses_by_name_before_anything_is_written(
    model: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export.c(model, torch.randn(2, 4), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_refuses_to_round_what_is_not_finite(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite; no int8 holds"):
        export.c(model, torch.randn(2, 4), tmp_path / "new", values="int8")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "int"}, "a name that C allows, not 'int'"),
        ({"name": "a b"}, "a name that C allows"),
        ({"values": "int4"}, "'ternary', not 'int4'"),
        ({"example": torch.ones(1, 4).double()}, "tensor of float32"),
    ],
)
def test_refuses_bad_arguments(options: Any, message: str, tmp_path: Path) -> None:
    given = {"example": torch.randn(1, 4)} | options
    with pytest.raises(ValueError, match=message):
        export.c(nn.Linear(4, 4), given.pop("example"), tmp_path, **given)


def digits() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    return rewire.sparsify(model, density=0.1)


@pytest.mark.parametrize("compiler", ["cc", "arm-none-eabi-gcc"])
def test_the_digits_in_int8_are_small(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed (Debian: apt-get install gcc-arm-none-eabi)")
    made = export.c(digits(), torch.randn(1, 64), tmp_path, name="digits", values="int8")
    target = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"]
    flags = [*FLAGS, *(target if "arm" in compiler else [])]
    built = tmp_path / "digits.o"
    subprocess.run([compiler, *flags, "-c", str(made.source), "-o", str(built)], check=True)
    sizes = subprocess.run(
        ["arm-none-eabi-size" if "arm" in compiler else "size", str(built)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    print(sizes)
    code_and_constants = int(sizes.splitlines()[1].split()[0])
    assert made.constant_bytes < code_and_constants < 64 * 1024
