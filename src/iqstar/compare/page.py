"""The comparison's page: a table, the claims it can check, and plots beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iqstar.compare.curves import (
    Choice,
    Curve,
    best,
    gain,
    kl_at,
    mean,
    responses_to_reach,
)
from iqstar.compare.plan import Comparison
from iqstar.errors import InputError
from iqstar.intervals import mean_interval

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
        "| method | rate | seeds | responses | score before | best score | KL there | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in comparison.methods:
        own = list(curves.get(method.name, {}).values())
        if not own:
            continue
        tops = [best(curve) for curve in own]
        rate = chosen[method.family].rate
        cells = [
            method.name + (" (control)" if method.control else ""),
            f"{rate:.0e}",
            f"{len(own)}{' (one seed)' if len(own) == 1 else ''}",
            str(max(point.responses for curve in own for point in curve)),
            _many([curve[0].score for curve in own]),
            _many([top.score for top in tops]),
            _many([top.kl for top in tops]),
            _many([gain(curve) for curve in own]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Learning rates (score at the end of each sweep):", ""]
    lines += ["| family | " + "rates and scores | chosen |", "|---|---|---|"]
    for name, choice in chosen.items():
        tried = ", ".join(f"{rate:.0e}: {_number(s)}" for rate, s in sorted(choice.scores.items()))
        edge = ", at the edge of the sweep" if choice.at_edge else ""
        lines.append(f"| {name} | {tried} | {choice.rate:.0e}{edge} |")
    missing = [
        f"{method.name} (seed {seed})"
        for method in comparison.methods
        for seed in method.seeds
        if seed not in curves.get(method.name, {})
    ]
    lines += ["", f"Not done: {', '.join(missing) if missing else 'nothing is missing'}."]
    return "\n".join(lines) + "\n"


def against(curves: Curves, ours: str, theirs: str) -> dict[str, float]:
    """How fast one method reaches what another one ends with.

    Args:
        curves: The finished runs.
        ours: The method in question.
        theirs: The one whose best score is the mark, the mean over its seeds.

    Returns:
        ``score`` (the mark), ``responses`` and ``kl`` of both sides there (``ours_…``: the mean
        over seeds that reach it), ``response_ratio``, ``kl_ratio`` and ``reached`` (share of our
        seeds that do). NaN where nothing is known.
    """
    tops = [best(curve) for curve in curves.get(theirs, {}).values()]
    mark = mean(top.score for top in tops)
    own = list(curves.get(ours, {}).values())
    reached = [responses_to_reach(curve, mark) for curve in own]
    found = {
        "score": mark,
        "theirs_responses": mean(float(top.responses) for top in tops),
        "theirs_kl": mean(top.kl for top in tops),
        "ours_responses": mean(reached),
        "ours_kl": mean(kl_at(curve, mark) for curve in own),
        "reached": mean(float(not math.isnan(value)) for value in reached),
    }
    return found | {
        "response_ratio": _ratio(found["ours_responses"], found["theirs_responses"]),
        "kl_ratio": _ratio(found["ours_kl"], found["theirs_kl"]),
    }


def claims(comparison: Comparison, curves: Curves) -> str:
    """Every method that is no control against every other one, where both are finished."""
    names = [m.name for m in comparison.methods if not m.control and m.name in curves]
    lines = [
        "| to reach the best score of | score | method | share of its responses | of its KL "
        "| seeds that reach it |",
        "|---|---|---|---|---|---|",
    ]
    for theirs in names:
        for ours in names:
            if ours == theirs:
                continue
            found = against(curves, ours, theirs)
            cells = [theirs, _number(found["score"]), ours]
            cells += [_number(found["response_ratio"]), _number(found["kl_ratio"])]
            cells.append(f"{found['reached']:.0%}")
            lines.append(f"| {' | '.join(cells)} |")
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
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plots need matplotlib; install it with: pip install 'iqstar[compare]'"
        ) from error
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
        figure.savefig(file, metadata={"Date": None})
        files.append(file)
    return files


def _columns(curves: Sequence[Curve], axis: str) -> tuple[list[float], list[float]]:
    """Means over curves at each evaluation, as far as all have it."""
    rows = list(zip(*curves, strict=False))
    return (
        [mean(float(getattr(point, axis)) for point in row) for row in rows],
        [mean(point.score for point in row) for row in rows],
    )


def _many(values: Sequence[float]) -> str:
    """A value, or the mean over seeds with its bootstrap interval."""
    if len(values) == 1:
        return _number(values[0])
    return format(mean_interval(values), ".3f")


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.nan


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
