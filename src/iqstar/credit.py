"""Credit transforms: small composable steps between the estimator and the loss (method §4).

Off unless named. Each maps the credits of a whole rollout (flat over its tokens) to new ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iqstar.errors import InputError
from iqstar.mdp import TokenCredits
from iqstar.ranks import global_sum


class CreditTransform(ABC):
    """Maps token credits to token credits."""

    keeps_distribution: ClassVar[bool] = True
    """False if it changes credit at the sampled token only, so that no distribution is left for
    DistributionImitationLoss."""

    @abstractmethod
    def apply(self, tokens: TokenCredits, positions: Int[Tensor, " tokens"]) -> TokenCredits:
        """The transformed credits.

        Args:
            tokens: Credits of all response tokens of this rank's rollout.
            positions: Position of each token in its response, from 0.
        """


class Whiten(CreditTransform):
    """Credit with mean 0 and standard deviation 1 over all response tokens of all ranks.

    Moves the fixed point away from π̂*: a heuristic, for comparison with peers.

    Args:
        shift: Whether the mean is subtracted; False only divides by the deviation.
    """

    keeps_distribution = False

    def __init__(self, shift: bool = True) -> None:
        self.shift = shift

    def apply(self, tokens: TokenCredits, positions: Int[Tensor, " tokens"]) -> TokenCredits:
        """See :meth:`CreditTransform.apply`."""
        mean, scale = whitening(tokens.credit, torch.ones_like(tokens.credit))
        white = (tokens.credit - mean if self.shift else tokens.credit) / scale
        return replace(tokens, credit=white)


class TopTokens(CreditTransform):
    """Keeps the tokens of largest absolute credit, the others weigh 0 (a token mask).

    Args:
        fraction: Share of this rank's rollout tokens to keep, in (0, 1].
    """

    def __init__(self, fraction: float = 0.3) -> None:
        if not 0 < fraction <= 1:
            raise InputError(f"model.transforms: fraction must be in (0, 1], got {fraction}")
        self.fraction = fraction

    def apply(self, tokens: TokenCredits, positions: Int[Tensor, " tokens"]) -> TokenCredits:
        """See :meth:`CreditTransform.apply`."""
        if len(tokens) == 0:
            return tokens
        kept = max(1, round(self.fraction * len(tokens)))
        weight = torch.zeros_like(tokens.weight)
        weight[tokens.credit.abs().topk(kept).indices] = 1.0
        return replace(tokens, weight=tokens.weight * weight)


class PrefixWeight(CreditTransform):
    """Weighs a token by 2^(−position / half_life): early tokens decide a reply's course.

    Args:
        half_life: Tokens after which the weight has halved.
    """

    def __init__(self, half_life: float = 32.0) -> None:
        if half_life <= 0:
            raise InputError(f"model.transforms: half_life must be positive, got {half_life}")
        self.half_life = half_life

    def apply(self, tokens: TokenCredits, positions: Int[Tensor, " tokens"]) -> TokenCredits:
        """See :meth:`CreditTransform.apply`."""
        decay = torch.exp2(-positions.to(tokens.weight.dtype) / self.half_life)
        return replace(tokens, weight=tokens.weight * decay)


def whitening(
    values: Float[Tensor, " tokens"], weight: Float[Tensor, " tokens"]
) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation over all ranks.

    Args:
        values: Of this rank's tokens.
        weight: How much each counts.

    Returns:
        The mean, and the deviation, which is at least 1e-8; 0 and 1 where nothing counts.
    """
    wide, own = values.double(), weight.double()
    count, total = global_sum(torch.stack([own.sum(), (own * wide).sum()])).unbind()
    mean = total / count.clamp(min=1)
    square = global_sum((own * (wide - mean) ** 2).sum())
    scale = (square / count.clamp(min=1)).sqrt().clamp(min=1e-8).where(count > 0, 1.0)
    return mean.to(values), scale.to(values)
