"""How well credit ranks preferred responses over others, with their length controlled for.

A response's score is Σ_t A*_t, which (5) ties to its reward, or the mean of A*_t over its tokens.
Long responses have larger sums, and people may prefer short ones, so every figure stands beside
what length alone achieves, and beside the figure of what a straight line in length leaves over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from iqstar.intervals import Interval, bootstrap

Numbers = NDArray[np.float64]
Rows = NDArray[np.intp]
Figures = dict[str, dict[str, Interval]]
"""Score (``sum``, ``mean``, ``length``) → figure → what it is, with its interval."""
SCORES = ("sum", "mean")
MATCHED_RATIO = 1.25
"""Largest ratio of two lengths that count as equal."""
LEAST = 10
"""Matched pairs, or unsafe answers of a category, below which nothing is measured."""


def pair_share(differences: Numbers) -> float:
    """Share of pairs whose difference, chosen minus rejected, is positive; a tie counts half."""
    if not len(differences):
        return math.nan
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def auc(values: Numbers, preferred: NDArray[np.bool_]) -> float:
    """Probability that a preferred response scores above another; a tie counts half.

    The same as counting over all couples of the two classes, by ranks (Mann & Whitney 1947). NaN
    without one of the classes.
    """
    ones = int(preferred.sum())
    zeros = len(values) - ones
    if not (ones and zeros):
        return math.nan
    ranks = float(average_ranks(values)[preferred].sum())
    return (ranks - ones * (ones + 1) / 2) / (ones * zeros)


def average_ranks(values: Numbers) -> Numbers:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[place], dtype=np.float64)


def without_length(values: Numbers, lengths: Numbers) -> Numbers:
    """What a straight line in length, by least squares over all responses, leaves of the values.

    The line is blind to labels. Where they go along with length it takes that part of the signal
    away too.
    """
    centred = lengths - lengths.mean()
    return values - values.mean() - _slope(values, centred) * centred


def difference_without_length(differences: Numbers, longer_by: Numbers) -> Numbers:
    """The same for pairs: the line goes through the origin, where both sides are equally long.

    An intercept would be the very preference that is looked for. Without one, the line stays the
    same whichever side of a pair is the chosen one.

    Args:
        differences: Scores of the chosen minus those of the rejected.
        longer_by: Likewise their lengths.
    """
    return differences - _slope(differences, longer_by) * longer_by


def _slope(values: Numbers, lengths: Numbers) -> float:
    squares = float(lengths @ lengths)
    return float(lengths @ values) / squares if squares > 0 else 0.0


def response_scores(credits: Sequence[Numbers]) -> dict[str, Numbers]:
    """``sum`` and ``mean`` of each response's A*, and its ``length`` in tokens."""
    lengths = np.array([len(c) for c in credits], dtype=np.float64)
    sums = np.array([c.sum() for c in credits], dtype=np.float64)
    return {"sum": sums, "mean": sums / lengths, "length": lengths}


def pair_figures(
    chosen: Sequence[Numbers], rejected: Sequence[Numbers], units: Sequence[Hashable]
) -> tuple[Figures, int]:
    """Shares and AUCs of chosen over rejected.

    Args:
        chosen: A* of the tokens of each chosen response.
        rejected: Likewise of the rejected one of the same pair.
        units: What each pair is drawn with in the bootstrap.

    Returns:
        The figures, and the number of pairs of matched length (no figure below :data:`LEAST`).
    """
    better, worse = response_scores(chosen), response_scores(rejected)
    longer_by = better["length"] - worse["length"]
    ratio = np.maximum(better["length"], worse["length"]) / np.minimum(
        better["length"], worse["length"]
    )
    matched = np.flatnonzero(ratio <= MATCHED_RATIO)

    def pooled(score: str, rows: Rows, adjusted: bool) -> float:
        values = np.concatenate([better[score][rows], worse[score][rows]])
        if adjusted:
            lengths = np.concatenate([better["length"][rows], worse["length"][rows]])
            values = without_length(values, lengths)
        return auc(values, np.arange(len(values)) < len(rows))

    def compare(score: str) -> dict[str, Interval]:
        gap = better[score] - worse[score]
        found = {
            "share": bootstrap(lambda rows: pair_share(gap[rows]), units),
            "auc": bootstrap(lambda rows: pooled(score, rows, adjusted=False), units),
        }
        if score == "length":
            return found
        found["share_without_length"] = bootstrap(
            lambda rows: pair_share(difference_without_length(gap[rows], longer_by[rows])), units
        )
        found["auc_without_length"] = bootstrap(
            lambda rows: pooled(score, rows, adjusted=True), units
        )
        if len(matched) >= LEAST:
            found["share_matched"] = bootstrap(
                lambda rows: pair_share(gap[matched][rows]), [units[i] for i in matched.tolist()]
            )
        return found

    return {score: compare(score) for score in (*SCORES, "length")}, len(matched)


