"""Token losses: how the policy imitates the credit that π̂* assigns (method §4).

Log-ratios are kept in nats, so the losses below are those of method §4 already divided by β²
(imitation) or β (policy gradient): β is the unit in which credit is *reported*, and must not
rescale gradients against a clipping norm. All share the fixed point π_θ = π̂*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from iqstar.errors import InputError
from iqstar.logprobs import (
    bounded_exp,
    forward_kl,
    generalized_jsd,
    kl_divergence,
    reverse_kl,
    token_logprobs,
)
from iqstar.mdp import TokenCredits

Target = Float[Tensor, "chunk vocab"] | None
"""Normalised log π̂*; None where the loss does not need it, since it costs a head product."""


def given(target: Target) -> Float[Tensor, "chunk vocab"]:
    """The target, which a loss or an advantage cannot do without.

    Raises:
        InputError: If it was not asked for.
    """
    if target is None:
        raise InputError(
            "model.loss: it reads π̂* over the vocabulary without saying so; set needs_distribution "
            "= True in its class"
        )
    return target


class TokenLoss(ABC):
    """A loss per response token; the class is the option."""

    beta_power: ClassVar[int]
    """The loss of method §4 is β to this power times the one that is optimised."""
    needs_distribution: bool = False
    """Whether it reads π̂* over the whole vocabulary, not only at the sampled token."""
    needs_behaviour: ClassVar[bool] = False
    """Whether it reads the log-probs at the rollout's weights."""

    @abstractmethod
    def per_token(
        self, logits: Float[Tensor, "chunk vocab"], tokens: TokenCredits, target: Target
    ) -> tuple[Float[Tensor, " chunk"], dict[str, Float[Tensor, " chunk"]]]:
        """Loss and metrics of every token of a chunk.

        Args:
            logits: The policy's, differentiable. Keep none: their gradient takes their place.
            tokens: The chunk's actions, reference log-probs and credit.
            target: log π̂* over the vocabulary; None unless :attr:`needs_distribution`.

        Returns:
            The unweighted loss of each token, and detached metrics of each token.
        """


class RewardImitationLoss(TokenLoss):
    """½(r_θ − clip(A*))² at the sampled tokens, r_θ = β log π_θ/π_ref; optimised over β².

    With no clipping, tokens drawn from π_θ and visited states held fixed, its expected gradient
    is that of Σ_s KL(π_θ‖π̂*)(s) (7).

    Args:
        clip: Bound on the credit in nats; null for none. Clipping moves the fixed point.
    """

    beta_power = 2

    def __init__(self, clip: float | None = None) -> None:
        if clip is not None and clip <= 0:
            raise InputError(f"model.loss: clip must be positive or null, got {clip}")
        self.clip = clip

    def per_token(
        self, logits: Float[Tensor, "chunk vocab"], tokens: TokenCredits, target: Target
    ) -> tuple[Float[Tensor, " chunk"], dict[str, Float[Tensor, " chunk"]]]:
        """See :meth:`TokenLoss.per_token`."""
        implied = token_logprobs(logits, tokens.actions) - tokens.reference
        credit = tokens.credit
        if self.clip is not None:
            credit = credit.clamp(-self.clip, self.clip)
        return 0.5 * (implied - credit) ** 2, {}


class Divergence(ABC):
    """A divergence between the policy's and the target's distributions."""

    @abstractmethod
    def between(
        self, logits: Float[Tensor, "chunk vocab"], target: Float[Tensor, "chunk vocab"]
    ) -> Float[Tensor, " chunk"]:
        """Divergence at every token, differentiable in the logits.

        Args:
            logits: The policy's.
            target: Normalised log π̂*.
        """


class ReverseKL(Divergence):
    """KL(π_θ‖π̂*): mode-seeking; (7) without its sampling noise."""

    def between(
        self, logits: Float[Tensor, "chunk vocab"], target: Float[Tensor, "chunk vocab"]
    ) -> Float[Tensor, " chunk"]:
        """See :meth:`Divergence.between`."""
        return reverse_kl(logits, target)


class ForwardKL(Divergence):
    """KL(π̂*‖π_θ): mass-covering."""

    def between(
        self, logits: Float[Tensor, "chunk vocab"], target: Float[Tensor, "chunk vocab"]
    ) -> Float[Tensor, " chunk"]:
        """See :meth:`Divergence.between`."""
        return forward_kl(logits, target)


class GeneralizedJSD(Divergence):
    """w·KL(π_θ‖m) + (1−w)·KL(π̂*‖m) with m = w·π_θ + (1−w)·π̂* (arXiv 2306.13649).

    Args:
        weight: w in (0, 1), the policy's share of the mixture.
    """

    def __init__(self, weight: float = 0.5) -> None:
        if not 0 < weight < 1:
            raise InputError(
                f"model.loss.divergence: weight must lie strictly between 0 and 1, got {weight}; "
                "use ReverseKL or ForwardKL for the ends"
            )
        self.weight = weight

    def between(
        self, logits: Float[Tensor, "chunk vocab"], target: Float[Tensor, "chunk vocab"]
    ) -> Float[Tensor, " chunk"]:
        """See :meth:`Divergence.between`."""
        return generalized_jsd(logits, target, self.weight)


