"""The report's tables as rows of text, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iqstar.report.scores import SIDES

SIDE_HEAD = ("", *SIDES)
LABELS = {
    "kl": ("KL (nats/token)", 4),
    "tokens": ("response length (tokens)", 1),
    "truncation_rate": ("cut at the length limit", 3),
    "distinct_1": ("distinct-1", 3),
    "distinct_2": ("distinct-2", 3),
    "distinct_3": ("distinct-3", 3),
    "refusal_rate": ("refusals", 3),
}
"""How the figures of a side are called and rounded, in this order."""
JUDGE_HEAD = ("judge", "policy − reference", "win", "tie", "lose", "share of wins")
SAFETY_HEAD = (
    "category", "prompts", "safe, better", "safe, worse", "unsafe, better", "unsafe, worse",
    "safe, tie", "unsafe, tie", "unscored",
)  # fmt: skip
SAFETY_HEAD_SHORT = ("category", "prompts", "safe: + = −", "unsafe: + = −", "unscored")


def shown(interval: Mapping[str, float | None], digits: int = 3) -> str:
    """``0.610 (0.553 to 0.668)``; a dash where there is no number."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def side_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Label, policy, reference: the judges' means first, then the rest."""
    judged = [
        (f"score by {judge['name']}", *(shown(judge[side]) for side in SIDES))
        for judge in report["judges"]
    ]
    others = [
        (label, *(shown(report["sides"][side][name], digits) for side in SIDES))
        for name, (label, digits) in LABELS.items()
    ]
    return [*judged, *others]


def judge_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Judge, difference of the means, wins, ties, losses, share of wins."""
    return [
        (
            judge["name"],
            shown(judge["difference"]),
            *(str(judge[name]) for name in ("wins", "ties", "losses")),
            shown(judge["win_share"], 2),
        )
        for judge in report["judges"]
    ]


def safety_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the table of safety; empty without one."""
    table = report["safety"]
    return [tuple(str(v) for v in row.values()) for row in table["rows"]] if table else []


def short_safety_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The same in fewer columns: better, tie and worse in one."""
    table = report["safety"]
    return [
        (
            row["category"],
            str(row["prompts"]),
            *(
                " ".join(f"{row[f'{kind}_{word}']:>3}" for word in ("better", "tie", "worse"))
                for kind in ("safe", "unsafe")
            ),
            str(row["unscored"]),
        )
        for row in (table["rows"] if table else ())
    ]
