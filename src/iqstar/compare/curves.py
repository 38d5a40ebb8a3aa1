"""What came of the runs: their curves, the learning rates they chose, and what is read off."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from iqstar.compare.plan import Comparison, Family, Run, main_runs, sweep_runs


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a run.

    Args:
        responses: That training had sampled.
        steps: Optimiser steps done.
        seconds: That training had taken.
        score: The judge's mean over held-out responses; NaN where it gave none.
        kl: KL(π_θ‖π_ref), exact, nats per token.
    """

    responses: int
    steps: int
    seconds: float
    score: float
    kl: float


Curve = tuple[Point, ...]


def read_curve(folder: Path) -> Curve | None:
    """A finished run's evaluations, from its ``summary.json``; None where there is none.

    A run whose loss became NaN or infinite is finished, and has none.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return tuple(
        Point(
            responses=found["sampled"],
            steps=found["step"],
            seconds=found["seconds"],
            score=_number(found["metrics"].get("judge")),
            kl=_number(found["metrics"].get("kl")),
        )
        for found in summary["evaluations"]
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def best(curve: Curve) -> Point:
    """The evaluation with the highest score; the last one where no score is known."""
    known = [point for point in curve if not math.isnan(point.score)]
    return max(known, key=lambda point: point.score) if known else curve[-1]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A family's learning rate.

    Args:
        rate: The one whose run ended with the highest score.
        scores: Of all rates, at the end of their runs; none where there is only one.
        at_edge: Whether it is the lowest or the highest of several.
    """

    rate: float
    scores: Mapping[float, float]
    at_edge: bool


def choose(family: Family, scores: Mapping[float, float]) -> Choice:
    """The rate with the highest final score; a run that gave none cannot win.

    Args:
        family: Whose rates were tried.
        scores: Of each rate.
    """
    known = {rate: s for rate, s in scores.items() if not math.isnan(s)}
    rate = max(known, key=lambda r: known[r]) if known else family.rates[0]
    ends = (family.rates[0], family.rates[-1])
    return Choice(rate=rate, scores=scores, at_edge=family.swept and rate in ends)


def choices(comparison: Comparison, folder: Path) -> dict[str, Choice]:
    """The choice of every family that has one rate, or whose sweep is complete and has a score."""
    found: dict[str, dict[float, float]] = {}
    for run in sweep_runs(comparison):
        if (curve := read_curve(folder / run.name)) is not None:
            score = curve[-1].score if curve else math.nan
            found.setdefault(run.method.family, {})[run.rate] = score
    return {
        name: choose(family, found.get(name, {}))
        for name, family in comparison.families.items()
        if not family.swept or _is_known(family, found.get(name, {}))
    }


def _is_known(family: Family, scores: Mapping[float, float]) -> bool:
    """Whether all rates were tried, and not all of them failed."""
    return len(scores) == len(set(family.rates)) and not all(map(math.isnan, scores.values()))


def finished(comparison: Comparison, folder: Path) -> dict[str, dict[int, Curve]]:
    """The curves of the runs that are compared, by method and seed; of families with a rate."""
    rates = {name: choice.rate for name, choice in choices(comparison, folder).items()}
    curves: dict[str, dict[int, Curve]] = {}
    for run in main_runs(comparison, rates):
        if curve := read_curve(folder / run.name):
            curves.setdefault(run.method.name, {})[run.seed] = curve
    return curves


def responses_to_reach(curve: Curve, score: float) -> float:
    """Sampled responses at which a curve first reaches a score; NaN where it never does."""
    return _where(curve, "score", score, "responses")


def kl_at(curve: Curve, score: float) -> float:
    """KL at which a curve first reaches a score; NaN where it never does."""
    return _where(curve, "score", score, "kl")


def score_at(curve: Curve, kl: float) -> float:
    """Score at which a curve first reaches a KL; NaN where it never does."""
    return _where(curve, "kl", kl, "score")


def _where(curve: Curve, key: str, value: float, wanted: str) -> float:
    """What stands where a curve first reaches a value, between evaluations linearly."""
    known = [
        (float(getattr(point, key)), float(getattr(point, wanted)))
        for point in curve
        if not math.isnan(point.score)
    ]
    for (low, first), (high, second) in pairwise(known):
        if low >= value:
            return first
        if high >= value:
            return first + (value - low) / (high - low) * (second - first)
    return known[-1][1] if known and known[-1][0] >= value else math.nan


def gain(curve: Curve) -> float:
    """How much higher the best evaluation is than the one before training."""
    return best(curve).score - curve[0].score


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are numbers; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def pending(runs: Sequence[Run], folder: Path) -> list[Run]:
    """The runs that are not finished."""
    return [run for run in runs if read_curve(folder / run.name) is None]
