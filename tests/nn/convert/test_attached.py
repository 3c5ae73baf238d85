"""What PyTorch and its users attach to layers: kept by sparsify, to_sparse and densify, or refused
in words.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from rewire.budget import Limits
from rewire.nn import densify, sparsify, to_sparse
from rewire.nn.convert.kinds import sparse_kind_of
from twins import NAMES, connections, kind, output
from wrapped_layers import wrapped


def random_masks(layer: nn.Module, name: str, density: float = 0.5) -> dict[str, Tensor]:
    masks = {}
    for path, weight in kind(name).weights(layer).items():
        mask = torch.rand(weight.shape) < density
        mask.view(-1)[0] = True
        masks[path] = mask
    return masks


#: Ways from a dense model to a sparse one, and back again.
WAYS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "sparsify": lambda m, name: sparsify(m, density=0.5, distribution="uniform"),
    "magnitude": lambda m, name: sparsify(
        m, density=0.5, distribution="uniform", select="magnitude"
    ),
    "to_sparse": lambda m, name: to_sparse(
        m,
        {f"layer.{p}": mask for p, mask in random_masks(m["layer"], name).items()},  # type: ignore[index]
    ),
    "densify": lambda m, name: densify(sparsify(m, density=0.5, distribution="uniform")),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_hooks_stay_and_so_do_their_handles(name: str, way: str) -> None:
    model, args = wrapped(name)
    layer, seen = model["layer"], []  # type: ignore[index, var-annotated]
    modules: dict[str, nn.Module] = {}

    def hook(what: str) -> Callable[..., None]:
        def call(module: nn.Module, *rest: Any) -> None:
            seen.append(what)
            modules[what] = module

        return call

    handles = {
        "pre": layer.register_forward_pre_hook(hook("pre")),
        "pre, kwargs": layer.register_forward_pre_hook(hook("pre, kwargs"), with_kwargs=True),
        "forward": layer.register_forward_hook(hook("forward")),
        "forward, kwargs": layer.register_forward_hook(hook("forward, kwargs"), with_kwargs=True),
        "always": layer.register_forward_hook(hook("always"), always_call=True),
        "backward pre": layer.register_full_backward_pre_hook(hook("backward pre")),
        "backward": layer.register_full_backward_hook(hook("backward")),
        "state": layer.register_state_dict_post_hook(hook("state")),
        "state pre": layer.register_state_dict_pre_hook(hook("state pre")),
        "load pre": layer.register_load_state_dict_pre_hook(hook("load pre")),
        "load": layer.register_load_state_dict_post_hook(hook("load")),
    }
    model = WAYS[way](model, name)
    new = model["layer"]  # type: ignore[index]
    assert new is not layer

    def run() -> set[str]:
        seen.clear()
        y = model(*(a.clone().requires_grad_() for a in args))
        (y[0] if isinstance(y, tuple) else y).sum().backward()
        model.load_state_dict(model.state_dict())
        return set(seen)

    assert run() == set(handles)
    assert all(module is new for module in modules.values())
    seen.clear()
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        model(torch.zeros(1, 1, 1, 1, 1, 1, 1), *args[1:])
    assert "always" in seen
    for what in list(handles):
        handles.pop(what).remove()
        assert run() == set(handles)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_modes_and_what_users_set_stay(name: str, way: str) -> None:
    model, args = wrapped(name)
    model = model.double()
    layer: Any = model["layer"]  # type: ignore[index]
    others = {n: p for n, p in layer.named_parameters() if "bias" in n}
    gradients: list[str] = []
    first, last = next(iter(others)), list(others)[-1]
    others[first].requires_grad_(first == last)
    others[last].register_hook(lambda g: gradients.append(last))
    weights = kind(name).weights(layer)
    for place, attribute in kind(name).places(layer).values():
        if attribute != "in_proj_weight":
            getattr(place, attribute).requires_grad_(attribute != "weight_hh_l0")
    frozen = {p for p in weights if not weights[p].requires_grad}
    layer.eval()
    layer.lr_scale, layer.tags, layer.parent = 0.1, {"a": 1}, None
    layer.__dict__["parent"] = model  # no child
    layer.register_buffer("steps", torch.tensor(3))
    layer.register_buffer("scratch", torch.tensor(4.0), persistent=False)
    layer.register_parameter("temperature", nn.Parameter(torch.ones(2)))
    layer.adapter = nn.Linear(2, 2)
    kept = (layer.tags, layer.steps, layer.scratch, layer.temperature, layer.adapter)
    model = WAYS[way](model, name)
    new: Any = model["layer"]  # type: ignore[index]
    assert new is not layer
    for n, p in others.items():
        assert new.get_parameter(n) is p
    assert new.lr_scale == 0.1
    assert new.parent is model
    assert all(
        a is b
        for a, b in zip(
            kept, (new.tags, new.steps, new.scratch, new.temperature, new.adapter), strict=True
        )
    )
    assert {"steps", "temperature", "adapter.weight"} <= set(new.state_dict())
    assert "scratch" not in new.state_dict()
    assert [model.training, new.adapter.training] == [True, True]
    assert not any(m.training for m in new.modules() if m is not new.adapter)
    assert others[first].requires_grad == (len(others) == 1)
    for path in weights:
        if sparse_kind_of(new) is not None:
            p = new.get_parameter(f"{path}.values")
            assert p.requires_grad == (path not in frozen)
            assert p.dtype == torch.float64
    output(new, tuple(a.double() for a in args)).sum().backward()
    assert gradients == [last]


def test_shared_layers_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {"a": layer, "b": nn.Sequential(layer, nn.ReLU()), "c": nn.ModuleList([layer])}
    )
    for change in (
        lambda m: sparsify(m, density=0.5),
        densify,
        lambda m: to_sparse(m, {"a": torch.eye(4).bool()}),
    ):
        change(model)
        assert model["a"] is model["b"][0] is model["c"][0]  # type: ignore[index]


# --- refusals ------------------------------------------------------------------------------------


def conflicting(
    change: Callable[[nn.Sequential], Any],
) -> Callable[[], tuple[nn.Module, Callable[[nn.Module], Any]]]:
    def build() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        prune.l1_unstructured(model[0], "weight", 0.5)
        return model, change

    return build


def _prepared(
    prepare: Callable[[nn.Sequential], Any], change: Callable[[nn.Module], Any] | None = None
) -> Any:
    def build() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(model)
        return model, change or (lambda m: sparsify(m, density=0.5))

    return build


def _attention(prepare: Callable[[nn.MultiheadAttention], Any]) -> Any:
    def build() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(4, 4)})
        prepare(model["a"])  # type: ignore[arg-type]
        return model, lambda m: sparsify(m, density=0.5)

    return build


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def lazy(model: nn.Sequential) -> None:
    model[0] = nn.LazyLinear(8)


def forward(model: nn.Sequential) -> None:
    own = model[0].forward
    model[0].forward = lambda x: own(x) + 1


def quantized(model: nn.Sequential) -> None:
    model[2] = torch.ao.nn.quantized.dynamic.Linear(8, 2)


def fill(model: nn.Sequential) -> None:
    model[0].weight_mask.fill_(0.5)


def sparse_first(prepare: Callable[[nn.Module], Any]) -> Any:
    return _prepared(lambda m: (sparsify(m, density=0.5), prepare(m)), densify)


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, Callable[[nn.Module], Any]]], str]] = {
    "nothing": (_prepared(lambda m: None, sparsify), "no layer has a prune mask"),
    "nothing to cut": (_prepared(lambda m: None, to_sparse), r"no mask.*torch\.nn\.utils\.prune"),
    "density": (
        conflicting(lambda m: sparsify(m, density={"0": 0.3})),
        r"0\.weight keep 24 .*with 14, what .*prune\.remove",
    ),
    "connections": (
        conflicting(lambda m: sparsify(m, connections={"0": 25})),
        "keep 24 connections",
    ),
    "too few": (
        conflicting(lambda m: sparsify(m, density=0.3)),
        "keep 24 .*together with other weights",
    ),
    "mask": (
        conflicting(lambda m: to_sparse(m, {"0": torch.ones(8, 6).bool()})),
        "not the prune mask that it has",
    ),
    "limits": (
        conflicting(lambda m: sparsify(m, limits=Limits(fan_in=1))),
        r"prune mask of "
        r"0\.weight does "
        r"not keep",
    ),
    "soft mask": (
        _prepared(lambda m: (prune.l1_unstructured(m[0], "weight", 0.5), fill(m)), sparsify),
        "other entries than 0 and 1",
    ),
    "weight norm": (
        _prepared(lambda m: parametrizations.weight_norm(m[0])),
        "^0 has a parametrization of weight",
    ),
    "orthogonal": (
        _prepared(lambda m: parametrizations.orthogonal(m[2])),
        "^2 has a .*_Orthogonal.*remove_param",
    ),
    "spectral norm": (
        _prepared(lambda m: parametrizations.spectral_norm(m[0])),
        "^0 has a .*_SpectralNorm",
    ),
    "custom": (
        _prepared(lambda m: parametrize.register_parametrization(m[0], "weight", Doubled())),
        r"^0 has a parametrization of weight \(Doubled\)",
    ),
    "custom, cut": (
        _prepared(
            lambda m: parametrize.register_parametrization(m[0], "weight", Doubled()),
            lambda m: to_sparse(m, {"0.weight": torch.ones(8, 6).bool()}),
        ),
        r"^0 has a parametrization of weight \(Doubled\)",
    ),
    "custom bias": (
        _prepared(lambda m: parametrize.register_parametrization(m[0], "bias", Doubled())),
        r"^0 has a parametrization of bias",
    ),
    "old weight norm": (
        _prepared(lambda m: nn.utils.weight_norm(m[0])),
        "^0 computes its weight by WeightNorm.*remove_we",
    ),
    "old spectral norm": (
        _prepared(lambda m: nn.utils.spectral_norm(m[2])),
        "^2 computes .*remove_spectral_norm",
    ),
    "attention": (
        _attention(lambda a: parametrize.register_parametrization(a.out_proj, "weight", Doubled())),
        "^a has a Parametrized.* for its out_proj",
    ),
    "attention's weight": (
        _attention(lambda a: parametrize.register_parametrization(a, "in_proj_weight", Doubled())),
        r"^a has a parametrization of in_proj_weight",
    ),
    "attention's projection": (
        _attention(lambda a: setattr(a, "out_proj", nn.Identity())),
        "^a has a Identity for its out_proj",
    ),
    "lazy": (_prepared(lazy), "^0 is a LazyLinear.*run the model once"),
    "quantized": (_prepared(quantized), "^2 is a quantized Linear"),
    "forward": (_prepared(forward), "^0 has a forward of its own"),
    "compiled": (_prepared(lambda m: m[0].compile()), r"^0 was compiled"),
    "gradient hook": (
        _prepared(lambda m: m[2].weight.register_hook(lambda g: g)),
        r"^2\.weight has a hook on its gradient.*2\.weight\.values",
    ),
    "accumulation hook": (
        _prepared(lambda m: m[0].weight.register_post_accumulate_grad_hook(lambda p: None)),
        r"^0\.weight has a hook",
    ),
    "gradient hook, cut": (
        _prepared(
            lambda m: m[0].weight.register_hook(lambda g: g),
            lambda m: to_sparse(m, {"0": torch.ones(8, 6).bool()}),
        ),
        r"^0\.weight has a hook",
    ),
    "no numbers": (
        _prepared(lambda m: m.insert(0, nn.Linear(0, 6))),
        r"^0\.weight has the shape "
        r"\(6, 0\)",
    ),
    "complex": (_prepared(lambda m: m.to(torch.complex64)), r"^0\.weight is torch\.complex64"),
    "meta": (
        _prepared(lambda m: m.to("meta"), lambda m: sparsify(m, density=0.5, select="magnitude")),
        r"^0\.weight is on the meta device",
    ),
    "name": (
        _prepared(lambda m: setattr(m[0], "from_weight", 1)),
        "given 'from_weight', a name that SparseLinear uses",
    ),
    "sparse, bias": (
        sparse_first(lambda m: parametrize.register_parametrization(m[0], "bias", Doubled())),
        r"^0 has a parametrization of bias",
    ),
    "sparse, pruned": (
        sparse_first(lambda m: prune.l1_unstructured(m[0].weight, "values", 0.5)),
        r"^0\.weight\.values is not a parameter",
    ),
    "sparse, hook": (
        sparse_first(lambda m: m[0].weight.values.register_hook(lambda g: g)),
        r"^0\.weight\.values has a hook on its gradient",
    ),
    "sparse, forward": (sparse_first(forward), "^0 has a forward of its own"),
    "sparse, pool's hook": (
        sparse_first(lambda m: m[0].weight.register_state_dict_pre_hook(lambda *a: None)),
        r"the pool 0\.weight itself has hooks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name_before_anything_changes(case: str) -> None:
    build, message = REFUSED[case]
    model, change = build()
    modules, parameters = list(model.modules()), list(model.parameters())
    hooks = [list(m._forward_pre_hooks) for m in modules]
    with pytest.raises(ValueError, match=message):
        change(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert hooks == [list(m._forward_pre_hooks) for m in modules]


def test_what_is_not_meant_is_not_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LazyLinear(4), nn.Linear(8, 2))
    parametrizations.weight_norm(model[0])
    sparsify(model, density=0.5, exclude=["0", "1"])
    assert parametrize.is_parametrized(model[0])
    assert connections(model) == 8
    parametrize.remove_parametrizations(model[0], "weight")
    sparsify(model, density={"0": 0.5})
    assert connections(model) == 32
