"""Probes every estimator on labelled rows, and writes the table of docs/probe.md.

    python benchmarks/probe_table.py --data PAIRS ANSWERS            # measures, then writes
    python benchmarks/probe_table.py --data PAIRS --only contrastive # one row, of pairs alone
    python benchmarks/probe_table.py --data PAIRS --only aligned_pair --aligned DIR  # such as DPO's
    python benchmarks/probe_table.py                                 # writes what was measured

``results/probe/KIND-NAME.json`` is what ``iqstar probe --json`` said. A test makes sure that the
page quotes these files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "probe"
PAGE = ROOT / "docs" / "probe.md"
CONFIG = "configs/experiment/beavertails_harmless.yaml"
START, END = "<!-- PROBE -->\n", "<!-- /PROBE -->"
SETTINGS = ["--model.rollout.init_args.max_new_tokens", "256", "--data.max_prompt_tokens", "512"]
GOOD = 0.55
PAIR = "aligned_pair"
TITLES = {
    "pairs": "HH-RLHF pairs, chosen over rejected",
    "answers": "BeaverTails answers, safe over unsafe",
}
SUMS_AND_MEANS = [
    ("AUC, Σ A\\*", "sum", "auc"),
    ("length out", "sum", "auc_without_length"),
    ("AUC, mean A\\*", "mean", "auc"),
    ("length out", "mean", "auc_without_length"),
]
COLUMNS = {
    "pairs": [
        ("share, Σ A\\*", "sum", "share"),
        ("length out", "sum", "share_without_length"),
        ("share, mean A\\*", "mean", "share"),
        ("length out", "mean", "share_without_length"),
        *SUMS_AND_MEANS,
    ],
    "answers": SUMS_AND_MEANS,
}
"""Head, score and figure of each column."""


def rows() -> dict[str, list[str]]:
    """Name of each row → the arguments that choose its estimator, the config's own first."""
    files = sorted((ROOT / "configs" / "estimator").glob("*.yaml"))
    files += sorted((ROOT / "benchmarks" / "controls").glob("*.yaml"))
    named = {f.stem: ["--model.estimator", str(f.relative_to(ROOT))] for f in files}
    return {"beavertails_harmless": [], **named}


def measure(name: str, estimator: list[str], data: Path, limit: int) -> None:
    """Runs one probe and keeps what it says."""
    command = [sys.executable, "-m", "iqstar.cli", "probe", "--config", CONFIG, *estimator]
    command += [*SETTINGS, "--data", str(data), "--limit", str(limit), "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout) | {"data": data.name}
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1) + "\n"
    (RESULTS / f"{report['kind']}-{name}.json").write_text(text)
    print(f"{report['kind']} {name}: {time.perf_counter() - began:.0f} s", flush=True)


def cell(figure: Mapping[str, float] | None) -> str:
    """A figure with its interval, bold where it is good and the interval excludes chance."""
    if not figure or figure["value"] is None:
        return "–"
    text = f"{figure['value']:.2f} ({figure['low']:.2f}–{figure['high']:.2f})"
    return f"**{text}**" if figure["value"] > GOOD and figure["low"] > 0.5 else text


def section(results: Path = RESULTS) -> str:
    """What stands between the page's markers: a table of each kind of rows."""
    return "\n".join(_tables(results)) or "*Not measured yet.*\n"


def _tables(results: Path) -> Iterator[str]:
    for kind, title in TITLES.items():
        files = {name: results / f"{kind}-{name}.json" for name in rows()}
        reports: dict[str, Any] = {
            name: json.loads(file.read_text()) for name, file in files.items() if file.exists()
        }
        if not reports:
            continue
        first = next(iter(reports.values()))
        heads = " | ".join(head for head, _, _ in COLUMNS[kind])
        lines = [f"{title}: {first['items']} {kind} of `{first['data']}`.", ""]
        lines += [f"| estimator | {heads} |", "|---" * (len(COLUMNS[kind]) + 1) + "|"]
        for name, report in reports.items():
            found = (cell(report["figures"][score].get(key)) for _, score, key in COLUMNS[kind])
            lines.append(f"| `{name}` | {' | '.join(found)} |")
        alone = (first["figures"]["length"].get(key) for _, _, key in COLUMNS[kind])
        lines.append(f"| *length alone* | {' | '.join(map(cell, alone))} |")
        lines.append(f"| *chance* | {' | '.join(['0.50'] * len(COLUMNS[kind]))} |")
        yield "\n".join(lines) + "\n"


def filled(text: str, results: Path = RESULTS) -> str:
    """The page with its section as the results have it."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + section(results) + END + after


def main() -> None:
    """Measures what is asked for, then rewrites the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="labelled rows")
    parser.add_argument("--limit", type=int, default=300, help="pairs or answers of each file")
    parser.add_argument("--only", nargs="+", choices=rows(), default=list(rows()))
    parser.add_argument("--aligned", type=Path, help="model of the row aligned_pair; none: no row")
    options = parser.parse_args()
    found = rows()
    if options.aligned:
        found[PAIR] += ["--model.estimator.init_args.aligned", str(options.aligned.resolve())]
    elif PAIR in options.only:
        options.only.remove(PAIR)  # its default is the reference itself: no credit
    for data in options.data:
        for name in options.only:
            measure(name, found[name], data.resolve(), options.limit)
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
