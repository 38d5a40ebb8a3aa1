"""PPO on the same parts: a value head, GAE, clipped ratio and value, a KL penalty in the reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iqstar.assignment import MicroBatch
from iqstar.baselines.advantages import (
    clipped_value_loss,
    generalized_advantages,
    penalised_rewards,
)
from iqstar.baselines.kl_penalty import FixedKL, KLPenalty
from iqstar.baselines.rewarded import RewardedModule
from iqstar.baselines.value import ValueHead
from iqstar.credit import whitening
from iqstar.curves import Sums
from iqstar.errors import InputError
from iqstar.judges import Judge
from iqstar.mdp import TokenCredits
from iqstar.policy import PolicySpec
from iqstar.ranks import global_sum
from iqstar.strategies import ShardedStrategy


@dataclass(frozen=True, kw_only=True)
class ValuedTokens(TokenCredits):
    """Tokens whose ``credit`` is their advantage.

    Args:
        values: V(s_t) at the rollout's weights.
        returns: What V(s_t) should be: advantage (before whitening) plus value.
    """

    values: Float[Tensor, " tokens"]
    returns: Float[Tensor, " tokens"]


class PPO(RewardedModule):
    """Proximal policy optimisation of a judge's score (arXiv 1707.06347, 1909.08593).

    Args:
        policy: Which model is trained, and how it is loaded.
        reward: The judge whose score is the reward. Measure with another one (``judge``), or one
            that was trained on other prompts.
        kl: Price of leaving the reference, a part of each token's reward; null for FixedKL.
        separate_value_model: Train a copy of the model for the values, instead of a head on the
            policy's own states.
        gamma: Discount.
        lam: λ of the generalised advantages.
        clip_ratio: ε of the clipped ratio π_θ/π_rollout.
        clip_value: How far a value may move in one rollout; null for no bound.
        value_coefficient: Weight of the value loss.
        whiten: Give the advantages of a rollout, over all ranks, mean 0 and variance 1.
        epochs_per_rollout: Passes over each rollout before the next one.
        shared: Those of every method (:class:`iqstar.alignment.AlignmentModule`).
    """

    kept = (*RewardedModule.kept, "values", "returns")
    curves = (*RewardedModule.curves, "value", "value_loss")

    def __init__(
        self,
        policy: PolicySpec,
        reward: Judge,
        kl: KLPenalty | None = None,
        separate_value_model: bool = False,
        gamma: float = 1.0,
        lam: float = 0.95,
        clip_ratio: float = 0.2,
        clip_value: float | None = 0.2,
        value_coefficient: float = 0.1,
        whiten: bool = True,
        epochs_per_rollout: int = 2,
        **shared: Any,
    ) -> None:
        super().__init__(
            policy, reward, clip_ratio, epochs_per_rollout=epochs_per_rollout, **shared
        )
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise InputError(f"model.{name}: must be in [0, 1], got {value}")
        for name, positive in (
            ("clip_value", clip_value),
            ("value_coefficient", value_coefficient),
        ):
            if positive is not None and not (math.isfinite(positive) and positive > 0):
                raise InputError(f"model.{name}: must be a positive number, got {positive}")
        self.kl = kl or FixedKL()
        self.separate_value_model = separate_value_model
        self.gamma = gamma
        self.lam = lam
        self.clip_value = clip_value
        self.value_coefficient = value_coefficient
        self.whiten = whiten

    def prepare(self, precision: str) -> None:
        """Puts a value head on the policy.

        Raises:
            InputError: If the run's weights are sharded.
        """
        super().prepare(precision)
        if isinstance(self.trainer.strategy, ShardedStrategy):
            raise InputError(
                "trainer.strategy: the value head of PPO cannot be sharded; use ddp or one device"
            )
        self.value_head = ValueHead(self.actor, self.separate_value_model)

    def trained_parts(self) -> Sequence[nn.Module]:
        """The policy and its value head."""
        return self.actor, self.value_head

    def advantages(self, parts: list[MicroBatch]) -> list[MicroBatch]:
        """See :meth:`RewardedModule.advantages`; also what values should be."""
        parts = [self._returned(part) for part in parts]
        self._note_kl(parts)
        if not self.whiten:
            return parts
        credit, weight = (
            torch.cat([getattr(part.tokens, name) for part in parts])
            for name in ("credit", "weight")
        )
        mean, scale = whitening(credit, weight)
        return [
            replace(part, tokens=replace(part.tokens, credit=(part.tokens.credit - mean) / scale))
            for part in parts
        ]

    def noted(self, part: MicroBatch, hidden: Float[Tensor, "tokens dim"]) -> MicroBatch:
        """See :meth:`RewardedModule.noted`; the values of the states."""
        values = self.value_head(hidden, part.sequences)
        fields = {**vars(part.tokens), "values": values, "returns": values}
        return replace(part, tokens=ValuedTokens(**fields))

    def _returned(self, part: MicroBatch) -> MicroBatch:
        tokens, mask = part.tokens, part.rollout.response_mask
        assert isinstance(tokens, ValuedTokens)
        assert tokens.behaviour is not None
        assert part.scores is not None
        values = tokens.values
        padded = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
        rewards = penalised_rewards(
            part.scores.nan_to_num().to(values),
            padded.masked_scatter(mask, (tokens.behaviour - tokens.reference).to(values)),
            mask,
            self.kl.coefficient,
        )
        of_states = padded.masked_scatter(mask, values)
        advantages = generalized_advantages(rewards, of_states, self.gamma, self.lam)[mask]
        credit = advantages.to(tokens.reference)
        return replace(part, tokens=replace(tokens, credit=credit, returns=advantages + values))

    def _note_kl(self, parts: list[MicroBatch]) -> None:
        """Lets the price of the KL follow what the rollout of all ranks measured."""
        ratios = torch.cat([p.tokens.behaviour - p.tokens.reference for p in parts])  # type: ignore[operator]
        responses = sum(int((part.rollout.lengths > 0).sum()) for part in parts)
        own = [ratios.sum().item(), len(ratios), responses]
        sums = global_sum(torch.tensor(own, dtype=torch.float64, device=ratios.device)).tolist()
        if sums[1]:  # responses that were all left out measure nothing
            self.kl.update(sums[0] / sums[1], int(sums[2]))

    def blank(self, micro: MicroBatch) -> MicroBatch:
        """See :meth:`RewardedModule.blank`."""
        empty = torch.zeros_like(micro.tokens.reference)
        return replace(
            micro, tokens=ValuedTokens(**vars(micro.tokens), values=empty, returns=empty)
        )

    def losses(self, micro: MicroBatch) -> tuple[Tensor, Sums]:
        """Policy and value losses; see :meth:`AlignmentModule.losses`."""
        assert isinstance(micro.tokens, ValuedTokens)
        hidden = self.actor.hidden(micro.sequences)
        total, sums = self.policy_loss(micro, hidden)
        values = self.value_head(hidden, micro.sequences)
        tokens = micro.tokens
        losses = clipped_value_loss(values, tokens.values, tokens.returns, self.clip_value)
        total = total + self.value_coefficient * (losses * tokens.weight).sum()
        scored = tokens.weight > 0
        return total, {
            **sums,
            "value": (values.detach() * scored).sum(),
            "value_loss": (losses.detach() * scored).sum(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the price of the KL, unless it is fixed."""
        super().on_save_checkpoint(checkpoint)
        if not isinstance(self.kl, FixedKL):
            checkpoint["iqstar"]["kl_coefficient"] = self.kl.coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the price of the KL up again; a fixed one is that of the settings."""
        super().on_load_checkpoint(checkpoint)
        if not isinstance(self.kl, FixedKL):
            saved = checkpoint.get("iqstar", {})
            self.kl.coefficient = saved.get("kl_coefficient", self.kl.coefficient)
