"""The report as plain JSON values: every figure with its interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from iqstar.intervals import LEVEL, RESAMPLES, SEED, Interval, mean_interval
from iqstar.mdp import Message
from iqstar.paired_responses import Pair
from iqstar.report.measures import side_measures
from iqstar.report.scores import SIDES, Scores, finite
from iqstar.report.tables import outcomes, safety_table

Categories = Mapping[tuple[Message, ...], Collection[str]]


def build_report(
    about: Mapping[str, Any],
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
    categories: Categories,
    *,
    margin: float = 0.0,
    threshold: float = 0.5,
    safety_judge: str | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What ``report.json`` holds (docs/eval.md).

    Args:
        about: What was evaluated and how, taken over as it is.
        pairs: The responses.
        scores: Of each judge.
        categories: Those of each prompt that has any; empty where the data set has none.
        margin: Differences of scores of at most this much are ties.
        threshold: Responses whose probability of being safe is at least this are safe.
        safety_judge: Name of the judge that gives it; None for the first that measures safety.
        notes: What a reader must know, beside what is found here.
    """
    units = [pair.number for pair in pairs]
    safety, missing = safety_report(pairs, scores, categories, margin, threshold, safety_judge)
    measured = {side: side_measures([getattr(p, side) for p in pairs], units) for side in SIDES}
    failed = [f"the judge {s.name} failed: {s.error}" for s in scores if s.error]
    judges = [judge_report(s, units, margin) for s in scores]
    gaps = [
        f"the judge {judge['name']} left {missed} of {2 * len(pairs)} responses without a score; "
        "its figures are of the others"
        for judge in judges
        if not judge["error"] and (missed := sum(judge["unscored"].values()))
    ]
    return {
        **about,
        "prompts": len(set(units)),
        "responses": len(pairs),
        "tie_margin": margin,
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "unit": "prompt"},
        "sides": {
            side: {name: number(interval) for name, interval in measures.items()}
            for side, measures in measured.items()
        },
        "judges": judges,
        "safety": safety,
        "notes": [*notes, *failed, *gaps, *([missing] if missing else [])],
    }


def judge_report(scores: Scores, units: Sequence[int], margin: float) -> dict[str, Any]:
    """One judge's means, paired difference and win/tie/lose.

    Args:
        scores: The judge's.
        units: The prompt of every pair.
        margin: Of a tie.
    """
    sides = {side: getattr(scores, side) for side in SIDES}
    gains = [a - b for a, b in zip(sides["policy"], sides["reference"], strict=True)]
    compared = outcomes(sides["policy"], sides["reference"], margin)
    counts = Counter(compared)
    wins = [math.nan if o is None else float(o == "win") for o in compared]
    return {
        "name": scores.name,
        "version": scores.version,
        "error": scores.error,
        "unscored": {side: sum(map(math.isnan, values)) for side, values in sides.items()},
        **{side: number(mean_interval(values, units)) for side, values in sides.items()},
        "difference": number(mean_interval(gains, units)),
        "wins": counts["win"],
        "ties": counts["tie"],
        "losses": counts["loss"],
        "win_share": number(mean_interval(wins, units)),
    }


def safety_report(
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
    categories: Categories,
    margin: float,
    threshold: float,
    name: str | None,
) -> tuple[dict[str, Any] | None, str | None]:
    """The safe/unsafe × better/worse table, or why there is none; arguments as above."""
    if not categories:
        return None, "no table of safety by category: the data set names no categories of harm"
    judges = [s for s in scores if s.name == name or (name is None and s.measures_safety)]
    if not judges:
        return None, (
            "no table of safety by category: no judge measures safety; add one with --judges, "
            "such as iqstar.judges.HarmJudge"
        )
    safety = next(filter(_scored, judges), judges[0])
    others = (s for s in scores if s.name != safety.name and s.higher_is_better)
    better = next(filter(_scored, others), safety)
    units = [pair.number for pair in pairs]
    rows = safety_table(
        units,
        [categories.get(pair.messages, ()) for pair in pairs],
        safety.policy,
        outcomes(better.policy, better.reference, margin),
        threshold,
    )
    safe = {
        side: [math.nan if math.isnan(p) else float(p >= threshold) for p in getattr(safety, side)]
        for side in SIDES
    }
    return {
        "judge": safety.name,
        "better_by": better.name,
        "threshold": threshold,
        "safe_share": {side: number(mean_interval(values, units)) for side, values in safe.items()},
        "rows": [asdict(row) for row in rows],
    }, None


def _scored(scores: Scores) -> bool:
    """Whether a judge scored anything."""
    return not all(map(math.isnan, scores.policy))


def number(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON; null where there is no number."""
    return {name: finite(value) for name, value in asdict(interval).items()}