def class_figures(
    scores: Mapping[str, Numbers], preferred: NDArray[np.bool_], units: Sequence[Hashable]
) -> Figures:
    """AUCs of the preferred class over the other.

    Args:
        scores: Those of :func:`response_scores`.
        preferred: Whether each response is of the preferred class.
        units: What each response is drawn with in the bootstrap.
    """

    def interval(score: str, adjust: Callable[[Numbers, Numbers], Numbers] | None) -> Interval:
        def statistic(rows: Rows) -> float:
            values = scores[score][rows]
            if adjust is not None:
                values = adjust(values, scores["length"][rows])
            return auc(values, preferred[rows])

        return bootstrap(statistic, units)

    found = {
        score: {"auc": interval(score, None), "auc_without_length": interval(score, without_length)}
        for score in SCORES
    }
    return {**found, "length": {"auc": interval("length", None)}}


def category_figures(
    scores: Mapping[str, Numbers],
    safe: NDArray[np.bool_],
    harms: Sequence[Sequence[str]],
    units: Sequence[Hashable],
) -> dict[str, tuple[int, Figures | None]]:
    """AUCs of all safe answers over the unsafe ones of each category of harm.

    An answer may be of several categories.

    Returns:
        Category → number of its unsafe answers, and the figures; None below :data:`LEAST`
        answers. The largest category comes first.
    """
    members = {
        name: np.array([name in of_row for of_row in harms]) & ~safe
        for name in sorted({name for of_row in harms for name in of_row})
    }
    found: dict[str, tuple[int, Figures | None]] = {}
    for name, unsafe in sorted(members.items(), key=lambda member: -int(member[1].sum())):
        count = int(unsafe.sum())
        rows = np.flatnonzero(safe | unsafe)
        part = {score: values[rows] for score, values in scores.items()}
        enough = count >= LEAST
        figures = (
            class_figures(part, safe[rows], [units[i] for i in rows.tolist()]) if enough else None
        )
        if count:
            found[name] = (count, figures)
    return found


def position_bins(longest: int) -> list[tuple[int, int]]:
    """Start and stop of ranges of token positions, 0–3, 4–7, 8–15 and on doubling."""
    bins = [(0, 4)]
    while bins[-1][1] < longest:
        stop = bins[-1][1]
        bins.append((stop, 2 * stop))
    return bins


def credit_by_position(
    credits: Sequence[Numbers], units: Sequence[Hashable], bins: Sequence[tuple[int, int]]
) -> list[tuple[int, Interval]]:
    """Number of tokens in each range of positions, and the mean of their A*."""
    found = []
    for start, stop in bins:
        parts = [c[start:stop] for c in credits]
        sums = np.array([part.sum() for part in parts])
        counts = np.array([len(part) for part in parts])

        def mean(rows: Rows, sums: Numbers = sums, counts: NDArray[np.int_] = counts) -> float:
            tokens = int(counts[rows].sum())
            return float(sums[rows].sum()) / tokens if tokens else math.nan

        found.append((int(counts.sum()), bootstrap(mean, units)))
    return found
