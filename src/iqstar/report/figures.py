"""Plots as SVG text: no script, no style of their own, every text escaped.

Colours are those of the page's classes ``policy``, ``reference``, ``win``, ``tie`` and ``loss``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from iqstar.report.scores import SIDES

WIDTH, HEIGHT, MARGIN = 460.0, 220.0, 34.0
BINS = 20
POINTS = 500
"""Most responses of a side in a scatter plot."""


def histogram(title: str, values: Mapping[str, Sequence[float]]) -> str:
    """Shares of the values of each side, in bins of equal width; empty without a number.

    Args:
        title: What is shown.
        values: Side → its values; NaN are left out.
    """
    kept = {side: [v for v in own if math.isfinite(v)] for side, own in values.items()}
    every = [v for own in kept.values() for v in own]
    if not every:
        return ""
    low, high = _range(every)
    counts = {side: [0] * BINS for side in kept}
    for side, own in kept.items():
        for value in own:
            counts[side][min(int((value - low) / (high - low) * BINS), BINS - 1)] += 1
    shares = {side: [c / max(sum(own), 1) for c in own] for side, own in counts.items()}
    top = max(share for own in shares.values() for share in own)
    step = (WIDTH - 2 * MARGIN) / BINS
    width = 0.9 * step / len(shares)
    bars = []
    for place, (side, own) in enumerate(shares.items()):
        for number, share in enumerate(own):
            height = share / top * (HEIGHT - 2 * MARGIN)
            x = MARGIN + number * step + place * width
            bars.append(
                f'<rect class="{side}" x="{x:.1f}" y="{HEIGHT - MARGIN - height:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}"/>'
            )
    axes = _axes((low, high), (0.0, top), "score", "share")
    return _svg(title, [*bars, *axes, *_legend()])


def scatter(title: str, points: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Score by length, a dot for each of the first responses; empty without a number.

    Args:
        title: What is shown.
        points: Side → tokens and score of its responses; NaN are left out.
    """
    kept = {
        side: [point for point in own if math.isfinite(point[1])][:POINTS]
        for side, own in points.items()
    }
    every = [point for own in kept.values() for point in own]
    if not every:
        return ""
    across, up = _range([x for x, _ in every]), _range([y for _, y in every])
    dots = [
        f'<circle class="{side}" cx="{_place(x, across, WIDTH):.1f}" '
        f'cy="{HEIGHT - _place(y, up, HEIGHT):.1f}" r="2.5"/>'
        for side, own in kept.items()
        for x, y in own
    ]
    return _svg(title, [*dots, *_axes(across, up, "tokens", "score"), *_legend()])


def means(title: str, judge: Mapping[str, Any]) -> str:
    """A judge's mean of each side as a bar from 0, with its interval; empty without a number."""
    found = {side: judge[side] for side in SIDES if judge[side]["value"] is not None}
    ends = [v for interval in found.values() for v in interval.values() if v is not None]
    if not ends:
        return ""
    across = _range([*ends, 0.0])
    zero, height = _place(0.0, across, WIDTH), 2 * MARGIN + 40 * len(found)
    marks = []
    for row, (side, interval) in enumerate(found.items()):
        y, end = MARGIN + 40 * row, _place(interval["value"], across, WIDTH)
        marks.append(
            f'<rect class="{side}" x="{min(zero, end):.1f}" y="{y:g}" '
            f'width="{abs(end - zero):.1f}" height="26"/>'
        )
        if interval["low"] is not None:
            low, high = (_place(interval[name], across, WIDTH) for name in ("low", "high"))
            marks.append(f'<path class="line" d="M{low:.1f} {y + 13:g}H{high:.1f}"/>')
    return _svg(title, [*marks, *_axes(across, None, "score", "", height), *_legend()], height)


def outcome_bar(title: str, judge: Mapping[str, Any]) -> str:
    """Wins, ties and losses as parts of one bar; empty where nothing was compared."""
    counts = {"win": judge["wins"], "tie": judge["ties"], "loss": judge["losses"]}
    total = sum(counts.values())
    if not total:
        return ""
    x, parts = float(MARGIN), []
    for name, count in counts.items():
        width = count / total * (WIDTH - 2 * MARGIN)
        parts.append(
            f'<rect class="{name}" x="{x:.1f}" y="{MARGIN:g}" width="{width:.1f}" height="26"/>'
        )
        if count:
            parts.append(_text(x + width / 2, MARGIN + 44, f"{name} {count}", "middle"))
        x += width
    return _svg(title, parts, 3 * MARGIN)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis, never equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _place(value: float, ends: tuple[float, float], size: float) -> float:
    return MARGIN + (value - ends[0]) / (ends[1] - ends[0]) * (size - 2 * MARGIN)


def _axes(
    across: tuple[float, float],
    up: tuple[float, float] | None,
    x_name: str,
    y_name: str,
    height: float = HEIGHT,
) -> list[str]:
    bottom = height - MARGIN
    marks = [f'<path class="line" d="M{MARGIN:g} {bottom:g}H{WIDTH - MARGIN:g}"/>']
    for part in (0.0, 0.5, 1.0):
        value = across[0] + part * (across[1] - across[0])
        x = MARGIN + part * (WIDTH - 2 * MARGIN)
        marks.append(_text(x, bottom + 14, f"{value:.3g}", "middle"))
    marks.append(_text(WIDTH / 2, bottom + 28, x_name, "middle"))
    if up is not None:
        marks.append(f'<path class="line" d="M{MARGIN:g} {MARGIN:g}V{bottom:g}"/>')
        marks += [_text(MARGIN - 4, bottom, f"{up[0]:.2g}"), _text(MARGIN - 4, MARGIN, y_name)]
        marks.append(_text(MARGIN - 4, MARGIN + 12, f"{up[1]:.2g}"))
    return marks


def _legend() -> list[str]:
    marks = []
    for place, side in enumerate(SIDES):
        x = WIDTH - MARGIN - 150 + 70 * place
        marks.append(f'<rect class="{side}" x="{x:g}" y="6" width="10" height="10"/>')
        marks.append(_text(x + 14, 15.0, side, "start"))
    return marks


def _text(x: float, y: float, text: str, anchor: str = "end") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, marks: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH:g} {height:g}" width="{WIDTH:g}" height="{height:g}">'
        f"<title>{escape(title)}</title>{''.join(marks)}</svg>"
    )
