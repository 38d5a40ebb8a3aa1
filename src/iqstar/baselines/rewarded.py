"""What PPO and GRPO share: responses are scored by a judge, and its score is the reward."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iqstar.alignment import AlignmentModule
from iqstar.assignment import MicroBatch
from iqstar.curves import TOKEN_METRICS, Sums, token_metrics
from iqstar.distributions import HeadDistributions
from iqstar.errors import InputError
from iqstar.head import head_loss
from iqstar.judges import Judge, asked
from iqstar.judges.base import check_named, name_of, reason_of, tell_of_gaps, warn_once
from iqstar.logprobs import sampled_kl, token_logprobs
from iqstar.losses import AssignedAdvantage, Target, TokenPolicyGradientLoss
from iqstar.mdp import Rollout
from iqstar.policy import PolicySpec
from iqstar.ranks import gather


class RewardedModule(AlignmentModule):
    """A policy that is trained on the scores of its own responses.

    Args:
        policy: Which model is trained, and how it is loaded.
        reward: The judge whose score is the reward. Measure with another one (``judge``), or one
            that was trained on other prompts.
        clip_ratio: ε of the clipped ratio π_θ/π_rollout.
        shared: Those of every method (:class:`iqstar.alignment.AlignmentModule`).
    """

    beta_power = 1
    kept: ClassVar[tuple[str, ...]] = ("credit", "weight", "behaviour")
    curves: ClassVar[tuple[str, ...]] = (
        "reward",
        "reward_missing",
        "advantage",
        "clip_fraction",
    )
    kl_in_loss: float = 0.0
    """Weight of the sampled KL to the reference in the loss."""

    def __init__(
        self, policy: PolicySpec, reward: Judge, clip_ratio: float = 0.2, **shared: Any
    ) -> None:
        super().__init__(policy, **shared)
        if not self.rollout.on_policy:
            raise InputError(
                f"model.rollout: {type(self).__name__} trains on responses that the policy sampled "
                f"itself, but {type(self.rollout).__name__} has others; use GenerateRollout with "
                "source: policy"
            )
        check_named(reward)
        shared_prompts = reward.shared_prompts(self.judge) if self.judge else 0
        if shared_prompts:
            warn_once(
                f"model.reward and model.judge were trained on {shared_prompts} common prompts, so "
                "the measure shares the reward's mistakes; train one of them on others (--split a "
                "and --split b of iqstar harm-judge)"
            )
        if clip_ratio <= 0:
            raise InputError(f"model.clip_ratio: must be positive, got {clip_ratio}")
        self.reward = reward
        self._judged = False
        self.loss = TokenPolicyGradientLoss(clip_ratio, AssignedAdvantage())

    def prepare(self, precision: str) -> None:
        """Lets the rollout engine check what it is needed for."""
        assert self.policy is not None
        self.rollout.setup(self.policy, nn.Module(), self.loss, self.temperature, precision)

    def assign(self, rollout: Rollout, seed: int, resuming: bool = False) -> list[MicroBatch]:
        """Scores the responses, and gives each token its advantage."""
        parts = self.without_credit(rollout, seed)
        if resuming:
            return [self.blank(part) for part in parts]
        parts = [self._with_behaviour(part) for part in parts]
        found = torch.tensor(self._scored(rollout), dtype=torch.float64)
        scores = found.to(parts[0].tokens.reference)
        sizes = [len(part.rollout) for part in parts]
        parts = [
            replace(part, scores=own, tokens=replace(part.tokens, weight=_known(part, own)))
            for part, own in zip(parts, scores.split(sizes), strict=True)
        ]
        return self.advantages(parts)

    def assign_unchanged(self, rollout: Rollout, seed: int) -> list[MicroBatch]:
        """Advantages are for training: responses that are predicted need no judge."""
        return self.without_credit(rollout, seed)

    @torch.no_grad()
    def _with_behaviour(self, part: MicroBatch) -> MicroBatch:
        hidden = self.actor.hidden(part.sequences)  # before the head, which it gathers
        head = self.actor.frozen_head(self.temperature)
        behaviour = HeadDistributions(hidden, head).at(part.tokens.actions)
        return self.noted(replace(part, tokens=replace(part.tokens, behaviour=behaviour)), hidden)

    def noted(self, part: MicroBatch, hidden: Float[Tensor, "tokens dim"]) -> MicroBatch:
        """A micro-batch with what else is to be known of the policy that sampled it.

        Args:
            part: It.
            hidden: The policy's states that predict its tokens.
        """
        return part

    def _scored(self, rollout: Rollout) -> list[float]:
        """The judge's score of each response; NaN where it gave none.

        Responses that are left out of the loss have no tokens: the judge is not asked about them.
        """
        rows = [row for row, length in enumerate(rollout.lengths.tolist()) if length]
        shown = self.rollout.texts(self.chat, rollout)
        prompts, texts = [rollout.prompts[row] for row in rows], [shown[row] for row in rows]
        failure: Exception | None = None
        try:
            found, failure = asked(self.reward, prompts, texts) if rows else ([], None)
        except InputError as error:
            found, failure = [math.nan] * len(rows), error
        self._check_judge(found, failure)
        tell_of_gaps(self.reward, found, failure, "reward_missing")
        scores = [math.nan] * len(rollout)
        for row, score in zip(rows, found, strict=True):
            scores[row] = score
        return scores

    def _check_judge(self, scores: Sequence[float], failure: Exception | None) -> None:
        """What is wrong from the start is an error, on all ranks at once; a later failure is not.

        Raises:
            InputError: If the judge is set up wrongly, or scored none of the first responses.
        """
        known = sum(not math.isnan(score) for score in scores)
        wrong = str(failure) if isinstance(failure, InputError) else None
        reason = reason_of(failure) if failure else None
        ranks = gather((len(scores), known, wrong, reason))
        counts, scored, errors, reasons = zip(*ranks, strict=True)
        judge = f"model.reward: the judge {name_of(self.reward)}"
        if any(errors):
            raise InputError(f"{judge} cannot be used: {next(filter(None, errors))}")
        if not self._judged and sum(counts) and not sum(scored):
            why = next(filter(None, reasons), "each of its scores is NaN or infinite")
            raise InputError(
                f"{judge} scored none of the first {sum(counts)} responses ({why}), so that "
                "nothing can be learnt; mend it, or use another judge"
            )
        self._judged = self._judged or sum(counts) > 0

    @abstractmethod
    def advantages(self, parts: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with each token's advantage as its credit.

        Args:
            parts: A rollout, with ``scores``, ``behaviour`` and ``reference``; tokens of responses
                without a score have weight 0.
        """

    def blank(self, micro: MicroBatch) -> MicroBatch:
        """A micro-batch whose advantages follow from a checkpoint."""
        return micro

    def losses(self, micro: MicroBatch) -> tuple[Tensor, Sums]:
        """The clipped policy gradient; see :meth:`AlignmentModule.losses`."""
        return self.policy_loss(micro, self.actor.hidden(micro.sequences))

    def policy_loss(
        self, micro: MicroBatch, hidden: Float[Tensor, "tokens dim"]
    ) -> tuple[Tensor, Sums]:
        """Weighted sum of the policy's token losses, and its metrics.

        What the judge has no part in is of all tokens; the rest is of those with a score.

        Args:
            micro: Rows that are trained on together.
            hidden: The policy's states that predict their tokens.
        """

        def per_token(
            logits: Tensor, index: Tensor, target: Target
        ) -> tuple[Tensor, dict[str, Tensor]]:
            tokens = micro.tokens[index]
            losses, metrics = self.loss.per_token(logits, tokens, target)
            if self.kl_in_loss:
                logprobs = token_logprobs(logits, tokens.actions)
                losses = losses + self.kl_in_loss * sampled_kl(logprobs, tokens.reference)
            metrics = {name: value * (tokens.weight > 0) for name, value in metrics.items()}
            metrics |= token_metrics(logits.detach(), tokens, self.beta)
            return losses * tokens.weight, metrics

        total, sums = head_loss(hidden, self.actor.head(self.temperature), per_token)
        count = total.new_tensor(float(len(micro.tokens)))
        of_all = {name: (sums[name], count) for name in TOKEN_METRICS}
        return total, {**sums, **of_all}


def _known(micro: MicroBatch, scores: Float[Tensor, " batch"]) -> Float[Tensor, " tokens"]:
    """1 at the tokens of responses that have a score, 0 elsewhere."""
    return micro.rollout.spread(~scores.isnan()).to(micro.tokens.weight)
