"""The layer types that `sparsify` and `densify` convert: one entry for each, with both
directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rewire.nn.layers.attention import SparseMultiheadAttention
from rewire.nn.layers.base import SparseLayer
from rewire.nn.layers.conv import SparseConv1d, SparseConv2d, SparseConv3d
from rewire.nn.layers.frozen import Frozen
from rewire.nn.layers.linear import SparseLinear
from rewire.nn.layers.recurrent import SparseGRU, SparseLSTM, SparseRNN
from rewire.nn.weight.pool import SparseWeight

__all__ = ["KINDS", "Kind", "join", "kind_of", "sparse_kind_of"]

Counts = Mapping[str, int]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Kind:
    """A dense layer type and its sparse twin.

    Attributes:
        dense, sparse: the two classes.
        names: (dense layer) -> the names of its tensors that become sparse weights, by the names
            that these have in the sparse layer. If several have the same tensor, it stacks them
            along its rows.
        sizes: first arguments of both classes for the smallest layer.
        to_sparse: (dense layer, connections of each weight, generator) -> a sparse layer with a
            random topology, fresh values, and copies of the other parameters (biases).
        to_dense: sparse layer -> the dense layer that computes the same.
    """

    dense: type[nn.Module]
    sparse: type[nn.Module]
    names: Callable[[Any], dict[str, str]]
    sizes: tuple[int, ...]
    to_sparse: Callable[[Any, Counts, torch.Generator | None], nn.Module]
    to_dense: Callable[[Any], nn.Module]

    def plain(self) -> nn.Module:
        """A fresh dense layer without values; what other layers have beyond it was added to
        them.
        """
        return self.dense(*self.sizes, device="meta")

    def plain_sparse(self) -> nn.Module:
        """The same of the sparse class."""
        make: Any = self.sparse
        made: nn.Module = make(*self.sizes, density=1.0, device="meta")
        return made

    def places(self, layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        """Module and attribute of each weight of a dense layer, by the name of the sparse
        weight.
        """
        found = {}
        for path, name in self.names(layer).items():
            parent, _, leaf = name.rpartition(".")
            found[path] = layer.get_submodule(parent), leaf
        return found

    def weights(self, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors of a dense layer that become sparse weights, by the names of these; views of
        tensors that stack several.
        """
        places = self.places(layer).items()
        return {path: self.part(layer, path, getattr(*place)) for path, place in places}

    def part(self, layer: nn.Module, path: str, tensor: Tensor) -> Tensor:
        """The part for one weight of a tensor that has the shape of the parameter."""
        names = self.names(layer)
        stacked = [other for other, name in names.items() if name == names[path]]
        return tensor if len(stacked) == 1 else tensor.chunk(len(stacked))[stacked.index(path)]


def join(layer: str, name: str) -> str:
    """The full name of something in a layer; the layer named "" is the model itself."""
    return f"{layer}.{name}" if layer and name else layer or name


def kind_of(layer: nn.Module) -> Kind | None:
    """The entry of a dense layer; None for subclasses too, because their forward may differ."""
    if type(layer) is nn.MultiheadAttention and type(layer.out_proj) not in _OUTPUTS:
        return None
    return next((kind for kind in KINDS if type(layer) is kind.dense), None)


def sparse_kind_of(layer: nn.Module) -> Kind | None:
    """The entry of a sparse layer; None for a frozen one, which cannot be converted back."""
    if isinstance(layer, Frozen):
        return None
    return next((kind for kind in KINDS if isinstance(layer, kind.sparse)), None)


def _copy(targets: nn.Module, sources: nn.Module, *names: str) -> None:
    """Copy the values of the parameters of these names, as far as they exist."""
    there = dict(targets.named_parameters())
    here = dict(sources.named_parameters())
    with torch.no_grad():
        for name in names:
            if name in here:
                there[name].copy_(here[name])


def _like(weight: Any) -> dict[str, Any]:
    return {"device": weight.device, "dtype": weight.dtype}


def _blank(like: SparseWeight, make: Callable[..., Module], *args: Any, **kwargs: Any) -> Module:
    """A dense layer on the device of ``like``, without values: drawing them would be wasted."""
    made = make(*args, **kwargs, device="meta", dtype=like.dtype)
    return made.to_empty(device=like.device)


# --- layers of one weight -------------------------------------------------------------------------


def _layer_kind(
    dense: type[nn.Module],
    sparse: type[SparseLayer],
    sizes: tuple[str, ...],
    settings: tuple[str, ...] = (),
) -> Kind:
    """The entry of a type with one weight and perhaps a bias.

    sizes: first arguments of both classes. settings: further ones, by keyword. Layers have
    attributes of the same names.
    """

    def arguments(layer: Any) -> dict[str, Any]:
        given = {name: getattr(layer, name) for name in (*sizes, *settings)}
        return given | {"bias": layer.bias is not None}

    def to_sparse(layer: nn.Module, counts: Counts, generator: torch.Generator | None) -> nn.Module:
        make: Any = sparse
        drawn = {"connections": counts["weight"], "generator": generator}
        made: nn.Module = make(**arguments(layer), **_like(layer.weight), **drawn)
        _copy(made, layer, "bias")
        return made

    def to_dense(layer: SparseLayer) -> nn.Module:
        made: nn.Module = _blank(layer.weight, dense, **arguments(layer))
        with torch.no_grad():
            made.get_parameter("weight").copy_(layer.weight.to_dense())
        _copy(made, layer, "bias")
        return made

    return Kind(
        dense, sparse, lambda layer: {"weight": "weight"}, (1,) * len(sizes), to_sparse, to_dense
    )


