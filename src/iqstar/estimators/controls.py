"""Controls, which stand beside every published result: what is left without what matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from iqstar.chat import ChatFormat
from iqstar.distributions import LogLinear, Reindexed, TokenDistributions
from iqstar.errors import InputError
from iqstar.estimators.base import KEY, FrozenScorer, OptimalPolicyEstimator
from iqstar.policy import PolicySpec


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
    "A sundial shows the hour by the shadow of a rod on a marked plate, and the shadow is shortest "
    "at noon. The plate is tilted by an angle that depends on the latitude of the place.",
    "Barley is a cereal grass that grows in cool climates, and its grains sit in two or six rows "
    "along the ear. Some of it is sown in autumn, some in spring, and it ripens in early summer.",
)
"""Plain facts without an address to anybody, told in place of principles, in this order."""


class PlaceboEstimator(OptimalPolicyEstimator):
    """Control: another estimator with its principles replaced by unrelated facts of equal length.

    What it gains is owed to *any* text in that place, not to the principle's content. The first
    principle becomes one text, an antiprinciple another, each as long in tokens, to a word. There
    are four such texts.

    Args:
        estimator: The estimator whose principles are replaced, four at most.
    """

    def __init__(self, estimator: OptimalPolicyEstimator) -> None:
        super().__init__()
        self.estimator = estimator
        self._rewritten = False

    def setup(self, spec: PolicySpec, chat: ChatFormat, precision: str) -> None:
        """See :meth:`OptimalPolicyEstimator.setup`.

        Raises:
            InputError: If the estimator has no principles, or too many.
        """
        if not self._rewritten:
            sources = iter(PLACEBOS)
            self.estimator.rewrite(lambda text: placebo(text, _next_of(sources), chat))
            self._rewritten = True
        self.estimator.setup(spec, chat, precision)

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

    def setup(self, spec: PolicySpec, chat: ChatFormat, precision: str) -> None:
        """See :meth:`OptimalPolicyEstimator.setup`."""
        self.estimator.setup(spec, chat, precision)

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


def _next_of(sources: Iterator[str]) -> str:
    text = next(sources, None)
    if text is None:
        raise InputError(
            f"{KEY}.estimator: PlaceboEstimator has {len(PLACEBOS)} unrelated texts, and the "
            "estimator inside it has more principles; leave some of its parts out"
        )
    return text


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
