"""``iqstar probe``: whether an estimator's credit tells good responses from bad, before training.

Example:
    ``iqstar probe --config EXPERIMENT.yaml --data harmless-base/test.jsonl.gz --limit 200``
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from iqstar.chatter import less_chatter
from iqstar.commands.labelled_credit import Scored, check_classes, comparable, score
from iqstar.data.labelled import Kind, LabelledSet, read_labelled
from iqstar.errors import InputError
from iqstar.intervals import Interval
from iqstar.module import InverseQStar
from iqstar.one_device import OneDeviceCLI, inverse_q_star
from iqstar.ranking import (
    LEAST,
    category_figures,
    class_figures,
    credit_by_position,
    pair_figures,
    position_bins,
    response_scores,
)
from iqstar.training_cli import CLI_OPTIONS, given_settings, readable_errors

HELP = """usage: iqstar probe --config FILE [--KEY VALUE ...] --data FILE [--limit N] [--json]

iqstar probe: how well the credit of an estimator ranks labelled responses, before any training.
Labels evaluate only.

Settings are those of iqstar fit; responses are cut at model.rollout.max_new_tokens, longer prompts
than data.max_prompt_tokens left out. One device is used. Another estimator:
--model.estimator configs/estimator/principle.yaml. Further options:

  --data FILE            rows to compare, or a folder of them: chosen + rejected (HH-RLHF), or
                         prompt + response + is_safe, with category if it is there (BeaverTails)
  --limit N              compare N pairs, or N answers, only; labels do not choose which
  --json                 print one JSON object
"""
OPTIONS = ("limit", "json")
GROUPS: dict[Kind, tuple[str, str]] = {
    "pairs": ("chosen", "rejected"),
    "answers": ("safe", "unsafe"),
}
"""What the preferred responses are called, and the others."""
MEANINGS = {
    "share": "share of pairs: chosen above rejected",
    "share_without_length": "the same, length regressed out",
    "share_matched": "the same, pairs of like length",
    "auc": "AUC",
    "auc_without_length": "AUC, length regressed out",
}


class ProbeCLI(OneDeviceCLI):
    """Reads what ``iqstar fit`` reads; the rows come from elsewhere."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds this command's own options."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"data": {"class_path": "iqstar.data.Sample"}})
        parser.add_argument("--limit", type=int | None, default=None)
        parser.add_argument("--json", action="store_true")


def main(argv: list[str]) -> int:
    """Probes the estimator that the arguments describe, and prints what was found.

    Args:
        argv: The arguments after ``iqstar probe``.

    Returns:
        The exit code: 0, however good the estimator is.

    Raises:
        InputError: If the settings are wrong, or the rows cannot be compared.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(HELP)
        return 0
    path, argv = take_data(argv)
    settings = given_settings("probe", argv)
    with readable_errors(settings, OPTIONS), less_chatter():
        cli = ProbeCLI(args=argv, run=False, parser_kwargs={"exit_on_error": False}, **CLI_OPTIONS)
        module, limit = inverse_q_star(cli, "probe"), cli.config.limit
        if limit is not None and limit < 1:
            raise InputError(f"--limit: must be at least 1, got {limit}")
        if path is None:
            raise InputError("--data is missing; name labelled rows, such as --data test.jsonl.gz")
        cli.trainer.strategy.connect(module)
        report = probe(
            cli.trainer,
            module,
            read_labelled(path),
            limit=limit,
            max_prompt_tokens=cli.datamodule.max_prompt_tokens,
            batch_size=module.micro_batch_size or cli.datamodule.batch_size,
        )
    report = {"data": path, **report}
    if cli.config.json:
        sys.stdout.write(json.dumps(_plain(report), ensure_ascii=False) + "\n")
    else:
        print_report(report)
    return 0


def take_data(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits ``--data FILE`` from the arguments: to other commands ``--data`` names a class."""
    path: str | None = None
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, has_value, value = argument.partition("=")
        if flag != "--data":
            rest.append(argument)
        else:
            path = value if has_value else next(arguments, None)
    return path, rest


