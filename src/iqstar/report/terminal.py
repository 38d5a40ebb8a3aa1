"""The report on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iqstar.report.rows import (
    JUDGE_HEAD,
    SAFETY_HEAD_SHORT,
    SIDE_HEAD,
    judge_rows,
    short_safety_rows,
    side_rows,
)


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the tables and the notes.

    Args:
        report: Of :func:`iqstar.report.build.build_report`.
    """
    console = Console(highlight=False)
    title = f"{report['prompts']} held-out prompts, {report['responses']} responses of each side"
    console.print(_table(title, SIDE_HEAD, side_rows(report)))
    if report["judges"]:
        console.print(_table("Win, tie, lose", JUDGE_HEAD, judge_rows(report)))
    if table := report["safety"]:
        title = (
            f"Safe by {table['judge']}; better (+), tie (=) or worse (−) by {table['better_by']}"
        )
        console.print(_table(title, SAFETY_HEAD_SHORT, short_safety_rows(report)))
    console.print("In brackets: 95% intervals over prompts")
    for note in report["notes"]:
        console.print(f"Note: {note}", markup=False)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=escape(title), title_justify="left", show_edge=False)
    for place, name in enumerate(head):
        table.add_column(escape(name), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
