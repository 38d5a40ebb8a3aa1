"""GRPO: a response's advantage is how its score compares with those to the same prompt."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from iqstar.assignment import MicroBatch
from iqstar.baselines.advantages import group_advantages
from iqstar.baselines.rewarded import RewardedModule
from iqstar.errors import InputError
from iqstar.judges import Judge
from iqstar.policy import PolicySpec


class GRPO(RewardedModule):
    """Group-relative policy optimisation (arXiv 2402.03300); the mean is over all tokens (DAPO's).

    Args:
        policy: Which model is trained, and how it is loaded.
        reward: As for PPO.
        kl: Weight of the sampled KL to the reference (k3) in the loss.
        scale: Whether to divide a group's advantages by their standard deviation.
        clip_ratio: ε of the clipped ratio π_θ/π_rollout.
        shared: Those of every method (:class:`iqstar.alignment.AlignmentModule`).
    """

    def __init__(
        self,
        policy: PolicySpec,
        reward: Judge,
        kl: float = 0.04,
        scale: bool = True,
        clip_ratio: float = 0.2,
        **shared: Any,
    ) -> None:
        super().__init__(policy, reward, clip_ratio, **shared)
        if not (math.isfinite(kl) and kl >= 0):
            raise InputError(f"model.kl: must be a number of at least 0, got {kl}")
        if self.rollout.responses_per_prompt < 2:
            raise InputError(
                "model.rollout.init_args.responses_per_prompt: GRPO compares responses to one "
                f"prompt, so it needs at least 2, got {self.rollout.responses_per_prompt}"
            )
        self.kl_in_loss = kl
        self.scale = scale

    def advantages(self, parts: list[MicroBatch]) -> list[MicroBatch]:
        """The same advantage for all tokens of a response; see :func:`group_advantages`."""
        scores = torch.cat([part.scores for part in parts if part.scores is not None])
        group = self.rollout.responses_per_prompt
        of_rows = group_advantages(scores, group, self.scale)
        own = of_rows.split([len(part.rollout) for part in parts])
        return [
            replace(part, tokens=replace(part.tokens, credit=part.rollout.spread(values)))
            for part, values in zip(parts, own, strict=True)
        ]
