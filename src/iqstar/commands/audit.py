"""``iqstar audit``: what a data set holds, and what the filters leave of it, before any training.

Example:
    ``iqstar audit --data HHRLHF --data.path harmless-base.jsonl.gz --data.first_turn_only true``
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table

from iqstar import data as data_modules
from iqstar.data import PromptDataModule
from iqstar.errors import InputError
from iqstar.settings import read_settings
from iqstar.signatures import parameters

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
    given = {argument.partition("=")[0] for argument in argv}
    if not given & {"--config", "--data", "--data.help", "-h", "--help"}:
        raise InputError(
            f"--data is missing; give one of {', '.join(_names())}, or --config FILE with its data"
        )
    parser, own = _parser(argv)
    try:
        config = parser.parse_args(own)
        data = parser.instantiate(config).data
    except ArgumentError as error:
        raise _explain(str(error), argv) from error
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
    """The parser, with the data set of a run's YAML as its default, and what it is to parse."""
    parser = ArgumentParser(
        prog="iqstar audit",
        exit_on_error=False,
        description="Reports what a data set holds and what the filters leave of it.",
        epilog="--config FILE takes the data set of a run's YAML.",
    )
    parser.add_subclass_arguments(PromptDataModule, "data", required=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path)
    found, others = before.parse_known_args(argv)
    if file := found.config:
        read_settings(["--config", str(file)])  # names the line of what is no YAML
        data = yaml.safe_load(file.read_text(encoding="utf-8")).get("data")
        if data is not None:
            parser.set_defaults({"data": data})
        elif "--data" not in {argument.partition("=")[0] for argument in others}:
            raise InputError(f"--config: {file} has no data; give it there or with --data")
    return parser, others


def _names() -> list[str]:
    found = {name: getattr(data_modules, name) for name in data_modules.__all__}
    return [
        name
        for name, cls in found.items()
        if issubclass(cls, PromptDataModule) and cls is not PromptDataModule
    ]


def _explain(message: str, argv: list[str]) -> InputError:
    """Shortens jsonargparse's message to what is wrong and the nearest right thing."""
    given = [b for a, b in pairwise(argv) if a == "--data"]
    given += [a.removeprefix("--data=") for a in argv if a.startswith("--data=")]
    name = given[-1].rpartition(".")[2] if given else ""
    options = parameters(getattr(data_modules, name) if name in _names() else PromptDataModule)
    for argument in argv:
        key = re.fullmatch(r"--data\.(?:init_args\.)?([\w.]+)\+?(=.*)?", argument)
        if key and key[1] not in [*options, "help", "class_path"]:
            near = difflib.get_close_matches(key[1], options, n=1)
            hint = f"did you mean data.{near[0]}?" if near else f"known: {', '.join(options)}"
            return InputError(f"unknown key data.{key[1]}; {hint}")
    if given and name not in _names():
        near = difflib.get_close_matches(name, _names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(_names())}"
        return InputError(f"--data: unknown data class {given[-1]}; {hint}")
    if inner := re.findall(r'Parser key "(?!data")([\w.]+)":\s*([^\n]+)', message):
        problem = re.sub(r"Expected an? <class '(\w+)'>\. Got value: (.*)",
                         r"'\2' does not fit; expected \1", inner[-1][1])  # fmt: skip
        message = f"data.{inner[-1][0]}: {problem}"
    return InputError(f"{' '.join(message.split())}; see iqstar audit --help")
