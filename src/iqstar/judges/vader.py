"""Sentiment by a lexicon."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from iqstar.errors import missing_packages
from iqstar.judges.base import Judge, check_pairs
from iqstar.mdp import Prompt


class VaderJudge(Judge):
    """Sentiment by the VADER lexicon: the compound score, from -1 to 1; the prompt is not read.

    A response without a word of the lexicon, also an empty one, is neutral: 0. VADER reads
    English, and tone only: it says nothing about whether an answer is right, safe or helpful.

    Raises:
        InputError: If the extra ``judges`` is not installed.
    """

    name = "vader"

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise missing_packages("VaderJudge", "vaderSentiment") from error
        self.version = version("vaderSentiment")
        self._analyzer: Any = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """VADER's compound score of each response; see :meth:`Judge.score`."""
        check_pairs(prompts, responses)
        return [float(self._analyzer.polarity_scores(r)["compound"]) for r in responses]
