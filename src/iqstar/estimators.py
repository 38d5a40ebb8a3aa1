"""Estimators of the optimal policy π̂*, conditionally optimal given a principle (method §3).

Each maps a rollout, scored under the frozen reference, to *normalised* next-token distributions at
every response token. None reads a preference label. Null, Placebo and Shuffled are the controls
that stand beside every published result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from iqstar.chat import ChatFormat, check_placement
from iqstar.distributions import LogLinear, Reindexed, TokenDistributions
from iqstar.errors import InputError
from iqstar.loading import load_frozen
from iqstar.policy import CausalLM

KEY = "model.estimator.init_args"


@runtime_checkable
class FrozenScorer(Protocol):
    """What an estimator may ask of a rollout; :class:`iqstar.scoring.RolloutScorer` is one."""

    def conditioned(
        self, principle: str, placement: str, model: CausalLM | None = None
    ) -> TokenDistributions:
        """A frozen model at every response token, told a principle."""
        ...


class OptimalPolicyEstimator(nn.Module, ABC):
    """Estimates log π̂* at the response tokens of a rollout."""

    mixes_tokens: ClassVar[bool] = False
    """Whether a token's credit depends on the seed or on other rows, so that none can be kept."""

    @abstractmethod
    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """The estimated optimal policy at every response token.

        Args:
            scorer: Scores the rollout under frozen models.
            reference: π_ref at every response token.
            seed: For estimators that draw at random; another one for each rollout.

        Returns:
            Normalised distributions over the policy's vocabulary.
        """

    def setup(self, chat: ChatFormat, precision: str) -> None:
        """Loads what the estimator needs beside the reference; called once before training.

        Args:
            chat: The policy's chat format.
            precision: The trainer's.
        """

    def rewrite(self, rewriting: Callable[[str], str]) -> None:
        """Replaces every principle text (used by :class:`PlaceboEstimator`).

        Raises:
            InputError: If the estimator has none.
        """
        raise InputError(f"{KEY}.estimator: {type(self).__name__} has no principle to replace")


class _PrincipleBase(OptimalPolicyEstimator):
    """What estimators told a principle share: its texts, its place, its model."""

    def __init__(
        self, texts: dict[str, str], placement: str, max_principle_tokens: int, model: str | None
    ) -> None:
        super().__init__()
        for name, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"{KEY}.{name}: {type(self).__name__} needs a text and has none; write what "
                    'replies should follow, such as "Be kind and harmless."'
                )
        check_placement(placement)
        self.texts = dict(texts)
        self.placement = placement
        self.max_principle_tokens = max_principle_tokens
        self.model_name = model
        self.model: CausalLM | None = None

    def setup(self, chat: ChatFormat, precision: str) -> None:
        """See :meth:`OptimalPolicyEstimator.setup`."""
        for name, text in self.texts.items():
            if (tokens := chat.count(text)) > self.max_principle_tokens:
                raise InputError(
                    f"{KEY}.{name}: the text has {tokens} tokens, its budget is "
                    f"{self.max_principle_tokens}; a principle is never cut: shorten it or raise "
                    f"{KEY}.max_principle_tokens"
                )
        if self.model_name is not None and self.model is None:
            self.model = load_frozen(self.model_name, chat, precision, f"{KEY}.model")

    def rewrite(self, rewriting: Callable[[str], str]) -> None:
        """See :meth:`OptimalPolicyEstimator.rewrite`."""
        self.texts = {name: rewriting(text) for name, text in self.texts.items()}

    def _told(self, scorer: FrozenScorer, name: str) -> TokenDistributions:
        return scorer.conditioned(self.texts[name], self.placement, self.model)


class PrincipleEstimator(_PrincipleBase):
    """π̂*(a|s) = π_ref(a|c⁺, s): the reference itself, told the principle.

    Args:
        principle: What replies should follow, in words.
        placement: ``after_user`` or ``before_user`` (after or before the last user turn),
            ``system`` (merged with a system message that is there), or a text with ``{prompt}``
            and ``{principle}``.
        max_principle_tokens: The principle's budget; a longer one is an error, never cut.
        model: Another frozen model to tell the principle to, of the same vocabulary (what
            ``model.policy.model`` may be); null for the reference.
    """

    def __init__(
        self,
        principle: str,
        placement: str = "after_user",
        max_principle_tokens: int = 256,
        model: str | None = None,
    ) -> None:
        super().__init__({"principle": principle}, placement, max_principle_tokens, model)

    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """See :meth:`OptimalPolicyEstimator.estimate`."""
        return self._told(scorer, "principle")


