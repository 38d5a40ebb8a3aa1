"""Several estimators at once."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from iqstar.chat import ChatFormat
from iqstar.distributions import LogLinear, TokenDistributions
from iqstar.errors import InputError
from iqstar.estimators.base import KEY, FrozenScorer, OptimalPolicyEstimator
from iqstar.policy import PolicySpec


class MixtureEstimator(OptimalPolicyEstimator):
    """log π̂* = log π_ref + Σ_k w_k·[log π̂*_k − log π_ref] − log Z: a sum of their credits.

    With weights that sum to 1 this is the weighted sum of the log π̂*_k; otherwise the reference
    has the rest, so that a weight of 2 goes twice as far and one of 0 changes nothing.

    Args:
        estimators: The parts.
        weights: w_k, one for each.
    """

    def __init__(self, estimators: list[OptimalPolicyEstimator], weights: list[float]) -> None:
        super().__init__()
        if len(estimators) != len(weights) or not estimators:
            raise InputError(
                f"{KEY}.weights: {len(weights)} weights for {len(estimators)} estimators; give one "
                "each"
            )
        if not all(math.isfinite(w) for w in weights):
            raise InputError(f"{KEY}.weights: must be numbers, got {weights}")
        self.estimators = nn.ModuleList(estimators)
        self.weights = list(weights)

    def setup(self, spec: PolicySpec, chat: ChatFormat, precision: str) -> None:
        """See :meth:`OptimalPolicyEstimator.setup`."""
        for part in self._parts():
            part.setup(spec, chat, precision)

    def rewrite(self, rewriting: Callable[[str], str]) -> None:
        """See :meth:`OptimalPolicyEstimator.rewrite`."""
        for part in self._parts():
            part.rewrite(rewriting)

    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """See :meth:`OptimalPolicyEstimator.estimate`."""
        found = [part.estimate(scorer, reference, seed) for part in self._parts()]
        terms = [(1 - sum(self.weights), reference), *zip(self.weights, found, strict=True)]
        return LogLinear([(weight, term) for weight, term in terms if weight != 0] or terms)

    def _parts(self) -> list[OptimalPolicyEstimator]:
        return [part for part in self.estimators if isinstance(part, OptimalPolicyEstimator)]
