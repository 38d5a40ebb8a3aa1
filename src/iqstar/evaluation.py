"""The fixed evaluation: held-out prompts, no principle in context, T = 1, nothing truncated.

The same seeds before and after training, so that the two differ by the policy alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from iqstar.distributions import HeadDistributions
from iqstar.judges import Judge, scores_of
from iqstar.logprobs import entropy, kl_divergence
from iqstar.mdp import Prompt, Rollout
from iqstar.metrics import distinct_n
from iqstar.policy import CausalLM, Policy
from iqstar.ranks import even_spans
from iqstar.rollouts import GenerateRollout, RolloutEngine
from iqstar.scoring import pack_prompts

T = TypeVar("T")
SCORED_ROWS = 32
"""Rows scored in one forward pass."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response of an evaluation.

    Args:
        prompt: The last user turn.
        response: The response's text.
        score: The judge's; NaN without one, or where it could not score.
        tokens: Length of the response.
        truncated: Whether the length limit ended it.
    """

    prompt: str
    response: str
    score: float
    tokens: int
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of the policy.

    Args:
        step: Optimiser steps done.
        metrics: Global means by name.
        samples: The responses, in the order of the held-out prompts.
        sampled: Responses that training had sampled.
        seconds: Time that training had taken, rollouts included, evaluations not.
        judge: Name and version of the judge that scored it; None where there was none.
    """

    step: int
    metrics: dict[str, float]
    samples: tuple[Sample, ...]
    sampled: int = 0
    seconds: float = 0.0
    judge: str | None = None


def in_order(parts: Sequence[Sequence[T]], per_prompt: int) -> list[T]:
    """The responses of all ranks in the order of the held-out prompts.

    Args:
        parts: Those of each rank; the ranks share the prompts out one by one
            (:class:`iqstar.data.loader.EvalBatches`).
        per_prompt: Responses to each prompt, which stand side by side.
    """
    longest = max(map(len, parts))
    starts = range(0, longest, per_prompt)
    return [s for start in starts for part in parts for s in part[start : start + per_prompt]]


def sample_and_score(
    policy: Policy,
    prompts: Sequence[Prompt],
    judge: Judge | None,
    *,
    like: RolloutEngine,
    samples: int,
    seed: int,
) -> tuple[list[Sample], dict[str, tuple[Tensor, Tensor]]]:
    """Samples responses of the policy and measures them.

    Args:
        policy: The policy and its reference.
        prompts: Held-out prompts.
        judge: Scores the responses, if any.
        like: The engine whose length limit, stop strings and batch size are taken over; nothing
            else of it is.
        samples: Responses to each prompt.
        seed: Of the sampling.

    Returns:
        The responses, and (sum, count) of the exact KL to the reference and the entropy, over
        response tokens, in nats at T = 1.
    """
    engine = evaluation_engine(like, samples)
    rollout = engine.sample(policy.actor, prompts, 1.0, seed)
    texts = engine.texts(policy.actor.chat, rollout)
    missing = [float("nan")] * len(texts)
    scores = scores_of(judge, rollout.prompts, texts) if judge else missing
    records = [
        Sample(
            prompt=prompt.messages[-1].content,
            response=text,
            score=score,
            tokens=int(length),
            truncated=bool(cut),
        )
        for prompt, text, score, length, cut in zip(
            rollout.prompts, texts, scores, rollout.lengths, rollout.truncated, strict=True
        )
    ]
    return records, divergence_sums(policy, rollout)


def evaluation_engine(like: RolloutEngine, samples: int) -> GenerateRollout:
    """The engine of an evaluation: nothing of the run's own but its limits.

    Args:
        like: The engine whose length limit, stop strings and batch size are taken over.
        samples: Responses to each prompt.
    """
    return GenerateRollout(
        max_new_tokens=like.max_new_tokens,
        responses_per_prompt=samples,
        stop_strings=like.stop_strings,
        batch_size=like.batch_size,
    )


def divergence_sums(policy: Policy, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, count) over response tokens of KL(π_θ‖π_ref), exact, and of the policy's entropy."""
    count = rollout.response_mask.sum()
    return {name: (v.double().sum(), count) for name, v in divergences(policy, rollout).items()}


@torch.no_grad()
def divergences(
    policy: Policy, rollout: Rollout, asked: Sequence[Prompt] | None = None
) -> dict[str, Float[Tensor, " tokens"]]:
    """KL(π_θ‖π_ref), exact, and the policy's entropy, at every response token, row by row.

    Args:
        policy: The policy and its reference.
        rollout: Responses to the prompts that the policy is given.
        asked: The prompts that the reference is given, where they are others.
    """
    plain = replace(rollout, prompts=tuple(asked)) if asked else rollout
    device = rollout.response_ids.device
    kl: list[Tensor] = []
    bits: list[Tensor] = []
    for start, stop in even_spans(len(rollout), SCORED_ROWS, device):
        ours = _distributions(policy.actor, rollout.rows(start, stop))
        with policy.reference() as model:
            theirs = _distributions(model, plain.rows(start, stop))
        for index in torch.arange(len(ours), device=device).split(ours.rows):
            logp = ours.logprobs(index)
            kl.append(kl_divergence(logp, theirs.logprobs(index)))
            bits.append(entropy(logp))
    return {"kl": torch.cat(kl), "entropy": torch.cat(bits)}


def _distributions(model: CausalLM, rollout: Rollout) -> HeadDistributions:
    hidden = model.hidden(pack_prompts(model, rollout))
    return HeadDistributions(hidden, model.frozen_head())


def evaluation_metrics(
    samples: Sequence[Sample], means: dict[str, Tensor], judged: bool
) -> dict[str, float]:
    """The metrics of an evaluation, from its responses and its global means.

    Args:
        samples: The responses of all ranks.
        means: KL to the reference and entropy, over response tokens.
        judged: Whether there is a judge; responses that it could not score are left out, and
            ``judge_missing`` is their share where there are any.
    """
    scores = [s.score for s in samples if not math.isnan(s.score)]
    truncated = sum(s.truncated for s in samples) / len(samples)
    metrics = {name: float(value) for name, value in means.items()} | {
        "response_length": sum(s.tokens for s in samples) / len(samples),
        "truncation_rate": truncated,
        "eos_rate": 1 - truncated,
        "distinct_2": distinct_n([s.response for s in samples], 2),
    }
    if judged:
        metrics["judge"] = sum(scores) / len(scores) if scores else float("nan")
        if len(scores) < len(samples):
            metrics["judge_missing"] = 1 - len(scores) / len(samples)
    return metrics
