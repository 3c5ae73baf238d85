"""`SparseMultiheadAttention`: the twin of `torch.nn.MultiheadAttention` with a connection
budget.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire import ops
from rewire.nn.layers.allot import Connections, Density, allot
from rewire.nn.layers.base import autocast_dtype
from rewire.nn.layers.initial import Init, check_init, draw_values
from rewire.nn.layers.linear import SparseLinear, input_dtype, product
from rewire.nn.weight.pool import SparseWeight
from rewire.nn.weight.twin import Twin

__all__ = ["SparseMultiheadAttention"]


class SparseMultiheadAttention(Twin):
    """Multi-head attention whose projections have a connection budget.

    Arguments are those of `torch.nn.MultiheadAttention`, plus:
        connections, density: the budget, exactly one of them. A number counts for all weights
            together and is spread over them by ``distribution``; a list (in the order of
            `weight_shapes`) or a dict (by weight name) has one for each.
        distribution: "erk", "er" or "uniform", see `rewire.budget`.
        generator: draws topology and values; torch's default generator otherwise.
        init: how large the first values are: "auto", "dense" or "sparse", see `reset_parameters`.

    ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight`` are a `SparseWeight` each, even where
    PyTorch stacks the three in one matrix; ``out_proj`` is a `SparseLinear`; ``in_proj_bias``,
    ``bias_k``, ``bias_v`` are as in PyTorch. Equal to the twin with the weights of ``to_dense()``
    up to rounding. Refuses nested tensors, which PyTorch supports only in a fused kernel for dense
    weights.

    Cost: O(K positions) for the projections. Attention itself costs what it costs in PyTorch;
    without ``need_weights`` it is `scaled_dot_product_attention`.
    """

    #: PyTorch's Transformer layers read these two to decide on their fused kernels for dense
    #: weights.
    _qkv_same_embed_dim = False
    in_proj_weight: None = None

    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    q_proj_weight: SparseWeight
    k_proj_weight: SparseWeight
    v_proj_weight: SparseWeight

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        generator: torch.Generator | None = None,
        init: Init = "auto",
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} must be a positive multiple of num_heads={num_heads}"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability between 0 and 1, not {dropout}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        counts = allot(self.weight_shapes(), connections, density, distribution)
        for name, shape in self.weight_shapes().items():
            made: Any = {"generator": generator, "device": device, "dtype": dtype}
            if name == "out_proj.weight":
                made |= {"connections": counts[name], "init": init}
                self.out_proj = SparseLinear(*shape, bias, contiguous_output=True, **made)
            else:
                setattr(self, name, SparseWeight(shape, counts[name], **made))
        biases: tuple[tuple[str, bool, tuple[int, ...]], ...] = (
            ("in_proj_bias", bias, (3 * embed_dim,)),
            ("bias_k", add_bias_kv, (1, 1, embed_dim)),
            ("bias_v", add_bias_kv, (1, 1, embed_dim)),
        )
        for name, wanted, size in biases:
            blank = torch.zeros(size, device=device, dtype=self.q_proj_weight.dtype)
            self.register_parameter(name, nn.Parameter(blank) if wanted else None)
        self.reset_parameters(generator, init=init)

    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the sparse weights by name (the order of a budget given as a list)."""
        e = self.embed_dim
        return {
            "q_proj_weight": (e, e),
            "k_proj_weight": (e, self.kdim),
            "v_proj_weight": (e, self.vdim),
            "out_proj.weight": (e, e),
        }

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, *, init: Init = "auto"
    ) -> None:
        """Draw values at PyTorch's scale (Glorot uniform for q, k, v), set biases to 0; the
        topology stays.

        ``init``: how this scale depends on the number of connections, see
        `rewire.nn.layers.initial.draw_values`.
        """
        if self.q_proj_weight.device.type == "meta":
            return
        e = self.embed_dim
        self.out_proj.reset_parameters(generator, init=init)
        self._reset_inputs(generator, init)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                bias.zero_()
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                extra.normal_(0, 1 / math.sqrt(e), generator=generator)

    @torch.no_grad()
    def reset_weights(
        self, generator: torch.Generator | None = None, *, init: Init = "auto"
    ) -> None:
        """As `reset_parameters`, but biases stay."""
        check_init(init)
        if self.q_proj_weight.device.type != "meta":
            self.out_proj.reset_weights(generator, init=init)
            self._reset_inputs(generator, init)

    def _reset_inputs(self, generator: torch.Generator | None, init: Init) -> None:
        e = self.embed_dim
        # If the inputs have one size, PyTorch stacks q, k and v in one matrix and draws it as one.
        rows = 3 * e if self.kdim == self.vdim == e else e
        for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if not weight.drawn:
                weight.draw(generator)
            draw_values(weight, math.sqrt(6 / (rows + weight.shape[1])), init, generator)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"batch_first={self.batch_first}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from L queries to S keys with their values.

        Args:
            query, key, value: (L, N, embed_dim), (S, N, kdim), (S, N, vdim); with ``batch_first``
                the batch N leads; or all without a batch.
            key_padding_mask: (N, S) or (S,).
            attn_mask: (L, S) or (N num_heads, L, S). Both masks are boolean (True: not allowed) or
                added to the scores.
            need_weights: return the attention weights too, per head unless
                ``average_attn_weights``.
            is_causal: a hint that ``attn_mask``, which must be given as well, is the causal mask.

        Returns the output, shaped as ``query``, and the weights (N, L, S), (N, num_heads, L, S) or
        None. Raises RuntimeError for shapes that do not fit.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise RuntimeError(
                "nested tensors are not supported: pad them and give key_padding_mask"
            )
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            dims = f"{query.dim()}-D, {key.dim()}-D and {value.dim()}-D"
            raise RuntimeError(
                f"query, key and value must all be 3-D (a batch) or all 2-D, not {dims}"
            )
        batch_first = self.batch_first and batched
        q, k, v = self._heads(query, key, value, batch_first)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        sources = k.shape[2]
        k, v = self._extended(k, v)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which must be given as well")
        # The hint replaces the mask if there is no other mask, and no position that was added.
        extra = k.shape[2] - sources
        hint = is_causal and not need_weights and key_padding_mask is None and not extra
        mask = None if hint else self._mask(attn_mask, key_padding_mask, q, sources, extra)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(2, 3)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            if dropout:
                weights = F.dropout(weights, dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, hint)
        batch, _, targets, _ = q.shape
        y = y.transpose(1, 2) if batch_first else y.permute(2, 0, 1, 3)
        y = self.out_proj(y.reshape(batch * targets, self.embed_dim))
        y = y.view(*((batch, targets) if batch_first else (targets, batch)), self.embed_dim)
        if not batched:
            y, weights = y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y, weights

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, (N, num_heads, positions, head_dim) each."""
        e = self.embed_dim
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(e)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for name, x, weight in zip(
            ("query", "key", "value"), (query, key, value), weights, strict=True
        ):
            if x.shape[-1] != weight.shape[1]:
                raise RuntimeError(
                    f"{name} has {x.shape[-1]} features, the layer takes {weight.shape[1]}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise RuntimeError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in positions or "
                "batch"
            )
        at = 0 if batch_first else 1
        if query.dim() == 3 and query.shape[at] != key.shape[at]:
            raise RuntimeError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} have different batch sizes"
            )
        runs: list[tuple[Tensor, Tensor]] = []
        heads = []
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
            # Products that share an input share one copy in the kernels' layout.
            laid_out = next((copy for original, copy in runs if original is x), None)
            if laid_out is None:
                laid_out = ops.for_products(x.reshape(-1, x.shape[-1]).to(_dtype(x, weight)))
                runs.append((x, laid_out))
            y = self._project(laid_out, weight, bias)
            lead = x.shape[:-1] if x.dim() == 3 else (x.shape[0], 1)
            y = y.view(*lead, self.num_heads, self.head_dim)
            heads.append(y.transpose(1, 2) if batch_first else y.permute(1, 2, 0, 3))
        return heads[0], heads[1], heads[2]

    def _project(self, x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
        """The product of ``x`` (positions, features) with one of the weights, row-major."""
        return product(x, weight, bias, contiguous_output=True)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with the positions that ``add_bias_kv`` and ``add_zero_attn`` add."""
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            k, v = (
                torch.cat([x, b.view(shape).expand(x.shape[0], -1, -1, -1).to(x.dtype)], 2)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, sources: int, extra: int
    ) -> Tensor | None:
        """Both masks as one to add to scores (N, num_heads, L, S + extra); None without masks."""
        batch, heads, targets, _ = q.shape
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, "attn_mask", q.dtype)
            if mask.shape not in ((targets, sources), (batch * heads, targets, sources)):
                raise RuntimeError(
                    f"attn_mask must have the shape {(targets, sources)} or "
                    f"{(batch * heads, targets, sources)}, not {tuple(mask.shape)}"
                )
            lead = (1, 1) if mask.dim() == 2 else (batch, heads)
            mask = mask.view(*lead, targets, sources)
        if padding is not None:
            if padding.shape != (batch, sources):
                raise RuntimeError(
                    f"key_padding_mask must cover {(batch, sources)}, not {tuple(padding.shape)}"
                )
            missing = _additive(padding, "key_padding_mask", q.dtype).view(batch, 1, 1, sources)
            mask = missing if mask is None else mask + missing
        return F.pad(mask, (0, extra)) if mask is not None and extra else mask


def _dtype(x: Tensor, weight: SparseWeight) -> torch.dtype:
    """The dtype of a product's input: autocast's, or that of x, which must be the weight's."""
    narrow = autocast_dtype(x, weight)
    return x.dtype if narrow is None else input_dtype(weight, narrow)


def _additive(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise RuntimeError(f"{name} must be boolean or floating-point, not {mask.dtype}")
    return mask.to(dtype)
