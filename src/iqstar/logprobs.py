"""Pure functions on log-probabilities: token log-probs, entropy, divergences, masked reductions.

Everything is in nats and in the dtype of its input (float32 or float64; never bfloat16). The
divergences carry their own closed-form gradient with respect to the *logits*: at equal inputs it
is exactly zero, where differentiating through a log-softmax leaves rounding of about 1e-7, which
Adam turns into full-size updates (method §7, identity 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Of two probabilities, nats: well below 88, where e to it is inf in float32 and its slope NaN."""


def token_logprobs(
    logits: Float[Tensor, "tokens vocab"], actions: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Log-probability of each action."""
    return logits.log_softmax(dim=-1).gather(-1, actions[:, None])[:, 0]


def entropy(logprobs: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Entropy of each distribution; entries of probability zero count as zero."""
    return -_expect(logprobs.exp(), logprobs)


def kl_divergence(
    logp: Float[Tensor, "tokens vocab"], logq: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(p‖q) at every token, exact over the vocabulary; exactly 0 where p and q are equal bits."""
    return _expect(logp.exp(), logp - logq)


def sampled_kl(
    logprobs: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Unbiased, non-negative estimate of KL(π‖π_ref) from actions drawn from π.

    With δ = log π_ref − log π at the action: e^δ − 1 − δ (Schulman's "k3"), biased
    downwards only by what :func:`bounded_exp` cuts off.
    """
    delta = reference - logprobs
    return bounded_exp(delta, torch.expm1) - delta


def bounded_exp(
    values: Float[Tensor, " tokens"], exp: Callable[[Tensor], Tensor] = torch.exp
) -> Float[Tensor, " tokens"]:
    """E to the values, from :data:`LARGEST_LOG_RATIO` on its tangent: finite, with a finite slope.

    Args:
        values: Log-ratios.
        exp: ``torch.expm1`` for what is left over 1.
    """
    low = values.clamp(max=LARGEST_LOG_RATIO)
    return exp(low) + low.exp() * (values - low)


def reverse_kl(
    logits: Float[Tensor, "tokens vocab"], target: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(softmax(logits)‖target) with the gradient p·(log p − log q − KL).

    Args:
        logits: Logits of the policy.
        target: Normalised log-probabilities of π̂*; receives no gradient.
    """
    value: Tensor = _ReverseKL.apply(logits, target)
    return value


def forward_kl(
    logits: Float[Tensor, "tokens vocab"], target: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(target‖softmax(logits)) with the gradient p − q. Arguments as :func:`reverse_kl`."""
    value: Tensor = _ForwardKL.apply(logits, target)
    return value


def generalized_jsd(
    logits: Float[Tensor, "tokens vocab"], target: Float[Tensor, "tokens vocab"], weight: float
) -> Float[Tensor, " tokens"]:
    """Generalised Jensen–Shannon divergence: w·KL(p‖m) + (1−w)·KL(q‖m), m = w·p + (1−w)·q.

    Bounded by log 2 at w = ½. Source: Agarwal et al., GKD (arXiv 2306.13649), eq. 1, with the
    weight on the policy. Arguments as :func:`reverse_kl`.
    """
    value: Tensor = _GeneralizedJSD.apply(logits, target, weight)
    return value


IMPOSSIBLE = 1e30
"""Nats of an infinite log-ratio: finite, so that a probability of zero times it is zero."""


def _expect(p: Tensor, values: Tensor) -> Tensor:
    """Σ p·values over the vocabulary, with 0·(±inf) = 0."""
    return _dot(p, values.clamp(-IMPOSSIBLE, IMPOSSIBLE))


def _dot(p: Tensor, values: Tensor) -> Tensor:
    """Σ p·values over the vocabulary in their own dtype; autocast would take bfloat16."""
    with torch.autocast(p.device.type, enabled=False):
        product: Tensor = torch.linalg.vecdot(p, values)
    return product


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        logp = logits.log_softmax(dim=-1)
        p = logp.exp()
        # In place from here on: a chunk's arrays are what costs time and memory.
        gap = logp.clamp_(min=-IMPOSSIBLE).sub_(target).clamp_(max=IMPOSSIBLE)
        value = _dot(p, gap)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gap.sub_(value[:, None]).mul_(p))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad[:, None]), None


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        logp = logits.log_softmax(dim=-1)
        p, q = logp.exp(), target.exp()
        gap = torch.sub(target.clamp(min=-IMPOSSIBLE), logp).clamp_(max=IMPOSSIBLE)
        value = _dot(q, gap)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(p.sub_(q))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad[:, None]), None


class _GeneralizedJSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: float) -> Tensor:
        logp = logits.log_softmax(dim=-1)
        p, q = logp.exp(), target.exp()
        logp, target = logp.clamp_(min=-IMPOSSIBLE), target.clamp(min=-IMPOSSIBLE)
        # log p − log m and log q − log m, exactly 0 where p = q.
        over_p = -torch.log1p((1 - weight) * torch.expm1(target - logp))
        over_p = over_p.clamp_(min=-IMPOSSIBLE)  # expm1 overflows where p is next to nothing
        over_q = -torch.log1p(weight * torch.expm1(logp - target))
        value = weight * _expect(p, over_p) + (1 - weight) * _expect(q, over_q)
        if ctx.needs_input_grad[0]:
            mean = _expect(p, over_p)[:, None]
            ctx.save_for_backward(weight * torch.where(p > 0, p * (over_p - mean), 0.0))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad[:, None]), None, None
