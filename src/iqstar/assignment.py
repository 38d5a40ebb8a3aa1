"""Automatic reward assignment: from a rollout to the credit of each of its tokens (method §2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iqstar.chat import ChatFormat
from iqstar.credit import CreditTransform
from iqstar.distributions import TokenDistributions, Unknown
from iqstar.engine import RolloutEngine
from iqstar.estimators import OptimalPolicyEstimator
from iqstar.mdp import Rollout, TokenCredits, TokenSequences
from iqstar.policy import Policy
from iqstar.ranks import even_spans
from iqstar.scoring import RolloutScorer, token_positions


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that are trained on together, with all that is known of them before the update.

    Args:
        rollout: The rows.
        sequences: The policy's inputs.
        tokens: Credit of every response token.
        target: log π̂* at every response token.
        scores: Rewards of the responses, where a method has some; NaN where a judge gave none.
    """

    rollout: Rollout
    sequences: TokenSequences
    tokens: TokenCredits
    target: TokenDistributions
    scores: Float[Tensor, " batch"] | None = None


def assign_credit(
    policy: Policy,
    rollout: Rollout,
    estimator: OptimalPolicyEstimator,
    transforms: Sequence[CreditTransform],
    *,
    temperature: float,
    micro_batch_size: int,
    needs_behaviour: bool,
    seed: int,
    known: TokenCredits | None = None,
    group: int = 1,
) -> list[MicroBatch]:
    """Scores a rollout under the frozen models and assigns A*/β = log π̂* − log π_ref (4).

    Args:
        policy: The policy and its reference.
        rollout: The responses.
        estimator: Of the optimal policy π̂*.
        transforms: Applied to the credits, in order.
        temperature: Of all scoring.
        micro_batch_size: Rows that are trained on together; they are scored together too.
        needs_behaviour: Whether to score the policy itself, at the rollout's weights.
        seed: For estimators that draw at random.
        known: Credits that were computed before: no frozen model is asked for anything then.
        group: Neighbouring rows that stay in one micro-batch; the size counts groups then.
    """
    device = rollout.response_ids.device
    spans = even_spans(len(rollout) // group, micro_batch_size, device)
    rows = [rollout.rows(start * group, stop * group) for start, stop in spans]
    scorer = RolloutScorer(policy, rows, temperature)
    if known is None:
        tokens, target = _score(scorer, estimator, seed)
    else:
        tokens, target = known, Unknown(len(known))
    if needs_behaviour:
        tokens = replace(tokens, behaviour=scorer.behaviour())
    positions = torch.cat([token_positions(row) for row in rows])
    for transform in transforms:
        tokens = transform.apply(tokens, positions)
    return [
        MicroBatch(
            rollout=row,
            sequences=sequences,
            tokens=tokens[start:stop],
            target=target.window(start, stop),
        )
        for row, sequences, (start, stop) in zip(rows, scorer.sequences, scorer.spans, strict=True)
    ]


def _score(
    scorer: RolloutScorer, estimator: OptimalPolicyEstimator, seed: int
) -> tuple[TokenCredits, TokenDistributions]:
    """Credit of every response token of a rollout, and π̂* itself."""
    reference = scorer.reference()
    target = estimator.estimate(scorer, reference, seed)
    # Window by window, because the policy's own scoring will cut its chunks at the same places.
    log_ref, log_opt = [], []
    for row, (start, stop) in zip(scorer.micro_batches, scorer.spans, strict=True):
        log_ref.append(reference.window(start, stop).at(row.actions))
        same = target is reference
        log_opt.append(log_ref[-1] if same else target.window(start, stop).at(row.actions))
    tokens = TokenCredits(
        actions=torch.cat([row.actions for row in scorer.micro_batches]),
        reference=torch.cat(log_ref),
        credit=torch.cat(log_opt) - torch.cat(log_ref),
        weight=torch.ones_like(torch.cat(log_ref)),
    )
    return tokens, target


def credit_rows(
    policy: Policy, micro: MicroBatch, engine: RolloutEngine, beta: float, temperature: float
) -> list[dict]:
    """The responses of a micro-batch with the credit of each token, as plain JSON values.

    Args:
        policy: The policy and its reference.
        micro: The micro-batch.
        engine: Where its responses are from.
        beta: Unit of credit.
        temperature: Of all scoring.

    Returns:
        Rows of ``prompt`` (its messages), ``response``, ``tokens`` (the text that each adds),
        ``credits`` (A*, in units of β), ``implied`` (r_θ = β log π_θ/π_ref), ``truncated``.
    """
    chat = policy.actor.chat
    now = RolloutScorer(policy, [micro.rollout], temperature).behaviour()
    lengths = micro.rollout.lengths.tolist()
    columns = zip(
        micro.rollout.prompts,
        engine.texts(chat, micro.rollout),
        micro.tokens.actions.split(lengths),
        (micro.tokens.credit * beta).split(lengths),
        ((now - micro.tokens.reference) * beta).split(lengths),
        micro.rollout.truncated.tolist(),
        strict=True,
    )
    rows: list[dict[str, Any]] = []
    for prompt, text, ids, credit, implied, truncated in columns:
        rows.append(
            {
                "prompt": prompt.turns,
                "response": text,
                "tokens": pieces(chat, ids.tolist()),
                "credits": [round(c, 6) for c in credit.tolist()],
                "implied": [round(c, 6) for c in implied.tolist()],
                "truncated": truncated,
            }
        )
    return rows


def pieces(chat: ChatFormat, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens appears at its last one."""
    texts, done = [], ""
    for stop in range(1, len(ids) + 1):
        text = str(chat.tokenizer.decode(list(ids[:stop])))
        if text.endswith("\ufffd") and stop < len(ids):
            texts.append("")
            continue
        texts.append(text[len(done) :])
        done = text
    return texts
