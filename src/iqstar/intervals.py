"""Bootstrap intervals: what a figure might have been with other prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Share of the resamples inside of an interval."""
RESAMPLES = 1000
"""How often units are drawn anew, with replacement."""
SEED = 0
"""Of the drawing."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and its percentile interval; all NaN where there is nothing to measure.

    Args:
        value: The figure on all rows.
        low: Lower end of the interval.
        high: Its upper end.
    """

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Writes ``0.61 (0.55–0.67)``, each number by the format, ``.2f`` by default."""
        spec = spec or ".2f"
        return f"{self.value:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    units: Sequence[Hashable],
) -> Interval:
    """A percentile bootstrap over units, whose rows are drawn together (Efron & Tibshirani 1993).

    Responses to one prompt resemble each other: drawn one by one they would make the interval too
    narrow. Resamples in which the statistic is NaN (an AUC without one of its classes) are left
    out.

    Args:
        statistic: The figure of some rows, given their indices, which may repeat.
        units: The unit (the prompt) of every row.
    """
    if not units:
        return Interval(value=math.nan, low=math.nan, high=math.nan)
    rows: dict[Hashable, list[int]] = {}
    for row, unit in enumerate(units):
        rows.setdefault(unit, []).append(row)
    groups = [np.array(group, dtype=np.intp) for group in rows.values()]
    value = float(statistic(np.arange(len(units), dtype=np.intp)))
    random = np.random.default_rng(SEED)
    found = [
        float(statistic(np.concatenate([groups[i] for i in drawn])))
        for drawn in random.integers(len(groups), size=(RESAMPLES, len(groups)))
    ]
    finite = [figure for figure in found if not math.isnan(figure)]
    if not finite:
        return Interval(value=value, low=math.nan, high=math.nan)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=value, low=float(low), high=float(high))


def mean_interval(values: Sequence[float], units: Sequence[Hashable] | None = None) -> Interval:
    """The mean of all values that are not NaN, with its interval.

    Args:
        values: One for each row.
        units: As for :func:`bootstrap`; every row is its own unit by default.
    """
    kept = [i for i, value in enumerate(values) if not math.isnan(value)]
    array = np.array([values[i] for i in kept])
    names = [i if units is None else units[i] for i in kept]
    return bootstrap(lambda rows: float(array[rows].mean()), names)
