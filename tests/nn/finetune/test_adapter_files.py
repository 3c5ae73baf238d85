"""Adapters in files: what they hold, which base they belong to, and what is refused; merging and
taking off.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import rewire
from adapted import ids, loss_of, network, train
from rewire.nn.layers.adapted import Adapted
from rewire.storage import files
from rewire.storage import tensors as tensor_file

Net = nn.Module


def adapted(**arguments: Any) -> tuple[Any, rewire.Adapter]:
    """A trained adapter, with biases and a norm trained as well."""
    model = network()
    given: dict[str, Any] = {"density": 0.1, "train": ("*.bias", "norm.*")} | arguments
    adapter = rewire.adapt(model, generator=torch.Generator().manual_seed(0), **given)
    train(model, adapter)
    return model, adapter


def output(model: Net) -> Tensor:
    with torch.no_grad():
        out: Tensor = copy.deepcopy(model).eval()(ids())
    return out


def same(model: Net, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[k], v) for k, v in state.items())


def state_of(model: Net) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


# --- files ----------------------------------------------------------------------------------------


def test_a_file_gives_the_same_bits_beside_the_same_base(tmp_path: Path) -> None:
    """Also running statistics, which training has changed."""
    model, adapter = adapted()
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    other = network()
    again = rewire.load_adapter(other, str(path))
    assert same(other, state_of(model))
    assert torch.equal(output(other), output(model))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags
    assert again.connections == adapter.connections
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert same(again.detach(), state_of(network()))


def test_a_file_has_what_was_trained_and_no_more(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(500, 400), nn.ReLU(), nn.Linear(400, 500))
    adapter = rewire.adapt(base, connections=100)
    adapter.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 100 * 12 + 1500
    tensors, _ = tensor_file.read(tmp_path / "a.safetensors")
    assert sorted(tensors) == sorted(
        f"{i}.difference.weight.{part}"
        for i in (0, 2)
        for part in ("values", "rows", "cols", "shape")
    )
    _, adapter = adapted()
    adapter.save(tmp_path / "b.safetensors")
    tensors, metadata = tensor_file.read(tmp_path / "b.safetensors")
    more = {"mix.bias", "volume.bias", "up.bias", "norm.weight", "norm.bias"}
    more |= {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {key for key in tensors if ".difference." not in key} == more
    known = json.loads(metadata["rewire.adapter"])["base"]
    assert set(known) == set(dict(network().named_parameters())) | {
        key for key in more if key.startswith("norm.")
    }


def test_an_average_can_be_saved(tmp_path: Path) -> None:
    model, adapter = adapted()
    average = AveragedModel(model, multi_avg_fn=rewire.ema.get_ema_multi_avg_fn(model, 0.5))
    optimizer = torch.optim.SGD(adapter.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, ids()).backward()
        optimizer.step()
        average.update_parameters(model)
    adapter.save(tmp_path / "a.safetensors", average.module)
    other = network()
    rewire.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(output(other), output(average.module))
    assert not torch.equal(output(other), output(model))
    with pytest.raises(ValueError, match="mix is not adapted in the model given"):
        adapter.save(tmp_path / "a.safetensors", network())


def test_what_a_file_would_lack_is_named(tmp_path: Path) -> None:
    model, adapter = adapted()
    model.down.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"down\.weight requires a gradient and is not among"):
        adapter.save(tmp_path / "a")


def test_another_file_takes_the_place_of_an_adapter(tmp_path: Path) -> None:
    """With other layers, and other parameters trained; back and forth to the same bits."""
    base = state_of(network())
    outputs = {}
    for name, arguments in (
        ("a", {"only": ["up", "head"], "train": "norm.weight"}),
        ("b", {"only": ["up", "mix"], "train": ["down.weight", "embedding.*"], "density": 0.3}),
    ):
        model, adapter = adapted(**arguments)
        adapter.save(tmp_path / name)
        outputs[name] = output(model)
        assert same(adapter.detach(), base)
    model = network()
    adapter = rewire.load_adapter(model, tmp_path / "a")
    for name in ("b", "a", "a", "b"):
        adapter.load(tmp_path / name)
        assert torch.equal(output(model), outputs[name])
        trained = {n for n, p in model.named_parameters() if p.requires_grad and "diff" not in n}
        assert trained == {"a": {"norm.weight"}, "b": {"down.weight", "embedding.weight"}}[name]
        assert isinstance(model.mix, Adapted) == (name == "b")
    assert same(adapter.detach(), base)


def flip(model: Any) -> None:
    with torch.no_grad():
        model.picture.weight.view(torch.int32).view(-1)[3] ^= 1


def wider(model: Any) -> None:
    model.down = nn.Linear(24, 17, bias=False)


OTHER_BASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one bit": (
        flip,
        r"belongs to another base: picture\.weight has other values.*check_base=False",
    ),
    "a shape": (wider, r"down\.weight is float32 \(17, 24\) here and float32 \(16, 24\) there"),
    "a dtype": (lambda m: m.half(), r"down\.weight is float16 .* here and float32 .* there"),
    "more": (lambda m: m.add_module("x", nn.Linear(1, 1)), "was trained beside has no x.bias"),
    "less": (lambda m: delattr(m, "volume"), "the model has no volume.bias"),
    "statistics": (lambda m: m.norm.running_mean.add_(1), r"norm\.running_mean has other values"),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_another_base_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = OTHER_BASES[case]
    _, adapter = adapted()
    adapter.save(tmp_path / "a")
    other = network()
    change(other)
    before = state_of(other)
    with pytest.raises(ValueError, match=message):
        rewire.load_adapter(other, tmp_path / "a")
    assert same(other, before)
    assert all(p.requires_grad for p in other.parameters())


def test_a_base_of_another_precision_on_demand(tmp_path: Path) -> None:
    model, adapter = adapted(train=())
    adapter.save(tmp_path / "a")
    other = network(torch.bfloat16)
    again = rewire.load_adapter(other, tmp_path / "a", check_base=False)
    assert all(pool.dtype == torch.float32 for pool in again.differences.values())
    exact = network(torch.float64)
    wide = rewire.load_adapter(exact, tmp_path / "a", check_base=False)
    assert all(pool.dtype == torch.float64 for pool in wide.differences.values())
    assert torch.allclose(output(exact).float(), output(model), atol=1e-4)
    small = nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match="has a difference for down, which the model does not have"
    ):
        rewire.load_adapter(small, tmp_path / "a", check_base=False)


def test_a_model_that_has_become_narrow_since(tmp_path: Path) -> None:
    """Its file belongs to the narrow base."""
    model, adapter = adapted()
    model.bfloat16()
    adapter.save(tmp_path / "a")
    other = network(torch.bfloat16)
    rewire.load_adapter(other, tmp_path / "a")
    assert same(other, state_of(model))
    assert same(adapter.detach(), state_of(network(torch.bfloat16)))
    with pytest.raises(ValueError, match=r"is float32 .* here and bfloat16 .* there"):
        rewire.load_adapter(network(), tmp_path / "a")


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(FileNotFoundError):
        rewire.load_adapter(network(), path)
    tensor_file.write(path, {"x": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"^\S+ is no adapter"):
        rewire.load_adapter(network(), path)
    _, adapter = adapted()
    adapter.save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S+ is damaged: sha256"):
        rewire.load_adapter(network(), path)


def test_a_difference_that_is_no_topology_is_refused(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save(tmp_path / "a")
    tensors, metadata = tensor_file.read(tmp_path / "a")
    tensors["up.difference.weight.rows"][0] = 99
    metadata["sha256"] = tensor_file.content_sha256(tensors, metadata)
    tensor_file.write(tmp_path / "a", tensors, metadata)
    other = network()
    before = state_of(other)
    with pytest.raises(ValueError, match=r"^the difference beside up\.weight in \S+: .*99"):
        rewire.load_adapter(other, tmp_path / "a")
    assert same(other, before)
    assert all(p.requires_grad for p in other.parameters())


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = adapted()
    adapter.save(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    with torch.no_grad():
        model.up.difference.weight.values.add_(1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        adapter.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["set", "rigl", "deep-r"])
def test_training_goes_on_from_a_file_to_the_same_bits(tmp_path: Path, name: str) -> None:
    """The file, the states of optimizer and method: nothing of the size of the base."""

    def steps(model: Any, optimizer: Any, method: Any, numbers: range) -> None:
        for number in numbers:
            x = ids().roll(number, 0)
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
            method.step()

    def start(adapter: rewire.Adapter) -> tuple[Any, Any, Any]:
        optimizer = torch.optim.Adam(adapter.parameters(), 0.02)
        options = {} if name == "deep-r" else {"every": 3}
        model = adapter.model
        return model, optimizer, rewire.methods.create(name, model, optimizer, seed=1, **options)

    adapter = rewire.adapt(network(), density=0.1, train="norm.*")
    model, optimizer, method = start(adapter)
    steps(model, optimizer, method, range(7))
    adapter.save(tmp_path / "a")
    torch.save((optimizer.state_dict(), method.state_dict()), tmp_path / "rest")
    steps(model, optimizer, method, range(7, 14))

    again = start(rewire.load_adapter(network(), tmp_path / "a"))
    rest = torch.load(tmp_path / "rest")
    again[1].load_state_dict(rest[0])
    again[2].load_state_dict(rest[1])
    steps(*again, range(7, 14))
    assert method.stats()["updates"] > 2
    assert same(again[0], state_of(model))


# --- merging and taking off -----------------------------------------------------------------------


def untied() -> Any:
    model = network()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_adds_and_unmerging_gives_the_bits_back(dtype: torch.dtype) -> None:
    model = untied().to(dtype)
    model.picture.to(memory_format=torch.channels_last)
    before = state_of(model)
    parameters = dict(model.named_parameters())
    kinds = [type(module) for module in model.modules()]
    adapter = rewire.adapt(model, density=0.2)
    with torch.no_grad():
        for pool in adapter.differences.values():
            pool.values.normal_(generator=torch.Generator().manual_seed(3))
    dense = {name: pool.to_dense().detach() for name, pool in adapter.differences.items()}
    state, out = state_of(model), output(model)
    assert adapter.merge() is model
    assert adapter.state == "merged"
    assert kinds == [type(module) for module in model.modules()]
    assert all(model.get_parameter(n) is p and p.requires_grad for n, p in parameters.items())
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        expected = value
        if layer in dense and name.endswith(".weight"):
            expected = (value.float() + dense[layer]).to(dtype)
        assert torch.equal(now[name], expected), name
    scale = 1e-5 if dtype == torch.float32 else 0.05
    assert (output(model) - out).abs().max() < scale * out.abs().max()
    for call in (adapter.merge, lambda: adapter.save("x"), lambda: adapter.load("x")):
        with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\)"):
            call()
    assert adapter.unmerge() is model
    assert same(model, state)
    assert not any(p.requires_grad for p in parameters.values())
    adapter.merge()
    assert same(adapter.detach(), before)
    assert all(p.requires_grad for p in parameters.values())
    with pytest.raises(RuntimeError, match="the adapter is detached"):
        adapter.merge()


def test_what_has_changed_since_a_merge_is_not_taken_back() -> None:
    model = untied()
    adapter = rewire.adapt(model, density=0.2)
    train(model, adapter)
    adapter.merge()
    with torch.no_grad():
        model.up.weight.mul_(2)
    for call in (adapter.unmerge, adapter.detach):
        with pytest.raises(ValueError, match="up has changed since the merge"):
            call()
    assert adapter.state == "merged"


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def forward(model: Any) -> None:
    own = model.up.forward
    model.up.forward = lambda x: own(x)


STAY: dict[str, tuple[Callable[[Any], Any], str]] = {
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.up, "weight", Doubled()),
        "^up is a ParametrizedAdaptedLinear now",
    ),
    "forward": (forward, "^up has a forward of its own"),
    "replaced": (
        lambda m: setattr(m.up, "difference", copy.deepcopy(m.up.difference)),
        "^up is a AdaptedLinear now",
    ),
}


@pytest.mark.parametrize("case", STAY)
def test_what_cannot_be_taken_off_stays_as_it_is(tmp_path: Path, case: str) -> None:
    change, message = STAY[case]
    model = untied()
    adapter = rewire.adapt(model, density=0.2)
    adapter.save(tmp_path / "a")
    change(model)
    before = state_of(model)
    for call in (adapter.merge, adapter.detach, lambda: adapter.load(tmp_path / "a")):
        with pytest.raises(ValueError, match=message):
            call()
    assert same(model, before)


def test_a_method_lets_go_before(tmp_path: Path) -> None:
    model = untied()
    adapter = rewire.adapt(model, density=0.2)
    adapter.save(tmp_path / "a")
    method = rewire.methods.SET(model, torch.optim.SGD(adapter.parameters(), 0.1))
    for call, name in (
        (adapter.merge, r"merge\(\)"),
        (adapter.detach, r"detach\(\)"),
        (lambda: adapter.load(tmp_path / "a"), "loading another adapter"),
    ):
        with pytest.raises(ValueError, match=rf"rewires \S+: call its finalize\(\) before {name}"):
            call()
    method.finalize()
    adapter.merge()
