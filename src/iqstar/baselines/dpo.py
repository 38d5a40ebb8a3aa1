"""DPO: the policy is moved towards the chosen reply of each pair and away from the rejected one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iqstar.alignment import AlignmentModule
from iqstar.assignment import MicroBatch
from iqstar.curves import Sums, token_metrics
from iqstar.distributions import HeadDistributions
from iqstar.errors import InputError
from iqstar.head import head_loss
from iqstar.logprobs import token_logprobs
from iqstar.mdp import Prompt, Rollout
from iqstar.policy import PolicySpec
from iqstar.rollouts import DatasetRollout


def dpo_losses(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """−log σ(β·(log-ratio of chosen − log-ratio of rejected)) (DPO, arXiv 2305.18290, eq. 7).

    Args:
        chosen: log π_θ/π_ref of each chosen reply, summed over its tokens.
        rejected: The same of the rejected one.
        beta: β.
        label_smoothing: Share of the pairs that are assumed to be labelled the wrong way round.
    """
    margin = beta * (chosen - rejected)
    right, wrong = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


class DPO(AlignmentModule):
    """Direct preference optimisation with the sigmoid loss, on pairs of the data module.

    A micro-batch takes ``micro_batch_size`` pairs; ``model.rollout`` is used for evaluation only,
    but its ``max_new_tokens`` also cuts the pairs' replies. Both replies of a pair count as
    samples.

    Args:
        policy: Which model is trained, and how it is loaded.
        beta: β, the strength of the pull to the reference.
        label_smoothing: Share of the pairs that are assumed to be labelled the wrong way round.
        shared: Those of every method (:class:`iqstar.alignment.AlignmentModule`).
    """

    kept = ()
    curves = ("accuracy", "margin")
    on_policy = False  # whatever the rollout engine, which serves evaluations only

    def __init__(
        self, policy: PolicySpec, beta: float = 0.1, label_smoothing: float = 0.0, **shared: Any
    ) -> None:
        super().__init__(policy, **shared)
        if not (math.isfinite(beta) and beta > 0):
            raise InputError(f"model.beta: must be a positive number, got {beta}")
        if not 0 <= label_smoothing < 0.5:
            raise InputError(f"model.label_smoothing: must be in [0, 0.5), got {label_smoothing}")
        if self.mask_truncated:
            raise InputError(
                "model.mask_truncated: DPO samples no responses that it could leave out, and "
                "replies that model.rollout.init_args.max_new_tokens cuts count in their pairs; "
                "set it to false"
            )
        self.beta = beta
        self.label_smoothing = label_smoothing

    def training_steps(self, prompts: int) -> int:
        """Training steps on that many pairs; the data module asks for it."""
        return math.ceil(prompts / (self.micro_batch_size or prompts)) * self.epochs_per_rollout

    def collect(self, prompts: tuple[Prompt, ...], seed: int) -> list[MicroBatch]:
        """The pairs, each reply a row, a chosen one before its rejected one.

        Raises:
            InputError: If a prompt has no pair.
        """
        assert self.policy is not None
        alone = next((p for p in prompts if not (p.response and p.rejected)), None)
        if alone is not None:
            raise InputError(
                f"data: DPO trains on pairs, but {alone.messages[-1].content[:60]!r} has none; use "
                "a data module of pairs, such as iqstar.data.HHPairs"
            )
        rows = [
            side
            for p in prompts
            for side in (p, replace(p, response=p.rejected, complete=p.rejected_complete))
        ]
        engine = DatasetRollout(self.rollout.max_new_tokens)
        return self.assign(engine.roll_out(self.policy, rows, self.temperature, seed), seed)

    def assign(self, rollout: Rollout, seed: int, resuming: bool = False) -> list[MicroBatch]:
        """Scores the pairs under the reference; each weighs 1, spread over its tokens."""
        parts = self.without_credit(rollout, seed, group=2)
        return [replace(part, tokens=replace(part.tokens, weight=_shares(part))) for part in parts]

    def assign_unchanged(self, rollout: Rollout, seed: int) -> list[MicroBatch]:
        """Responses that are predicted are no pairs; nobody gives them credit."""
        return self.without_credit(rollout, seed)

    def losses(self, micro: MicroBatch) -> tuple[Tensor, Sums]:
        """The sum over pairs; see :meth:`AlignmentModule.losses`.

        A pair's loss depends on the sums over both replies, so log-probs are taken first, without
        gradient; then each token's logit gradient is that of its reply's coefficient times its
        log-prob, chunk by chunk.
        """
        hidden, head = self.actor.hidden(micro.sequences), self.actor.head(self.temperature)
        tokens, rows = micro.tokens, len(micro.rollout)
        now = HeadDistributions(hidden.detach(), head.prepared()).at(tokens.actions)
        owner = micro.rollout.spread(torch.arange(rows, device=hidden.device))
        ratios = torch.zeros(rows, dtype=now.dtype, device=now.device)
        ratios = ratios.index_add(0, owner, now - tokens.reference).requires_grad_()
        with torch.enable_grad():
            losses = dpo_losses(ratios[::2], ratios[1::2], self.beta, self.label_smoothing)
            (slope,) = torch.autograd.grad(losses.sum(), ratios)

        def per_token(
            logits: Tensor, index: Tensor, _: Tensor | None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            part = tokens[index]
            pulled = slope[owner[index]] * token_logprobs(logits, part.actions)
            return pulled, token_metrics(logits.detach(), part, self.beta)

        surrogate, sums = head_loss(hidden, head, per_token)
        total = losses.detach().sum()
        margins = (ratios[::2] - ratios[1::2]).detach() * self.beta
        count = margins.new_tensor(float(len(margins)))
        right = (margins > 0).sum() + 0.5 * (margins == 0).sum()
        curves: Sums = {**sums, "accuracy": (right, count), "margin": (margins.sum(), count)}
        return surrogate + (total - surrogate).detach(), curves


def _shares(micro: MicroBatch) -> Float[Tensor, " tokens"]:
    """What each token weighs, so that a pair weighs 1."""
    lengths = micro.rollout.lengths.clamp(min=1)
    return micro.rollout.spread(0.5 / lengths.to(micro.tokens.weight))
