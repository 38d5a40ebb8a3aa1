"""Estimators told a principle in words: the default family."""

from __future__ import annotations

import math
from collections.abc import Callable

from iqstar.chat import ChatFormat, check_placement
from iqstar.distributions import LogLinear, TokenDistributions
from iqstar.errors import InputError
from iqstar.estimators.base import KEY, FrozenScorer, OptimalPolicyEstimator
from iqstar.loading import load_frozen
from iqstar.mdp import Message
from iqstar.policy import CausalLM, PolicySpec


class ToldEstimator(OptimalPolicyEstimator):
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
        self._written = dict(texts)  # by the user, whatever a control puts in their place
        self.placement = placement
        self.max_principle_tokens = max_principle_tokens
        self.model_name = model
        self.model: CausalLM | None = None

    def setup(self, spec: PolicySpec, chat: ChatFormat, precision: str) -> None:
        """See :meth:`OptimalPolicyEstimator.setup`."""
        for name, text in self._written.items():
            if (tokens := chat.count(text)) > self.max_principle_tokens:
                raise InputError(
                    f"{KEY}.{name}: the text has {tokens} tokens, its budget is "
                    f"{self.max_principle_tokens}; a principle is never cut: shorten it or raise "
                    f"{KEY}.max_principle_tokens"
                )
        if self.model_name is not None and self.model is None:
            self.model = load_frozen(self.model_name, spec, chat, precision, f"{KEY}.model")

    def added_tokens(self, chat: ChatFormat) -> int:
        """See :meth:`OptimalPolicyEstimator.added_tokens`."""
        budget = self.max_principle_tokens  # what is beyond it is refused, with a better message
        return max(
            self._added(chat, text) - max(chat.count(text) - budget, 0)
            for text in self.texts.values()
        )

    def _added(self, chat: ChatFormat, text: str) -> int:
        """Tokens of a text in its place, with what the placement and the template write there."""
        prompt = (Message(role="user", content="a"),)
        return len(chat.prompt_ids(prompt, text, self.placement)) - len(chat.prompt_ids(prompt))

    def own_models(self) -> tuple[str, ...]:
        """See :meth:`OptimalPolicyEstimator.own_models`."""
        return () if self.model_name is None else (self.model_name,)

    def rewrite(self, rewriting: Callable[[str], str]) -> None:
        """See :meth:`OptimalPolicyEstimator.rewrite`."""
        self.texts = {name: rewriting(text) for name, text in self.texts.items()}

    def _told(self, scorer: FrozenScorer, name: str) -> TokenDistributions:
        return scorer.conditioned(self.texts[name], self.placement, self.model)


class PrincipleEstimator(ToldEstimator):
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


class ContrastiveEstimator(ToldEstimator):
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
        if not math.isfinite(strength):
            raise InputError(f"{KEY}.strength: must be a finite number, got {strength}")
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
