"""Attention for short sequences on a CPU: grouped key/value heads are never copied out.

transformers' ``eager`` and ``sdpa`` paths repeat every key/value head for the query heads that
share it, at every layer and decoding step. For responses of some tens of tokens these copies cost
more than the products. Here the query heads of a group are stacked instead (benchmarks in
docs/experiments.md). Registered under the name ``grouped``; models that need more than scaling and
a mask (soft-capping, sinks) are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from iqstar.errors import InputError

NAME = "grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads queries size"],
    key: Float[Tensor, "batch groups keys size"],
    value: Float[Tensor, "batch groups keys size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling + mask)·v, the softmax in float32.

    Naive equivalent: ``eager`` attention on ``key.repeat_interleave(heads // groups, dim=1)`` and
    the values likewise.

    Args:
        module: The attention layer (unused but for its interface).
        query: Queries.
        key: Keys, one per group of query heads.
        value: Values, likewise.
        attention_mask: Additive, ``(batch, 1, queries, keys)``; None for none.
        scaling: Factor on the products; 1/√size by default.
        dropout: Must be 0: scoring and sampling have to agree.
        kwargs: What else transformers hands over.

    Returns:
        The output, ``(batch, queries, heads, size)``, and no weights.

    Raises:
        InputError: If the model asks for what is not implemented.
    """
    if dropout or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise InputError(
            f"model.policy.attn_implementation: {NAME!r} has no dropout, soft-capping or sinks; "
            "use 'eager' or 'sdpa' for this model"
        )
    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    share = heads // groups
    stacked = query.reshape(batch, groups, share * queries, size)
    scores = torch.matmul(stacked, key.transpose(2, 3)).view(batch, groups, share, queries, keys)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :keys]
    weights = _Softmax.apply(scores, value.dtype).view(batch, groups, share * queries, keys)
    output = torch.matmul(weights, value).view(batch, heads, queries, size)
    return output.transpose(1, 2).contiguous(), None


class _Softmax(torch.autograd.Function):
    """Softmax in float32 at least; keeps its result as it is handed on, not that in float32."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=wide).to(dtype)
        ctx.save_for_backward(weights)
        ctx.wide, ctx.dtype = wide, scores.dtype
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weights = ctx.saved_tensors[0].to(ctx.wide)
        grad = grad.to(ctx.wide)
        inner = torch.linalg.vecdot(grad, weights).unsqueeze(-1)
        return ((grad - inner) * weights).to(ctx.dtype), None


def register() -> None:
    """Makes ``attn_implementation="grouped"`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
