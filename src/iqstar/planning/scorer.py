"""Scores the rollout that a plan traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iqstar.distributions import HeadDistributions
from iqstar.head import LanguageHead
from iqstar.mdp import TokenSequences
from iqstar.policy import CausalLM, Policy

CHARACTERS_PER_TOKEN = 3
"""Of a principle; English has more, so that a principle is rather taken for too long."""


class TracedScorer:
    """Scores one micro-batch under frozen models, in place of ``scoring.RolloutScorer``.

    Args:
        policy: Whose reference scores; an estimator's own models are as large, at most.
        sequences: The micro-batch's, with that many more tokens of a principle.
        head: The frozen head of a model, as it is planned with.

    Attributes:
        hidden: Bytes of the hidden states of each scoring.
    """

    def __init__(
        self,
        policy: Policy,
        sequences: Callable[[int], TokenSequences],
        head: Callable[[CausalLM], LanguageHead],
    ) -> None:
        self.policy = policy
        self.sequences = sequences
        self.hidden: list[int] = []
        self._make_head = head
        self._head: LanguageHead | None = None

    def scored(self, more: int = 0) -> HeadDistributions:
        """The reference's distributions at the response tokens.

        Args:
            more: Tokens of a principle.
        """
        with self.policy.reference() as model:
            hidden = model.hidden(self.sequences(more))
            if self._head is None:
                self._head = self._make_head(model)
        self.hidden.append(hidden.nbytes)
        return HeadDistributions(hidden, self._head)

    def unconditioned(self, model: CausalLM | None) -> HeadDistributions:
        """See :class:`iqstar.estimators.FrozenScorer`."""
        return self.scored()

    def conditioned(
        self, principle: str | Sequence[str], placement: str, model: CausalLM | None = None
    ) -> HeadDistributions:
        """See :class:`iqstar.estimators.FrozenScorer`."""
        texts = [principle] if isinstance(principle, str) else principle
        return self.scored(max(map(len, texts)) // CHARACTERS_PER_TOKEN)