class DistributionImitationLoss(TokenLoss):
    """D(π_θ(·|s), π̂*(·|s)) at every visited state, over the whole vocabulary.

    Args:
        divergence: ReverseKL (default), ForwardKL or GeneralizedJSD.
    """

    beta_power = 0
    needs_distribution = True

    def __init__(self, divergence: Divergence | None = None) -> None:
        self.divergence = divergence or ReverseKL()

    def per_token(
        self, logits: Float[Tensor, "chunk vocab"], tokens: TokenCredits, target: Target
    ) -> tuple[Float[Tensor, " chunk"], dict[str, Float[Tensor, " chunk"]]]:
        """See :meth:`TokenLoss.per_token`."""
        return self.divergence.between(logits, given(target)), {}


class Advantage(ABC):
    """What weighs a token in the policy gradient, in units of β; never differentiated."""

    needs_distribution: bool = False
    """As of the loss."""

    @abstractmethod
    def of(
        self,
        logits: Float[Tensor, "chunk vocab"],
        implied: Float[Tensor, " chunk"],
        tokens: TokenCredits,
        target: Target,
    ) -> Float[Tensor, " chunk"]:
        """Advantage of every token.

        Args:
            logits: The policy's, detached.
            implied: log π_θ/π_ref of the actions at the current weights, detached.
            tokens: The chunk's credit.
            target: log π̂* over the vocabulary; None unless :attr:`needs_distribution`.
        """


class CreditAdvantage(Advantage):
    """Â = A* − r_θ: the KL term of (1) is inside, through the implied credit r_θ.

    Args:
        state_baseline: Adds KL(π_θ‖π̂*)(s), so that Â has mean 0 under π_θ at every state.
    """

    def __init__(self, state_baseline: bool = False) -> None:
        self.state_baseline = self.needs_distribution = state_baseline

    def of(
        self,
        logits: Float[Tensor, "chunk vocab"],
        implied: Float[Tensor, " chunk"],
        tokens: TokenCredits,
        target: Target,
    ) -> Float[Tensor, " chunk"]:
        """See :meth:`Advantage.of`."""
        advantage = tokens.credit - implied
        if self.state_baseline:
            advantage = advantage + kl_divergence(logits.log_softmax(dim=-1), given(target))
        return advantage


class AssignedAdvantage(Advantage):
    """Â is the credit as it was assigned: what PPO and GRPO compute from rewards."""

    def of(
        self,
        logits: Float[Tensor, "chunk vocab"],
        implied: Float[Tensor, " chunk"],
        tokens: TokenCredits,
        target: Target,
    ) -> Float[Tensor, " chunk"]:
        """See :meth:`Advantage.of`."""
        return tokens.credit


class ConstantAdvantage(Advantage):
    """The control Â = −c: no credit at all, reported to match teachers (arXiv 2608.31046).

    Args:
        magnitude: c, in units of β.
    """

    def __init__(self, magnitude: float = 1.0) -> None:
        self.magnitude = magnitude

    def of(
        self,
        logits: Float[Tensor, "chunk vocab"],
        implied: Float[Tensor, " chunk"],
        tokens: TokenCredits,
        target: Target,
    ) -> Float[Tensor, " chunk"]:
        """See :meth:`Advantage.of`."""
        return torch.full_like(implied, -self.magnitude)


class TokenPolicyGradientLoss(TokenLoss):
    """−min(ρÂ, clip(ρ, 1±ε)Â) with ρ = π_θ/π_rollout, both by our own scoring.

    Its fixed point assumes fresh rollouts: a few optimiser steps per rollout, no more.

    Args:
        clip_ratio: ε.
        advantage: CreditAdvantage (default) or the control ConstantAdvantage.
    """

    beta_power = 1
    needs_behaviour = True

    def __init__(self, clip_ratio: float = 0.2, advantage: Advantage | None = None) -> None:
        if clip_ratio <= 0:
            raise InputError(f"model.loss: clip_ratio must be positive, got {clip_ratio}")
        self.clip_ratio = clip_ratio
        self.advantage = advantage or CreditAdvantage()
        self.needs_distribution = self.advantage.needs_distribution

    def per_token(
        self, logits: Float[Tensor, "chunk vocab"], tokens: TokenCredits, target: Target
    ) -> tuple[Float[Tensor, " chunk"], dict[str, Float[Tensor, " chunk"]]]:
        """See :meth:`TokenLoss.per_token`.

        Raises:
            InputError: If the tokens carry no behaviour log-probs (replayed data-set responses).
        """
        if tokens.behaviour is None:
            raise InputError(
                "model.loss: TokenPolicyGradientLoss needs responses that the policy sampled "
                "itself, with their log-probs; data-set responses have none, nor has a rollout in "
                "a checkpoint of another loss. Use a GenerateRollout, RewardImitationLoss or "
                "DistributionImitationLoss, or a checkpoint between two rollouts"
            )
        logprobs = token_logprobs(logits, tokens.actions)
        implied = (logprobs - tokens.reference).detach()
        advantage = self.advantage.of(logits.detach(), implied, tokens, target)
        ratio = bounded_exp(logprobs - tokens.behaviour)
        clipped = ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        was_clipped = (clipped * advantage < ratio * advantage).to(loss.dtype)
        return loss, {"advantage": advantage, "clip_fraction": was_clipped.detach()}