_CONV = (
    ("in_channels", "out_channels", "kernel_size"),
    ("stride", "padding", "dilation", "groups", "padding_mode"),
)


# --- recurrent ------------------------------------------------------------------------------------

Recurrent = SparseRNN | SparseGRU | SparseLSTM


def _recurrent_weights(layer: nn.RNNBase) -> dict[str, str]:
    return {
        name: name for names in layer._all_weights for name in names if name.startswith("weight_")
    }


def _recurrent_arguments(layer: nn.RNNBase | Recurrent) -> dict[str, Any]:
    """The arguments of both constructors, without dropout, because a useless one would warn
    again.
    """
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional"]
    if isinstance(layer, nn.LSTM | SparseLSTM):
        names.append("proj_size")
    if isinstance(layer, nn.RNN | SparseRNN):
        names.append("nonlinearity")
    return {name: getattr(layer, name) for name in names}


def _recurrent_to_sparse(
    sparse: type[Recurrent],
) -> Callable[[nn.RNNBase, Counts, torch.Generator | None], nn.Module]:
    def to_sparse(
        layer: nn.RNNBase, counts: Counts, generator: torch.Generator | None
    ) -> nn.Module:
        given = _recurrent_arguments(layer) | _like(layer.weight_ih_l0)
        made = sparse(**given, connections=counts, generator=generator)
        made.dropout = layer.dropout
        _copy(made, layer, *made.bias_names())
        return made

    return to_sparse


def _recurrent_to_dense(dense: type[nn.RNNBase]) -> Callable[[Recurrent], nn.Module]:
    def to_dense(layer: Recurrent) -> nn.Module:
        weight = layer.get_submodule("weight_ih_l0")
        assert isinstance(weight, SparseWeight)
        made: nn.RNNBase = _blank(weight, dense, **_recurrent_arguments(layer))
        made.dropout = layer.dropout
        with torch.no_grad():
            for name in layer.weight_shapes():
                pool = layer.get_submodule(name)
                assert isinstance(pool, SparseWeight)
                made.get_parameter(name).copy_(pool.to_dense())
        _copy(made, layer, *layer.bias_names())
        return made

    return to_dense


# --- attention ------------------------------------------------------------------------------------

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_OUTPUTS = nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear
_ATTENTION_REST = ("in_proj_bias", "out_proj.bias", "bias_k", "bias_v")


def _attention_weights(layer: nn.MultiheadAttention) -> dict[str, str]:
    stacked = layer._qkv_same_embed_dim
    return {p: "in_proj_weight" if stacked else p for p in _PROJECTIONS} | {
        "out_proj.weight": "out_proj.weight"
    }


def _attention_arguments(layer: nn.MultiheadAttention | SparseMultiheadAttention) -> dict[str, Any]:
    names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
    return {name: getattr(layer, name) for name in names} | {
        "bias": layer.in_proj_bias is not None,
        "add_bias_kv": layer.bias_k is not None,
    }


def _sparse_attention(
    layer: nn.MultiheadAttention, counts: Counts, generator: torch.Generator | None
) -> SparseMultiheadAttention:
    given = _attention_arguments(layer) | _like(layer.out_proj.weight)
    made = SparseMultiheadAttention(**given, connections=counts, generator=generator)
    _copy(made, layer, *_ATTENTION_REST)
    return made


def _dense_attention(layer: SparseMultiheadAttention) -> nn.Module:
    made = _blank(layer.q_proj_weight, nn.MultiheadAttention, **_attention_arguments(layer))
    with torch.no_grad():
        for name, weight in _ATTENTION.weights(made).items():
            source = layer.get_submodule(name)
            assert isinstance(source, SparseWeight)
            weight.copy_(source.to_dense())
    _copy(made, layer, *_ATTENTION_REST)
    return made


_ATTENTION = Kind(
    nn.MultiheadAttention,
    SparseMultiheadAttention,
    _attention_weights,
    (1, 1),
    _sparse_attention,
    _dense_attention,
)

#: All layer types that can be converted.
KINDS: tuple[Kind, ...] = (
    _layer_kind(nn.Linear, SparseLinear, ("in_features", "out_features")),
    _layer_kind(nn.Conv1d, SparseConv1d, *_CONV),
    _layer_kind(nn.Conv2d, SparseConv2d, *_CONV),
    _layer_kind(nn.Conv3d, SparseConv3d, *_CONV),
    *(
        Kind(
            dense,
            sparse,
            _recurrent_weights,
            (1, 1),
            _recurrent_to_sparse(sparse),
            _recurrent_to_dense(dense),
        )
        for dense, sparse in ((nn.RNN, SparseRNN), (nn.GRU, SparseGRU), (nn.LSTM, SparseLSTM))
    ),
    _ATTENTION,
)
