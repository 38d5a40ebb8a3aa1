"""``iqstar audit``: what a data set holds, and what the filters leave of it, before any training.

Example:
    ``iqstar audit --data HHRLHF --data.path harmless-base.jsonl.gz --data.first_turn_only true``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table

from iqstar import data as data_modules
from iqstar.commands.options import path
from iqstar.data import PromptDataModule
from iqstar.errors import InputError
from iqstar.settings import CONFIG_FLAGS, Explainer, read_settings

MEANINGS = {
    "rows": "rows read",
    "usable": "usable rows (HH-RLHF: pairs with one prompt and two replies)",
    "prompts": "distinct prompts",
    "multi_turn": "rows with more than one human turn",
    "differing_prompts": "pairs whose two prompts differ",
    "empty_chosen": "pairs with an empty chosen reply",
    "same_role": "rows with two consecutive turns of one role",
    "duplicates": "rows that repeat an earlier one",
    "safe": "responses labelled safe",
}


def main(argv: list[str]) -> int:
    """Audits the data set that the arguments describe and prints the report.

    Args:
        argv: The arguments after ``iqstar audit``.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If the arguments are wrong or the data cannot be read.
    """
    settings = read_settings(argv)
    names = {setting.path[0] for setting in settings}
    if not names & {"data", "help"} and "-h" not in argv:
        raise InputError(
            f"--data is missing; give one of {', '.join(_names())}, or --config FILE with its data"
        )
    try:
        parser, own = _parser(argv)
        config = parser.parse_args(own)
        data = parser.instantiate(config).data
    except ArgumentError as error:
        explainer = Explainer(settings, {"data": PromptDataModule}, ["data", "config", "json"])
        raise explainer.explain(error.message) from error
    report = data.audit()
    if data.max_prompt_tokens is not None:
        report["details"]["not_applied"] = ["max_prompt_tokens, which needs a model's tokenizer"]
    if config.json:
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
    else:
        print_report(report, type(data).__name__)
    return 0


def print_report(report: Mapping[str, Any], title: str) -> None:
    """Prints an audit for people."""
    table = Table("count", "what", title=f"{title}: audit", title_justify="left")
    table.columns[0].justify = "right"
    for key, value in report.items():
        if key != "details":
            table.add_row(f"{value:,}", MEANINGS.get(key, key))
    console = Console()
    console.print(table)
    for key, value in report["details"].items():
        if isinstance(value, list):
            value = "; ".join(value)
        if isinstance(value, Mapping):
            value = " · ".join(f"{name} {number:,}" for name, number in value.items()) or "none"
        console.print(f"[bold]{key.replace('_', ' ')}[/bold]: {value}", highlight=False)


def _parser(argv: list[str]) -> tuple[ArgumentParser, list[str]]:
    """The parser, and what it is to parse: the data sets of runs' YAMLs first."""
    parser = ArgumentParser(
        prog="iqstar audit",
        exit_on_error=False,
        description="Reports what a data set holds and what the filters leave of it.",
        epilog="--config FILE takes the data set of a run's YAML.",
    )
    parser.add_subclass_arguments(PromptDataModule, "data", required=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument(*CONFIG_FLAGS, type=path, action="append", default=[])
    found, others = before.parse_known_args(argv)
    given = [yaml.safe_load(file.read_text(encoding="utf-8")).get("data") for file in found.config]
    return parser, [*(f"--data={json.dumps(data)}" for data in given if data), *others]


def _names() -> list[str]:
    found = {name: getattr(data_modules, name) for name in data_modules.__all__}
    return [
        name
        for name, cls in found.items()
        if issubclass(cls, PromptDataModule) and cls is not PromptDataModule
    ]
