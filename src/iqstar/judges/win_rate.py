"""A pairwise judge as a curve: how often responses beat those of the data set."""

from __future__ import annotations

import math
from collections.abc import Sequence

from iqstar.judges.base import Judge, check_pairs
from iqstar.judges.pairwise import PairwiseJudge
from iqstar.mdp import Prompt

SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0, None: math.nan}


class WinRateJudge(Judge):
    """1 where a response beats the data set's own, ½ for a tie, 0 where it loses.

    The mean is the win rate against a baseline that stays the same. A prompt without a response
    of the data set's, or without a verdict, has no score.

    Args:
        pairwise: Compares.
    """

    name = "win_rate"

    def __init__(self, pairwise: PairwiseJudge) -> None:
        self.pairwise = pairwise
        self.version = pairwise.version

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """How each response compares with the data set's; see :meth:`Judge.score`."""
        check_pairs(prompts, responses)
        scores = [math.nan] * len(responses)
        places = [i for i, prompt in enumerate(prompts) if prompt.response is not None]
        compared = self.pairwise.compare(
            [prompts[i] for i in places],
            [responses[i] for i in places],
            [prompts[i].response or "" for i in places],
        )
        for place, comparison in zip(places, compared, strict=True):
            scores[place] = SCORES[comparison.verdict]
        return scores
