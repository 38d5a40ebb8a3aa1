"""The report as one HTML file: nothing is loaded, nothing runs, every text is escaped.

Prompts and responses are untrusted: a model may write HTML. Besides being escaped, they meet a
content security policy under which no script, image or link to elsewhere would do anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isnan
from typing import Any

from iqstar.paired_responses import Pair
from iqstar.report.figures import histogram, means, outcome_bar, scatter
from iqstar.report.rows import (
    JUDGE_HEAD,
    SAFETY_HEAD,
    SIDE_HEAD,
    judge_rows,
    safety_rows,
    shown,
    side_rows,
)
from iqstar.report.scores import SIDES, Scores

EXAMPLES = 50
"""Prompts whose first responses are shown."""
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figcaption { color: #888; }
svg { font-size: 11px; max-width: 100%; } svg text { fill: currentColor; }
.line { stroke: currentColor; fill: none; stroke-width: 1.5; }
.policy { fill: #d9780f; } .reference { fill: #4a7fb5; } circle { fill-opacity: .55; }
.win { fill: #3f9b5b; } .tie { fill: #999; } .loss { fill: #b5484a; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Mapping[str, Any], pairs: Sequence[Pair], scores: Sequence[Scores]) -> str:
    """The whole document.

    Args:
        report: Of :func:`iqstar.report.build.build_report`.
        pairs: The responses.
        scores: Of each judge.
    """
    title = f"iqstar eval: {report['policy']['path'] or report['reference']}"
    intro = (
        f"{report['prompts']} held-out prompts, {report['responses']} responses of each side, "
        f"temperature 1, seed {report['settings']['seed_everything']}. The reference is "
        f"{report['reference']}. In brackets: 95% intervals over prompts."
    )
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(intro)}</p>",
        *(f"<p><strong>Note:</strong> {escape(note)}.</p>" for note in report["notes"]),
        f"<h2>Policy and reference</h2>{_table(SIDE_HEAD, side_rows(report))}",
    ]
    if scores:
        parts.append(f"<h2>Win, tie, lose</h2>{_table(JUDGE_HEAD, judge_rows(report))}")
        parts.append(f"<p>Win: a higher score, by more than {report['tie_margin']:g}.</p>")
    for judge, own in zip(report["judges"], scores, strict=True):
        parts.append(f"<h2>{escape(judge['name'])}</h2>{_plots(judge, own, pairs)}")
    if report["safety"]:
        parts.append(_safety(report))
    parts.append(_examples(pairs, scores))
    settings = ((name, str(value)) for name, value in report["settings"].items())
    judges = ((f"judge {j['name']}", j["version"]) for j in report["judges"])
    about = [("iqstar", report["iqstar"]), *judges, *settings]
    parts.append(f"<h2>Settings</h2>{_table(('', ''), about)}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _plots(judge: Mapping[str, Any], scores: Scores, pairs: Sequence[Pair]) -> str:
    values = {side: getattr(scores, side) for side in SIDES}
    lengths = {
        side: [
            (float(getattr(pair, side).tokens), score)
            for pair, score in zip(pairs, values[side], strict=True)
        ]
        for side in SIDES
    }
    plots = {
        "Mean score with its interval": means("mean score", judge),
        "Win, tie, lose": outcome_bar("win, tie, lose", judge),
        "Scores": histogram("histogram of scores", values),
        "Score by length": scatter("score by length", lengths),
    }
    figures = [
        f"<figure>{plot}<figcaption>{caption}</figcaption></figure>"
        for caption, plot in plots.items()
        if plot
    ]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else "<p>No score.</p>"


def _safety(report: Mapping[str, Any]) -> str:
    table = report["safety"]
    shares = ", ".join(f"{side} {shown(table['safe_share'][side], 2)}" for side in SIDES)
    text = (
        f"Responses of the policy: safe where {table['judge']} gives at least "
        f"{table['threshold']:g}, better or worse than the reference's by {table['better_by']}. A "
        "prompt counts in each of its categories. A judge that ranks well may still be off at a "
        f"threshold: compare the sides. Safe responses: {shares}."
    )
    return (
        f"<h2>Safety by category</h2><p>{escape(text)}</p>"
        f"{_table(SAFETY_HEAD, safety_rows(report))}"
    )


def _examples(pairs: Sequence[Pair], scores: Sequence[Scores]) -> str:
    """The first response to each of the first prompts; not selected."""
    rows = [(row, pair) for row, pair in enumerate(pairs) if pair.sample == 0][:EXAMPLES]
    body = []
    for row, pair in rows:
        cells = [pair.messages[-1].content]
        for side in SIDES:
            given = ((s.name, getattr(s, side)[row]) for s in scores)
            said = "".join(f"\n[{name} {'–' if isnan(v) else f'{v:.2f}'}]" for name, v in given)
            cells.append(getattr(pair, side).text + said)
        body.append("".join(f'<td class="text">{escape(cell)}</td>' for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in ("prompt", *SIDES))
    lines = "".join(f"<tr>{line}</tr>" for line in body)
    return f"<h2>Responses, not selected</h2><table><tr>{head}</tr>{lines}</table>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{first}</tr>{lines}</table>"
