"""An estimator that shows the model its own best response to a prompt (experimental)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from iqstar.chat import ChatFormat
from iqstar.distributions import TokenDistributions
from iqstar.errors import InputError
from iqstar.estimators.base import KEY, FrozenScorer
from iqstar.estimators.principle import ToldEstimator
from iqstar.mdp import Prompt, Rollout
from iqstar.policy import Policy
from iqstar.ranks import even_spans
from iqstar.rollouts import GenerateRollout, rollout_seed
from iqstar.scoring import RolloutScorer

EXEMPLAR = "Here is an example of a good reply:\n\n{response}"
"""How the model is shown a response."""
CANDIDATES = 1 << 31
"""Mixed into a rollout's seed for its candidates, which must not be the responses that are scored;
no engine of a MixtureRollout has this number."""


class ResponseEstimator(ToldEstimator):
    """π̂*(a|s) = π_ref(a|y⁺ as an exemplar, s), y⁺ the best of k responses of the reference.

    The model itself ranks its responses: by the mean over a response's tokens of
    log π_ref(·|c⁺) − log π_ref(·|c⁻), which does not favour the long ones. Experimental: a rule
    shared by all prompts is reported to work where instance-specific context fails
    (arXiv 2605.11182). Where ``model.refresh`` tells the estimator's model from the reference, the
    estimator's samples, ranks and is shown.

    Args:
        principle: c⁺, what replies should follow.
        antiprinciple: c⁻, its opposite.
        candidates: k, responses sampled to each prompt in every rollout.
        max_new_tokens: Length limit of a candidate.
        exemplar: How the model is shown the best one; holds ``{response}``.
        placement: As for PrincipleEstimator, of the principles and of the exemplar.
        max_principle_tokens: Budget of either principle.
        batch_size: Candidates generated at once; null for all.
        stop_strings: As for the run's rollout, of which a candidate knows nothing.
    """

    mixes_tokens = True  # candidates are drawn with the rollout's seed

    def __init__(
        self,
        principle: str,
        antiprinciple: str,
        candidates: int = 4,
        max_new_tokens: int = 64,
        exemplar: str = EXEMPLAR,
        placement: str = "after_user",
        max_principle_tokens: int = 256,
        batch_size: int | None = None,
        stop_strings: list[str] | None = None,
    ) -> None:
        texts = {"principle": principle, "antiprinciple": antiprinciple}
        super().__init__(texts, placement, max_principle_tokens, None)
        if candidates < 1:
            raise InputError(f"{KEY}.candidates: must be at least 1, got {candidates}")
        if "{response}" not in exemplar:
            raise InputError(f"{KEY}.exemplar: the text must hold {{response}}, got {exemplar!r}")
        self.candidates = candidates
        self.exemplar = exemplar
        self.engine = GenerateRollout(
            max_new_tokens,
            candidates,
            source="reference",
            stop_strings=stop_strings,
            batch_size=batch_size,
        )

    def added_tokens(self, chat: ChatFormat) -> int:
        """See :meth:`OptimalPolicyEstimator.added_tokens`; a candidate is told a principle too."""
        longest = self.engine.max_new_tokens
        return max(super().added_tokens(chat), self._added(chat, self.exemplar)) + longest

    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """See :meth:`OptimalPolicyEstimator.estimate`."""
        if not isinstance(scorer, RolloutScorer):
            raise InputError(
                "model.estimator: ResponseEstimator samples responses, which cannot be foreseen "
                "without a model; plan the run with PrincipleEstimator in its place"
            )
        rows = [prompt for part in scorer.micro_batches for prompt in part.prompts]
        distinct = {prompt.messages: prompt for prompt in rows}  # whatever its own response is
        best = dict(zip(distinct, self._best(scorer, [*distinct.values()], seed), strict=True))
        texts = [self.exemplar.replace("{response}", best[prompt.messages]) for prompt in rows]
        return scorer.conditioned(texts, self.placement, self.model)

    def _best(self, scorer: RolloutScorer, prompts: Sequence[Prompt], seed: int) -> list[str]:
        """The text of each prompt's best response."""
        policy, temperature = scorer.policy, scorer.temperature
        own_seed = rollout_seed(seed, CANDIDATES)
        if self.model is None:
            rollout = self.engine.roll_out(policy, prompts, temperature, own_seed)
        else:
            rollout = self.engine.sample(self.model, prompts, temperature, own_seed)
        rows = max(len(part) for part in scorer.micro_batches)
        ranks = self._ranks(policy, rollout, temperature, rows).view(-1, self.candidates)
        chosen = ranks.argmax(dim=1) + torch.arange(len(prompts)) * self.candidates
        texts = self.engine.texts(policy.actor.chat, rollout)
        return [texts[i] for i in chosen.tolist()]

    def _ranks(
        self, policy: Policy, rollout: Rollout, temperature: float, rows: int
    ) -> torch.Tensor:
        """Mean over each response's tokens of log π_ref(·|c⁺) − log π_ref(·|c⁻), on the CPU.

        Scored in about as many rows at once as the run's own responses.
        """
        spans = even_spans(len(rollout), rows, policy.actor.device)
        scorer = RolloutScorer(policy, [rollout.rows(*span) for span in spans], temperature)
        told = [self._told(scorer, name).at(rollout.actions) for name in self.texts]
        gaps = (told[0] - told[1]).double().cpu().split(rollout.lengths.tolist())
        return torch.stack([gap.sum() / max(len(gap), 1) for gap in gaps])
