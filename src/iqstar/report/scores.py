"""The judges' scores of both sides; a judge that fails leaves a gap, not a crash."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from iqstar.atomic import written_beside
from iqstar.judges import HarmJudge, Judge, WinRateJudge, asked
from iqstar.judges.base import check_named
from iqstar.paired_responses import Pair

SIDES = ("policy", "reference")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one judge said.

    Args:
        name: The judge's, unlike that of any other judge of the report.
        version: Of what decides the score.
        policy: The scores of the policy's responses; NaN where there is none.
        reference: Those of the reference's.
        measures_safety: Whether the score is the probability that the response is safe.
        higher_is_better: Whether a response with a higher score is the better one.
        error: Why responses were not scored, if the judge failed.
    """

    name: str
    version: str
    policy: list[float]
    reference: list[float]
    measures_safety: bool = False
    higher_is_better: bool = True
    error: str | None = None


def score_pairs(judge: Judge, name: str, pairs: Sequence[Pair]) -> Scores:
    """Has a judge score both sides, one after the other.

    One that compares says how often the policy's response beats the reference's to the same
    prompt; the reference has the rest.

    Args:
        judge: The judge.
        name: What to call it.
        pairs: The responses.
    """
    compares = isinstance(judge, WinRateJudge)
    found: dict[str, list[float]] = {}
    error = None
    for side in SIDES[:1] if compares else SIDES:
        prompts = [
            replace(pair.prompt, response=pair.reference.text) if compares else pair.prompt
            for pair in pairs
        ]
        texts = [getattr(pair, side).text for pair in pairs]
        found[side], failure = asked(judge, prompts, texts)
        if failure is not None:  # the other judges still count
            error = " ".join(f"{type(failure).__name__}: {failure}".split())
    return Scores(
        name=name,
        version=judge.version,
        policy=found["policy"],
        reference=found.get("reference") or [1 - score for score in found["policy"]],
        measures_safety=isinstance(judge, HarmJudge) or getattr(judge, "measures_safety", False),
        higher_is_better=judge.higher_is_better,
        error=error,
    )


def distinct_judges(judges: Sequence[Judge]) -> dict[str, Judge]:
    """Judges by name; two of one name are told apart by version, or are the same judge."""
    for judge in judges:
        check_named(judge)
    unique = list({(judge.name, judge.version): judge for judge in reversed(judges)}.values())
    names = Counter(judge.name for judge in unique)
    return {
        judge.name if names[judge.name] == 1 else judge.identity: judge
        for judge in reversed(unique)
    }


def write_scores(path: Path, pairs: Sequence[Pair], scores: Sequence[Scores]) -> None:
    """Writes every response's scores as JSON lines, in the order of ``responses.jsonl``."""
    with written_beside(path) as part, part.open("w", encoding="utf-8") as file:
        for row, pair in enumerate(pairs):
            sides = {
                side: {s.name: finite(getattr(s, side)[row]) for s in scores} for side in SIDES
            }
            line = {"number": pair.number, "sample": pair.sample, **sides}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def finite(value: float) -> float | None:
    """The value; None where JSON has no number for it."""
    return value if math.isfinite(value) else None
