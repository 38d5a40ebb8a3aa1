"""The LM head, chunk by chunk: distributions of frozen models, and losses with their gradient.

Hidden states at response tokens are small (tokens × dim), their logits are not (tokens × vocab):
only as many rows of logits exist at any time as fit into a budget of bytes. Since every token's
loss has its gradient as soon as its logits are known, :func:`head_loss` takes it in the forward
pass, so nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iqstar.precision import product_dtype

BUDGET = 64 * 2**20
"""Bytes that logits and what is computed from them may take on a CPU."""
BUDGET_ON_GPU = 8 * BUDGET
"""The same on a GPU, which needs larger products to be busy; an estimate, not measured."""
BLOCKS = 8
"""Parts in which a CPU computes the losses of a chunk: products want many rows, but what a loss
sets aside is best small, within the caches. A GPU computes them at once: it waits for launches."""
COPIES = 3.5
"""Arrays in float32 of a chunk's size that are held at once on a CPU: logits, target, half of one
by the loss of a block; the rest is for what the matrix products set aside."""
COPIES_ON_GPU = 7.0
"""The same on a GPU, where a loss sets aside four times its chunk."""

TargetFn = Callable[[Tensor], Tensor]
"""Token indices of a chunk → what its losses compare the logits with, ``(chunk, vocab)``."""
TokenLossFn = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor]]]
"""(logits of a block, its token indices, its target) → (loss per token, detached metrics)."""


@dataclass(frozen=True, kw_only=True)
class LanguageHead:
    """The map from hidden states to logits, at one temperature.

    Args:
        weight: The output embedding, ``(rows, dim)``.
        bias: Its bias, where the architecture has one.
        vocab_size: Rows that stand for a token; padded rows beyond are left out of every softmax.
        scale: Factor on the logits (Cohere's, Granite's).
        softcap: Bound of tanh soft-capping (Gemma's); 0 for none.
        temperature: Divisor of the logits; the same for policy, reference and estimator.
        budget: Bytes that the logits of a chunk, and what is computed from them, may take; None
            for :data:`BUDGET`, or :data:`BUDGET_ON_GPU`. Changes no number beyond rounding.
        planned_on: Type of device whose chunks to take; None for the weight's own.
    """

    weight: Float[Tensor, "rows dim"]
    vocab_size: int
    bias: Float[Tensor, " rows"] | None = None
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    budget: int | None = None
    planned_on: str | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether chunks are a CPU's."""
        return (self.planned_on or self.weight.device.type) == "cpu"

    @property
    def rows(self) -> int:
        """Rows of logits that exist at once.

        The one rule for all models, so that a policy and a frozen model of equal weights meet the
        same matrix shapes and agree bit for bit.
        """
        budget = self.budget or (BUDGET if self.on_cpu else BUDGET_ON_GPU)
        return chunk_rows(self.vocab_size, budget, COPIES if self.on_cpu else COPIES_ON_GPU)

    def prepared(self) -> LanguageHead:
        """The head with its weight detached, cut to the vocabulary, in the compute precision.

        Under autocast that is autocast's dtype: the numeric path of the model's own head.
        """
        dtype = product_dtype(self.weight)
        bias = None if self.bias is None else self.bias.detach()[: self.vocab_size].to(dtype)
        return replace(self, weight=self.weight.detach()[: self.vocab_size].to(dtype), bias=bias)

    def copied(self) -> LanguageHead:
        """The head with tensors of its own."""
        bias = None if self.bias is None else self.bias.clone()
        return replace(self, weight=self.weight.clone(), bias=bias)

    def logits(self, hidden: Float[Tensor, "chunk dim"]) -> Float[Tensor, "chunk vocab"]:
        """Logits in float32 (float64 for a float64 model) of a prepared head."""
        product = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.temperature == 1 else logits / self.temperature

    def slope(self, logits: Float[Tensor, "chunk vocab"]) -> Tensor | float:
        """d(logits)/d(matrix product), from the logits: the chain rule through :meth:`logits`."""
        slope: Tensor | float = self.scale / self.temperature
        if self.softcap:
            slope = slope * (1 - (logits * self.temperature / self.softcap) ** 2)
        return slope


def chunk_rows(vocab_size: int, budget: int, copies: float) -> int:
    """Rows of logits for a budget of bytes; at least one, and in sixteens where there are many."""
    rows = max(1, int(budget / (4 * copies * vocab_size)))
    return rows if rows < 16 else min(rows - rows % 16, 512)


def head_loss(
    hidden: Float[Tensor, "tokens dim"],
    head: LanguageHead,
    token_loss: TokenLossFn,
    target: TargetFn | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Sum over tokens of a loss on the logits, without ever holding all the logits.

    Naive equivalent: ``losses, metrics = token_loss(head.logits(hidden), every, target(every))``
    with ``every = arange(tokens)``, then the sums.

    Args:
        hidden: Hidden states at the response tokens.
        head: The policy's head; its weight gets a gradient if it requires one.
        token_loss: Per-token loss of a block of logits, differentiable in them.
        target: Serves what the losses compare the logits with; None where they need nothing.

    Returns:
        The sum of the losses, differentiable once in ``hidden`` and the head's weight and bias, and
        the sum of each metric.
    """
    metrics: dict[str, Tensor] = {}
    trained = (part for part in (hidden, head.weight, head.bias) if part is not None)
    grad = torch.is_grad_enabled() and any(part.requires_grad for part in trained)
    total: Tensor = _HeadLoss.apply(
        hidden, head.weight, head.bias, head, token_loss, target, grad, metrics
    )
    return total, metrics


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LanguageHead,
        token_loss: TokenLossFn,
        target: TargetFn | None,
        grad: bool,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        prepared = head.prepared()
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        need_hidden, need_weight, need_bias = (grad and need for need in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
        for index in torch.arange(len(hidden), device=hidden.device).split(head.rows):
            compared = None if target is None else target(index)
            rows = hidden.detach()[index].to(prepared.weight.dtype)
            slope = prepared.logits(rows)
            for block in _blocks(len(slope), BLOCKS if head.on_cpu else 1):
                loss, sums = _loss_and_slope(
                    slope[block],
                    index[block],
                    None if compared is None else compared[block],
                    prepared,
                    token_loss,
                    grad,
                )
                total += loss
                for name, value in sums.items():
                    metrics[name] = metrics.get(name, 0) + value
            del compared
            if not grad:
                continue
            if grad_bias is not None:
                grad_bias[: head.vocab_size] += slope.sum(dim=0)
            if grad_weight is not None:
                _add_outer(grad_weight[: head.vocab_size], slope, rows)
            if grad_hidden is not None:
                product = slope.to(prepared.weight.dtype) @ prepared.weight
                grad_hidden[index] = product.to(hidden.dtype)
            del slope
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: these are as large as the head, and nobody else has them.
        grads = (None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _blocks(rows: int, number: int) -> list[slice]:
    """About so many blocks of rows; of none, a block of none, which still has its metrics."""
    size = max(1, rows // number)
    return [slice(start, start + size) for start in range(0, max(1, rows), size)]


def _loss_and_slope(
    logits: Float[Tensor, "block vocab"],
    index: Int[Tensor, " block"],
    target: Float[Tensor, "block vocab"] | None,
    head: LanguageHead,
    token_loss: TokenLossFn,
    grad: bool,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Sums of a block's losses and metrics; the slope in the matrix product replaces the logits."""
    logits.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        losses, metrics = token_loss(logits, index, target)
        total = losses.sum()
    sums = {name: value.detach().sum() for name, value in metrics.items()}  # may view the logits
    if grad:
        (slope,) = torch.autograd.grad(total, logits)
        replaced = logits.detach()
        torch.mul(slope, head.slope(replaced), out=replaced)
    return total.detach(), sums


def _add_outer(
    total: Float[Tensor, "vocab dim"], slope: Float[Tensor, "chunk vocab"], rows: Tensor
) -> None:
    """Total += slopeᵀ·rows.

    On a CPU in place and in float32, also under autocast: writing a product of the head's size
    and adding it costs more than a faster product saves. On a GPU the product is in ``rows``'s
    dtype.
    """
    if total.device.type == "cpu":
        torch.addmm(total, slope.T, rows.to(total.dtype), out=total)
    else:
        total += slope.to(rows.dtype).T @ rows