def probe(
    trainer: Trainer,
    module: InverseQStar,
    labelled: LabelledSet,
    *,
    limit: int | None,
    max_prompt_tokens: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Scores labelled responses under frozen models and compares the two classes.

    Args:
        trainer: Of one device; for its precision and its device.
        module: The run's.
        labelled: The rows.
        limit: Largest number of items; None for all.
        max_prompt_tokens: Longer prompts are left out; None for no bound.
        batch_size: Responses that are scored together.

    Returns:
        The report, as plain values and :class:`Interval`.

    Raises:
        InputError: If nothing is left, or nothing to compare it with.
    """
    items, dropped = comparable(labelled, module, limit, max_prompt_tokens)
    if labelled.kind == "answers":
        check_classes(items)
    scored = score(trainer, module, [r for i in items for r in i.responses], batch_size)
    units = [item.opening for item in items]
    report: dict[str, Any] = {
        "model": module.spec.model,
        "estimator": type(module.estimator).__name__,
        "kind": labelled.kind,
        "rows": labelled.rows,
        "items": len(items),
        "conversations": len(set(units)),
        "dropped": dropped,
        "max_new_tokens": module.rollout.max_new_tokens,
    }
    credits = [s.credits for s in scored]
    if labelled.kind == "pairs":
        preferred = np.arange(len(scored)) % 2 == 0
        owners = [unit for unit in units for _ in range(2)]
        figures, matched = pair_figures(credits[::2], credits[1::2], units)
        report |= {"matched_pairs": matched, "figures": figures}
    else:
        preferred, owners = np.array([bool(item.safe) for item in items]), units
        scores = response_scores(credits)
        harms = category_figures(scores, preferred, [item.harms for item in items], units)
        report |= {
            "figures": class_figures(scores, preferred, units),
            "categories": {
                name: {"unsafe": n, "figures": found} for name, (n, found) in harms.items()
            },
        }
    longest = max(map(len, credits))
    report["groups"] = {
        name: summary([scored[i] for i in of], [owners[i] for i in of], longest, module.beta)
        for name, of in zip(
            GROUPS[labelled.kind],
            (np.flatnonzero(preferred), np.flatnonzero(~preferred)),
            strict=True,
        )
    }
    return report


def summary(
    scored: Sequence[Scored], units: Sequence[Hashable], longest: int, beta: float
) -> dict[str, Any]:
    """Counts of one class of responses, and its mean A* by position.

    Args:
        scored: The responses.
        units: What each is drawn with in the bootstrap.
        longest: Tokens of the longest response of any class.
        beta: Unit of credit.
    """
    bins = position_bins(longest)
    found = credit_by_position([beta * s.credits for s in scored], units, bins)
    return {
        "responses": len(scored),
        "truncated": sum(s.truncated for s in scored),
        "mean_tokens": float(np.mean([len(s.credits) for s in scored])),
        "credit_by_position": [
            {"from": start, "to": stop - 1, "tokens": tokens, "credit": credit}
            for (start, stop), (tokens, credit) in zip(bins, found, strict=True)
        ],
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Prints a report for people."""
    console = Console(highlight=False, markup=False)
    console.print(
        f"{report['estimator']} of {report['model']}: {report['items']:,} {report['kind']} of "
        f"{report['conversations']:,} conversations. Chance is 0.50; 95% intervals."
    )
    figures = report["figures"]
    table = Table("", "Σ A*", "mean A*", "length alone")
    for name, meaning in MEANINGS.items():
        if name == "share_matched":
            meaning += f" ({report.get('matched_pairs', 0)} pairs)"
        cells = [_cell(figures[score].get(name)) for score in ("sum", "mean", "length")]
        if any(cells):
            table.add_row(meaning, *cells)
    console.print(table)
    if categories := report.get("categories"):
        heads = ("Σ A*\nlength regressed out", "mean A*\nlength regressed out", "length alone")
        table = Table("AUC of safe over unsafe", "unsafe", *heads)
        for name, category in categories.items():
            cells = [
                "\n".join(map(_cell, found.values()))
                for found in (category["figures"] or {}).values()
            ]
            table.add_row(name, f"{category['unsafe']:,}", *(cells or [f"fewer than {LEAST}"]))
        console.print(table)
    groups = report["groups"]
    table = Table("A* by position", *groups)
    for places in zip(*(group["credit_by_position"] for group in groups.values()), strict=True):
        cells = [_cell(p["credit"], "+.3f") for p in places]
        table.add_row(f"{places[0]['from']}–{places[0]['to']}", *cells)
    console.print(table)
    for name, group in groups.items():
        console.print(
            f"{name}: {group['responses']:,} responses, {group['mean_tokens']:.0f} tokens on "
            f"average, {group['truncated']:,} cut at {report['max_new_tokens']}"
        )
    if report["dropped"]:
        reasons = " · ".join(f"{reason} {count:,}" for reason, count in report["dropped"].items())
        console.print(f"left out: {reasons}")


def _cell(interval: Interval | None, spec: str = "") -> str:
    return "" if interval is None or math.isnan(interval.value) else format(interval, spec)


def _plain(value: Any) -> Any:
    """The value as JSON has it: figures that are NaN become null."""
    if isinstance(value, Interval):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
