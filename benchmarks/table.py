"""Writes what the result files hold into the docs, between markers.

    python benchmarks/table.py

``<!-- BENCH:name -->`` and ``<!-- /BENCH:name -->`` enclose what ``results/name.json`` says;
``goals`` stands for all goals. Results of another machine lie in a folder of their own, and
``folder/name`` quotes them. A test makes sure that the docs quote what the results hold.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import goals
import harness

PAGES = ("docs/performance.md",)
MARKED = re.compile(r"(<!-- BENCH:([\w/-]+) -->\n)(.*?)(<!-- /BENCH:\2 -->)", re.DOTALL)
MISSING = "*Not measured yet.*\n"


def markdown(table: Mapping[str, Any]) -> str:
    """A table in Markdown, its title as the first column's head."""
    first, *others = table["columns"]
    head = [f"{table['title']} ({first})", *others]
    rule = ["---", *["---:"] * len(others)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *table["rows"]))


def command(record: Mapping[str, Any]) -> str:
    """What was run, but for ``--data`` and ``--out``."""
    words = ["python", f"benchmarks/{record['script']}"]
    for name, value in record["options"].items():
        if value is not None and name not in ("threads", "model"):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(shlex.quote(str(v)) for v in values)]
    return " ".join(words)


def source(record: Mapping[str, Any]) -> str:
    """Where figures come from: the command, the machine, the versions."""
    machine, versions = record["machine"], record["versions"]
    rounds = record["options"]["rounds"]
    flags = ", ".join(machine["flags"]) or "no wide instructions"
    of = "1 round" if rounds == 1 else f"medians of {rounds} rounds"
    return (
        f"`{command(record)}`, {of}, {record['date']}: "
        f"{machine['processor']}, {machine['cores']} cores ({flags}); torch {versions['torch']}, "
        f"transformers {versions['transformers']}, trl {versions['trl']}, "
        f"iqstar at {versions['commit']}.\n"
    )


def section(path: str, folder: Path) -> str:
    """What stands between the markers of a name, which may be one in a folder within."""
    within, _, name = path.rpartition("/")
    results = goals.read(folder / within)
    if name == "goals":
        return markdown(goals.table(results)) if results else MISSING
    if name not in results:
        return MISSING
    record = results[name]
    return "\n".join([source(record), *map(markdown, record["tables"])])


def filled(text: str, folder: Path) -> str:
    """A page with all its sections as the results of a folder have them."""

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}{section(found[2], folder)}{found[4]}"

    return MARKED.sub(replace, text)


def main() -> None:
    """Rewrites the pages, and prints the goals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    for page in (harness.ROOT / name for name in PAGES):
        page.write_text(filled(page.read_text(), options.results))
    harness.show(goals.table(goals.read(options.results)))


if __name__ == "__main__":
    main()
