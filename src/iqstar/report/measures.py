"""Figures of one side, each with its interval over prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from iqstar.intervals import Interval, bootstrap, mean_interval
from iqstar.judges import is_refusal
from iqstar.paired_responses import Response

NORMAL_95 = 1.959964
"""Half the width of a 95% interval, in standard errors."""


def side_measures(responses: Sequence[Response], units: Sequence[int]) -> dict[str, Interval]:
    """What the judges have no part in.

    Args:
        responses: Of one side.
        units: The prompt of each, by number; a prompt's responses are drawn together.

    Returns:
        ``kl`` (nats a token, all NaN where it was not measured), ``tokens``, ``truncation_rate``,
        ``distinct_1`` to ``distinct_3`` and ``refusal_rate``.
    """
    texts = [r.text for r in responses]
    return {
        "kl": kl_interval(responses, units),
        "tokens": mean_interval([float(r.tokens) for r in responses], units),
        "truncation_rate": mean_interval([float(r.truncated) for r in responses], units),
        **{f"distinct_{n}": distinct_interval(texts, units, n) for n in (1, 2, 3)},
        "refusal_rate": mean_interval([float(is_refusal(text)) for text in texts], units),
    }


def kl_interval(responses: Sequence[Response], units: Sequence[int]) -> Interval:
    """KL(π_θ‖π_ref), a mean over tokens: Σ KL / Σ tokens, resampled by prompt."""
    sums = np.array([math.nan if r.kl is None else r.kl for r in responses])
    tokens = np.array([r.tokens for r in responses])
    return bootstrap(lambda rows: float(sums[rows].sum() / max(tokens[rows].sum(), 1)), units)


def distinct_interval(texts: Sequence[str], units: Sequence[int], n: int) -> Interval:
    """:func:`iqstar.metrics.distinct_n`, with a jackknife interval over prompts.

    A bootstrap draws prompts twice, whose n-grams are then not distinct: its interval would lie
    below the value. The jackknife leaves each prompt out in turn: with m prompts and figures d_i,
    SE² = (m−1)/m Σ (d_i − d̄)², and the interval is value ± 1.96 SE, inside [0, 1] (Efron &
    Tibshirani 1993, §11).

    Args:
        texts: The responses.
        units: The prompt of each.
        n: Length of the n-grams.
    """
    grams: dict[int, Counter[tuple[str, ...]]] = {}
    for text, unit in zip(texts, units, strict=True):
        words = text.lower().split()
        own = grams.setdefault(unit, Counter())
        own.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    holders = Counter(gram for own in grams.values() for gram in own)
    total = sum(own.total() for own in grams.values())
    value = len(holders) / total if total else math.nan
    rest = [
        (len(holders) - sum(holders[gram] == 1 for gram in own)) / (total - own.total())
        for own in grams.values()
        if total > own.total()
    ]
    if len(rest) < 2:
        return Interval(value=value, low=math.nan, high=math.nan)
    error = NORMAL_95 * math.sqrt((len(rest) - 1) * float(np.var(rest)))
    return Interval(value=value, low=max(value - error, 0.0), high=min(value + error, 1.0))
