"""What scores a response. A judge measures; it never trains Inverse-Q*."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from iqstar.errors import InputError
from iqstar.mdp import Prompt


class Judge(ABC):
    """Scores responses by their text.

    Attributes:
        name: What the score is called in tables, curves and ``summary.json``.
        version: Of whatever decides the score; scores of two versions are not compared.
    """

    name: str
    version: str

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One score for each response.

        Args:
            prompts: What was asked, one for each response.
            responses: The responses' texts.

        Returns:
            The scores, higher is better; NaN where a response could not be scored.

        Raises:
            ValueError: If there are not as many prompts as responses.
        """


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
            raise InputError(
                "VaderJudge needs the package vaderSentiment; "
                "install it with: pip install 'iqstar[judges]'"
            ) from error
        self.version = version("vaderSentiment")
        self._analyzer: Any = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """VADER's compound score of each response; see :meth:`Judge.score`."""
        if len(prompts) != len(responses):
            raise ValueError(f"score: {len(prompts)} prompts, {len(responses)} responses")
        return [float(self._analyzer.polarity_scores(r)["compound"]) for r in responses]