class ContrastiveEstimator(_PrincipleBase):
    """log π̂* = log π_ref + γ·[log π_ref(·|c⁺) − log π_ref(·|c⁻)] − log Z: what tells c⁺ from c⁻.

    What both principles share (that there is one, its place, its length) cancels.

    Args:
        principle: c⁺, what replies should follow.
        antiprinciple: c⁻, its opposite in the same words as far as possible.
        strength: γ, how far to go from the reference; it sets the strength of the alignment, as
            β does not.
        placement: As for PrincipleEstimator.
        max_principle_tokens: Budget of either text.
        model: As for PrincipleEstimator.
    """

    def __init__(
        self,
        principle: str,
        antiprinciple: str,
        strength: float = 1.0,
        placement: str = "after_user",
        max_principle_tokens: int = 256,
        model: str | None = None,
    ) -> None:
        texts = {"principle": principle, "antiprinciple": antiprinciple}
        super().__init__(texts, placement, max_principle_tokens, model)
        self.strength = strength

    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """See :meth:`OptimalPolicyEstimator.estimate`."""
        return LogLinear(
            [
                (1.0, reference),
                (self.strength, self._told(scorer, "principle")),
                (-self.strength, self._told(scorer, "antiprinciple")),
            ]
        )


class NullEstimator(OptimalPolicyEstimator):
    """Control: π̂* = π_ref. Credit is exactly zero, so trained weights stay bit-identical."""

    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """See :meth:`OptimalPolicyEstimator.estimate`."""
        return reference


PLACEBOS = (
    "Basalt is a dark volcanic rock that forms where lava cools at the surface of the earth, and "
    "most of the ocean floor consists of it. Granite cools slowly at depth and has large crystals.",
    "A canal lock lifts boats from one level of water to another between two gates, and each gate "
    "opens once the water on both sides is level. The valves are worked by hand or by a motor.",
)
"""Plain facts without an address to anybody, told in place of a principle."""


class PlaceboEstimator(OptimalPolicyEstimator):
    """Control: another estimator with its principles replaced by unrelated facts of equal length.

    What it gains is owed to *any* text in that place, not to the principle's content. The first
    principle becomes one text, an antiprinciple another, each as long in tokens, to a word.

    Args:
        estimator: The estimator whose principles are replaced.
    """

    def __init__(self, estimator: OptimalPolicyEstimator) -> None:
        super().__init__()
        self.estimator = estimator
        self._rewritten = False

    def setup(self, chat: ChatFormat, precision: str) -> None:
        """See :meth:`OptimalPolicyEstimator.setup`."""
        if not self._rewritten:
            sources = iter(PLACEBOS)
            self.estimator.rewrite(lambda text: placebo(text, next(sources), chat))
            self._rewritten = True
        self.estimator.setup(chat, precision)

    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """See :meth:`OptimalPolicyEstimator.estimate`."""
        return self.estimator.estimate(scorer, reference, seed)


class ShuffledEstimator(OptimalPolicyEstimator):
    """Control: another estimator's credit, at the wrong tokens.

    The log-ratio vectors log π̂* − log π_ref of the rollout's tokens are permuted over them, added
    to log π_ref and renormalised. What is left of a gain needs no credit *at its token*.

    Args:
        estimator: The estimator whose credit is shuffled.
    """

    mixes_tokens = True

    def __init__(self, estimator: OptimalPolicyEstimator) -> None:
        super().__init__()
        self.estimator = estimator

    def setup(self, chat: ChatFormat, precision: str) -> None:
        """See :meth:`OptimalPolicyEstimator.setup`."""
        self.estimator.setup(chat, precision)

    def rewrite(self, rewriting: Callable[[str], str]) -> None:
        """See :meth:`OptimalPolicyEstimator.rewrite`."""
        self.estimator.rewrite(rewriting)

    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """See :meth:`OptimalPolicyEstimator.estimate`."""
        target = self.estimator.estimate(scorer, reference, seed)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(target), generator=generator)
        return LogLinear(
            [
                (1.0, reference),
                (1.0, Reindexed(target, order)),
                (-1.0, Reindexed(reference, order)),
            ]
        )


def placebo(text: str, source: str, chat: ChatFormat) -> str:
    """As many of the source's words, repeated if need be, as come closest to the text's tokens."""
    words, goal = source.split(), chat.count(text)
    best = words[:1]
    taken: list[str] = []
    while chat.count(" ".join(taken)) < goal:
        taken.append(words[len(taken) % len(words)])
        if abs(chat.count(" ".join(taken)) - goal) <= abs(chat.count(" ".join(best)) - goal):
            best = list(taken)
    return " ".join(best)
