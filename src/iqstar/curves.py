"""What training shows: sums over the tokens of a micro-batch, and the curves of a window.

docs/curves.md says what each curve means. Means are over all response tokens (or responses) of
the accumulation window on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from iqstar.assignment import MicroBatch
from iqstar.logprobs import entropy, sampled_kl
from iqstar.mdp import TokenCredits

Sums = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""What a method measures in a micro-batch: sums over its tokens, or sums with their own counts."""
TOKEN_METRICS = ("implied_reward", "kl", "entropy")
"""What :func:`token_metrics` measures."""
TRAIN_MEANS = (
    "loss",
    "credit",
    "credit_square",
    *TOKEN_METRICS,
    "response_length",
    "truncation_rate",
    "eos_rate",
)
"""Quantities of every loss, so that a rank without tokens synchronises the same states."""


@torch.no_grad()
def token_metrics(
    logits: Float[Tensor, "chunk vocab"], tokens: TokenCredits, beta: float
) -> dict[str, Float[Tensor, " chunk"]]:
    """Per token: implied reward β log π_θ/π_ref, sampled KL to the reference, entropy (nats)."""
    distribution = logits.log_softmax(dim=-1)
    logprobs = distribution.gather(-1, tokens.actions[:, None])[:, 0]
    return {
        "implied_reward": beta * (logprobs - tokens.reference),
        "kl": sampled_kl(logprobs, tokens.reference),
        "entropy": entropy(distribution),
    }


def micro_batch_sums(
    micro: MicroBatch, loss: Tensor, sums: Sums, beta: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, count) of every quantity over a micro-batch.

    Args:
        micro: The micro-batch.
        loss: Sum of the weighted losses of its tokens.
        sums: Of what the loss and :func:`token_metrics` measured.
        beta: Unit of credit.
    """
    seen = torch.ones_like(micro.tokens.weight)
    if micro.scores is not None:  # tokens of responses without a score have no advantage
        seen = (micro.tokens.weight > 0).to(seen)
    count = seen.double().sum().to(loss)
    responses, lengths = loss.new_tensor(float(len(micro.rollout))), micro.rollout.lengths
    credit = beta * micro.tokens.credit.double() * seen
    truncated = micro.rollout.truncated.sum()
    return {
        "loss": (loss, micro.tokens.weight.sum()),
        "credit": (credit.sum(), count),
        "credit_square": ((credit**2).sum(), count),
        "response_length": (lengths.sum(), (lengths > 0).sum()),  # left out ones have none
        "truncation_rate": (truncated, responses),
        "eos_rate": (responses - truncated, responses),
        **{n: v if isinstance(v, tuple) else (v, count) for n, v in sums.items()},
        **({} if micro.scores is None else score_sums(micro.scores[micro.rollout.lengths > 0])),
    }


def score_sums(scores: Float[Tensor, " batch"]) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, count) of the rewards that there are, and of those that a judge could not give.

    Args:
        scores: Of the responses that a judge was asked about; those left out of the loss are not.
    """
    missing = scores.isnan()
    return {
        "reward": (scores.nan_to_num().sum(), (~missing).sum()),
        "reward_missing": (missing.sum(), scores.new_tensor(float(len(scores)))),
    }


OF_ALL = ("credit_std", "objective", "grad_norm", "samples", "tokens_per_second")
"""Further curves of every step."""


def window_curves(means: dict[str, Tensor], beta_power: int, beta: float) -> dict[str, Tensor]:
    """The curves of an optimiser step, from the means over its window.

    Args:
        means: By name, :data:`TRAIN_MEANS` and those of the loss.
        beta_power: The loss of method §4 is β to this power times the one optimised.
        beta: Unit of credit.
    """
    curves = {name: value for name, value in means.items() if name != "credit_square"}
    variance = means["credit_square"] - means["credit"] ** 2
    curves["credit_std"] = variance.clamp(min=0).sqrt()
    curves["objective"] = means["loss"] * beta**beta_power
    return curves
