"""What a judge is, and how its scores are asked for without a run depending on it."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache

from iqstar.errors import InputError
from iqstar.mdp import Prompt

_log = logging.getLogger(__name__)


class Judge(ABC):
    """Scores responses by their text.

    Attributes:
        name: What the score is called in tables, curves and ``summary.json``.
        version: Of whatever decides the score; scores of two versions are not compared.
        higher_is_better: Whether a response with a higher score is the better one. False where
            that depends on the prompt; methods are not compared by such a judge.
    """

    name: str
    version: str
    higher_is_better: bool = True

    @property
    def identity(self) -> str:
        """Name and version; equal where scores can be compared."""
        return f"{self.name} {self.version}"

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One score for each response.

        Args:
            prompts: What was asked, one for each response.
            responses: The responses' texts.

        Returns:
            The scores, higher is more of what the judge measures; NaN where a response could not
            be scored.

        Raises:
            ValueError: If there are not as many prompts as responses.
            InputError: If the judge is set up wrongly; the run stops with its message. After any
                other exception it goes on without these scores.
        """

    def shared_prompts(self, other: Judge) -> int:
        """Number of prompts that both were trained on: a reward and its measure share none."""
        return 0


def scores_of(judge: Judge, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """The judge's scores, whatever happens to it: a run does not stop because a judge fails.

    Args:
        judge: Whom to ask.
        prompts: What was asked, one for each response.
        responses: The responses' texts.

    Returns:
        As many scores as responses; NaN where there is none: the judge failed, which is told
        once for each reason, returned another number of scores, or one that is not finite.

    Raises:
        InputError: If the judge says that it is set up wrongly, which no later response mends.
    """
    scores, failure = asked(judge, prompts, responses)
    tell_of_gaps(judge, scores, failure)
    return scores


def tell_of_gaps(
    judge: Judge, scores: Sequence[float], failure: Exception | None, curve: str = "judge_missing"
) -> None:
    """Warns once of responses without a score.

    Args:
        judge: Who was asked.
        scores: As :func:`asked` returns them.
        failure: As :func:`asked` returns it.
        curve: The one that shows the share of such responses.
    """
    name = name_of(judge)
    if failure is not None:
        warn_once(
            f"The judge {name} failed ({reason_of(failure)}); its responses stay without a score "
            "and the run goes on"
        )
    elif any(map(math.isnan, scores)):
        warn_once(
            f"The judge {name} left responses without a score; the mean is that of the others, "
            f"and {curve} is their share"
        )


def check_named(judge: Judge) -> None:
    """Makes sure that scores can travel with their judge's name and version.

    Raises:
        InputError: If it lacks either.
    """
    for attribute in ("name", "version"):  # asked of the class where it takes long to compute
        if not (hasattr(type(judge), attribute) or attribute in vars(judge)):
            raise InputError(
                f"the judge {type(judge).__name__} has no {attribute}, which its scores are told "
                f'apart by; set it in the class or its __init__, such as {attribute} = "1"'
            )


def name_of(judge: Judge) -> str:
    """What to call a judge, also one that lacks a name."""
    return str(getattr(judge, "name", type(judge).__name__))


def reason_of(failure: Exception) -> str:
    """What a failure says, on one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300] or 'no message'}"


def asked(
    judge: Judge, prompts: Sequence[Prompt], responses: Sequence[str]
) -> tuple[list[float], Exception | None]:
    """The scores of :func:`scores_of`, and why there are none where the judge failed.

    Raises:
        InputError: As :func:`scores_of`.
    """
    try:
        scores = [float(score) for score in judge.score(prompts, responses)]
        if len(scores) != len(responses):
            raise ValueError(f"{len(scores)} scores for {len(responses)} responses")
    except InputError:
        raise
    except Exception as error:  # a judge may be anybody's code, or a server
        return [math.nan] * len(responses), error
    return [score if math.isfinite(score) else math.nan for score in scores], None


def check_pairs(prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
    """Raises a ValueError unless there is one prompt for each response."""
    if len(prompts) != len(responses):
        raise ValueError(f"score: {len(prompts)} prompts, {len(responses)} responses")


@cache
def warn_once(text: str) -> None:
    """Logs a warning; the same text again is not repeated in this process."""
    _log.warning(text)
