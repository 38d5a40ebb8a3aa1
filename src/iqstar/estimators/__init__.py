"""Estimators of the optimal policy π̂*, conditionally optimal given a principle (method §3).

Each maps a rollout, scored under the frozen reference, to *normalised* next-token distributions at
every response token. None reads a preference label.
"""

from iqstar.estimators.aligned_pair import AlignedPairEstimator
from iqstar.estimators.base import FrozenScorer, OptimalPolicyEstimator
from iqstar.estimators.controls import (
    PLACEBOS,
    NullEstimator,
    PlaceboEstimator,
    ShuffledEstimator,
    placebo,
)
from iqstar.estimators.mixture import MixtureEstimator
from iqstar.estimators.principle import ContrastiveEstimator, PrincipleEstimator
from iqstar.estimators.response import ResponseEstimator

__all__ = [
    "PLACEBOS",
    "AlignedPairEstimator",
    "ContrastiveEstimator",
    "FrozenScorer",
    "MixtureEstimator",
    "NullEstimator",
    "OptimalPolicyEstimator",
    "PlaceboEstimator",
    "PrincipleEstimator",
    "ResponseEstimator",
    "ShuffledEstimator",
    "placebo",
]
