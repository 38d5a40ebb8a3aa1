"""How much PPO pays for leaving the reference: a fixed price, or one that follows a target."""

from __future__ import annotations

import math
from abc import ABC

from iqstar.errors import InputError

KEY = "model.kl"


class KLPenalty(ABC):
    """The β of objective (1): a token's reward is lowered by β·log(π_θ/π_ref).

    Attributes:
        coefficient: β, in reward per nat.
    """

    coefficient: float

    def update(self, kl: float, responses: int) -> None:  # noqa: B027  # a fixed one stays
        """Takes note of what a rollout measured.

        Args:
            kl: Mean over its tokens of log(π_θ/π_ref), nats.
            responses: Number of its responses, on all ranks.
        """


class FixedKL(KLPenalty):
    """The same price throughout.

    Args:
        coefficient: β, in reward per nat.
    """

    def __init__(self, coefficient: float = 0.05) -> None:
        _check(coefficient=coefficient)
        self.coefficient = coefficient


class AdaptiveKL(KLPenalty):
    """A price that rises while the KL is over a target and falls while it is under it.

    β ← β·(1 + clip(KL/target − 1, ±0.2)·min(n/horizon, 1)) after n responses (Ziegler et al. 2019,
    arXiv 1909.08593, section 2.2), with the KL per token instead of per response. Without the
    minimum, which is ours, a rollout of five horizons could make the price 0 or negative.

    Args:
        target: Of the KL, nats per token.
        coefficient: β at the start, in reward per nat.
        horizon: Responses after which a KL far off has changed β by a fifth.
    """

    def __init__(self, target: float = 0.1, coefficient: float = 0.05, horizon: int = 1000) -> None:
        _check(coefficient=coefficient, target=target, horizon=horizon)
        for name, value in (("target", target), ("coefficient", coefficient), ("horizon", horizon)):
            if value == 0:
                raise InputError(f"{KEY}.{name}: must be positive; use FixedKL for a fixed price")
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, responses: int) -> None:
        """See :meth:`KLPenalty.update`."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * min(responses / self.horizon, 1)


def _check(**values: float | int) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{KEY}.{name}: must be a number of at least 0, got {value}")
