"""Attention for short sequences on a CPU: grouped key/value heads are never copied out.

transformers' ``eager`` and ``sdpa`` paths repeat every key/value head for the query heads that
share it, at every layer and decoding step. For responses of some tens of tokens these copies cost
more than the products. Here the query heads of a group are stacked instead (benchmarks in
docs/experiments.md). Registered under the name ``grouped``; models that need more than scaling and
a mask (soft-capping, sinks) are refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.autograd.function import once_differentiable

from iqstar.errors import InputError
from iqstar.padding_free import Line
from iqstar.precision import product_dtype

NAME = "grouped"
_MORE = ("softcap", "s_aux", "position_bias")
"""What some models hand over that changes the result."""


def warn_off_cpus(implementation: str | None, device: torch.device) -> None:
    """Warns where this attention is to run on a GPU: it is right there too, but never timed.

    Args:
        implementation: ``model.policy.attn_implementation``.
        device: The run's.
    """
    if implementation == NAME and device.type != "cpu":
        rank_zero_warn(
            f"model.policy.attn_implementation: {NAME} is for CPUs, and this run is on {device}; "
            "null leaves the choice to transformers, whose kernels are made for it"
        )


def grouped_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads queries size"],
    key: Float[Tensor, "batch groups keys size"],
    value: Float[Tensor, "batch groups keys size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    line: Line | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling + mask)·v, the softmax in float32.

    Naive equivalent: ``eager`` attention on ``key.repeat_interleave(heads // groups, dim=1)`` and
    the values likewise.

    Args:
        module: The attention layer; its number tells what of a line's past is its own.
        query: Queries.
        key: Keys, one per group of query heads.
        value: Values, likewise.
        attention_mask: Additive, ``(batch, 1, queries, keys)``; None for none.
        scaling: Factor on the products; 1/√size by default.
        dropout: Must be 0: scoring and sampling have to agree.
        line: Where queries, keys and values are one line of tokens, how they lie in rows; the
            output is a line again, and ``batch`` 1.
        kwargs: What else transformers hands over.

    Returns:
        The output, ``(batch, queries, heads, size)``, and no weights.

    Raises:
        InputError: If the model asks for what is not implemented.
    """
    if dropout or any(kwargs.get(name) is not None for name in _MORE):
        raise InputError(
            f"model.policy.attn_implementation: {NAME!r} has no dropout, soft-capping, sinks or "
            "biases; use 'eager' or 'sdpa' for this model"
        )
    query, key, value = (x.to(product_dtype(x)) for x in (query, key, value))
    attend = partial(_in_rows, scaling=query.shape[3] ** -0.5 if scaling is None else scaling)
    if line is not None:
        return line.attend(module, attend, query, key, value), None
    return attend(query, key, value, attention_mask).transpose(1, 2).contiguous(), None


def _in_rows(
    query: Float[Tensor, "batch heads queries size"],
    key: Float[Tensor, "batch groups keys size"],
    value: Float[Tensor, "batch groups keys size"],
    mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, "batch heads queries size"]:
    """Attention, the query heads of a group stacked."""
    groups = key.shape[1]
    stacked = query.unflatten(1, (groups, query.shape[1] // groups)).contiguous()
    if mask is not None:
        mask = mask[:, :, None, :, : key.shape[2]]
    attend = _Attention.apply if torch.is_grad_enabled() else _attend
    output: Tensor = attend(stacked, key, value, mask, scaling)
    return output.flatten(1, 2)


class _Attention(torch.autograd.Function):
    """Attention of stacked query heads; keeps queries, keys and values, and no weights.

    The backward pass computes the weights again: their products are few beside those of the linear
    layers, and there are as many of them as queries times keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "batch groups share queries size"],
        key: Float[Tensor, "batch groups keys size"],
        value: Float[Tensor, "batch groups keys size"],
        mask: Tensor | None,
        scaling: float,
    ) -> Float[Tensor, "batch groups share queries size"]:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling = scaling
        return _attend(query, key, value, mask, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        weights = _weights(query, key, mask, ctx.scaling).to(value.dtype)
        rows = grad.flatten(2, 3)
        grad_value = torch.matmul(weights.flatten(2, 3).transpose(2, 3), rows)
        grad_weights = torch.matmul(rows, value.transpose(2, 3)).view_as(weights)
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_weights, weights = grad_weights.to(wide), weights.to(wide)
        inner = torch.linalg.vecdot(grad_weights, weights).unsqueeze(-1)
        grad_scores = grad_weights.sub_(inner).mul_(weights).mul_(ctx.scaling)
        flat = grad_scores.to(query.dtype).flatten(2, 3)
        grad_query = torch.matmul(flat, key).view_as(query)
        grad_key = torch.matmul(flat.transpose(2, 3), query.flatten(2, 3))
        return grad_query, grad_key, grad_value, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    weights = _weights(query, key, mask, scaling).to(value.dtype)
    return torch.matmul(weights.flatten(2, 3), value).view_as(query)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(q·kᵀ·scaling + mask), in float32 at least."""
    scores = torch.matmul(query.flatten(2, 3), key.transpose(2, 3))
    scores = scores.view(*query.shape[:-1], key.shape[2]) * scaling
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def register() -> None:
    """Makes ``attn_implementation="grouped"`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
