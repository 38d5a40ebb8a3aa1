"""The comparison's page: a table, the claims it can check, and plots beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from statistics import median
from typing import Any

from iqstar.compare.curves import (
    Choice,
    Curve,
    best,
    gain,
    kl_at,
    mean,
    responses_to_reach,
    score_at,
)
from iqstar.compare.plan import Comparison
from iqstar.errors import missing_packages

AXES = (
    ("responses", "sampled responses"),
    ("steps", "optimiser steps"),
    ("seconds", "seconds of training"),
)

Curves = Mapping[str, Mapping[int, Curve]]
"""Method → seed → evaluations."""


def markdown(comparison: Comparison, curves: Curves, chosen: Mapping[str, Choice]) -> str:
    """The tables of the finished runs, and what is missing.

    Args:
        comparison: What was to be run.
        curves: What is finished.
        chosen: The families' learning rates.
    """
    lines = [
        "| method | rate | seeds | responses | score before | best score | KL there | gain "
        "| score at the end | KL at the end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in comparison.methods:
        own = list(curves.get(method.name, {}).values())
        if not own:
            continue
        tops = [best(curve) for curve in own]
        rate = chosen[method.family].rate
        cells = [
            method.name + (" (control)" if method.control else ""),
            f"{rate:g}",
            f"{len(own)}{' (one seed)' if len(own) == 1 else ''}",
            str(max(point.responses for curve in own for point in curve)),
            _many([curve[0].score for curve in own]),
            _many([top.score for top in tops]),
            _many([top.kl for top in tops]),
            _many([gain(curve) for curve in own]),
            _many([curve[-1].score for curve in own]),
            _many([curve[-1].kl for curve in own]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Learning rates (score at the end of each sweep):", ""]
    lines += ["| family | " + "rates and scores | chosen |", "|---|---|---|"]
    for name, choice in chosen.items():
        scores = sorted(choice.scores.items())
        tried = ", ".join(f"{rate:g}: {_number(score)}" for rate, score in scores) or "not swept"
        edge = ", at the edge of the sweep" if choice.at_edge else ""
        lines.append(f"| {name} | {tried} | {choice.rate:g}{edge} |")
    missing = [
        f"{method.name} (seed {seed})"
        for method in comparison.methods
        for seed in method.seeds
        if seed not in curves.get(method.name, {})
    ]
    lines += ["", "Of several seeds: their mean, and their lowest and highest figure.", ""]
    lines.append(f"Not done, or diverged: {', '.join(missing) if missing else 'none'}.")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Against:
    """How one run compares to the best evaluation of another; NaN where it never gets there.

    Args:
        responses: Sampled until it has that score, as a share of the other's.
        kl: When it has that score, as a share of the other's.
        gain: When it has that KL, as a share of the other's.
    """

    responses: float
    kl: float
    gain: float


def against(ours: Curve, theirs: Curve) -> Against:
    """One run against the best evaluation of another.

    Args:
        ours: The run in question.
        theirs: The one whose best score and whose KL there are the marks.
    """
    mark = best(theirs)
    return Against(
        responses=_ratio(responses_to_reach(ours, mark.score), float(mark.responses)),
        kl=_ratio(kl_at(ours, mark.score), mark.kl),
        gain=_ratio(score_at(ours, mark.kl) - ours[0].score, gain(theirs)),
    )


def claims(comparison: Comparison, curves: Curves) -> str:
    """Every finished method that is no control against every other one, and the controls.

    Args:
        comparison: What was to be run.
        curves: What is finished.
    """
    names = [m.name for m in comparison.methods if not m.control and m.name in curves]
    lines = [
        "| against the best of | its score | method | share of its responses to that score "
        "| of its KL at that score | of its gain at its KL | pairs that reach that score |",
        "|---|---|---|---|---|---|---|",
    ]
    for theirs, ours in permutations(names, 2):
        marks = [curve for curve in curves[theirs].values() if gain(curve) > 0]
        if not marks:
            continue
        found = [against(o, t) for o, t in product(curves[ours].values(), marks)]
        cells = [theirs, _number(mean(best(curve).score for curve in marks)), ours]
        cells += [_never([f.responses for f in found]), _never([f.kl for f in found])]
        cells += [_range([f.gain for f in found])]
        reach = sum(not math.isnan(f.responses) for f in found)
        cells.append(f"{reach} of {len(found)}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| control | of | share of its gain |", "|---|---|---|"]
    for control in comparison.methods:
        real = comparison.families[control.family].sweep
        if control.control and control.name in curves and real in curves:
            pairs = product(curves[control.name].values(), curves[real].values())
            shares = [_ratio(gain(own), gain(other)) for own, other in pairs]
            lines.append(f"| {control.name} | {real} | {_range(shares)} |")
    lines += [
        "",
        "Medians over all pairs of a run of one and a run of the other, and their range. A run",
        "that never reaches the score ranks last; for the gain, pairs with that KL count. A run",
        "that was never better than before its training is not used as a target.",
    ]
    return "\n".join(lines) + "\n"


def plot(comparison: Comparison, curves: Curves, folder: Path) -> list[Path]:
    """Writes the plots: score over each axis, and score over KL.

    Args:
        comparison: For the order of the methods.
        curves: The finished runs; a method's seeds are drawn thin, their mean thick.
        folder: Where to.

    Returns:
        The files.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_packages("drawing plots", "matplotlib") from error
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for axis, label in (*AXES, ("kl", "KL to the reference, nats per token")):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, method in enumerate(m for m in comparison.methods if m.name in curves):
            own = list(curves[method.name].values())
            style: dict[str, Any] = {
                "color": f"C{number % 10}",
                "linestyle": "--" if method.control else "-",
            }
            for curve in own:
                axes.plot(*_columns([curve], axis), **style, alpha=0.3, linewidth=0.8)
            axes.plot(*_columns(own, axis), **style, marker="o", markersize=3, label=method.name)
        axes.set_xlabel(label)
        axes.set_ylabel("judge's score on held-out prompts")
        axes.legend(fontsize=8)
        file = folder / f"{axis}.svg"
        with rc_context({"svg.hashsalt": axis}):  # the same curves give the same file
            figure.savefig(file, metadata={"Date": None})
        files.append(file)
    return files


def _columns(curves: Sequence[Curve], axis: str) -> tuple[list[float], list[float]]:
    """Means over curves at each evaluation that all have."""
    common = set.intersection(*({point.steps for point in curve} for curve in curves))
    rows = [[p for curve in curves for p in curve if p.steps == step] for step in sorted(common)]
    return (
        [mean(float(getattr(point, axis)) for point in row) for row in rows],
        [mean(point.score for point in row) for row in rows],
    )


def _many(values: Sequence[float]) -> str:
    """A value, or the mean over seeds with its range."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return _number(mean(known))
    return f"{mean(known):.3f} ({min(known):.3f}–{max(known):.3f})"


def _range(values: Sequence[float]) -> str:
    """The median of what is known, with its range."""
    known = [value for value in values if not math.isnan(value)]
    return _never(known) if known else "–"


def _never(values: Sequence[float]) -> str:
    """The median with its range; NaN is never."""
    shares = sorted(math.inf if math.isnan(value) else value for value in values)
    text = [f"{v:.2f}" if math.isfinite(v) else "never" for v in (median(shares), *shares)]
    return text[0] if text[1] == text[-1] else f"{text[0]} ({text[1]}–{text[-1]})"


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.nan


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
