"""What the project wants to reach, beside what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import harness
from step import BASES

PRECISIONS = ("bf16-mixed", "32-true")
COLUMNS = ("figure", "goal", "measured", "met")
Goal = tuple[str, str, float]
"""Figure, goal such as ``≤ 0.75``, measured."""


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of a folder, by name; those of other formats are left out."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {record["benchmark"]: record for record in found if "tables" in record}


def goals(results: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """Every goal whose figure is among the results."""
    found: list[Goal] = []
    for precision in PRECISIONS:
        if record := results.get(f"step-{precision}"):
            found += _step(record["table"], precision)
    by_precision = {"rollouts": _rollouts, "utilisation": _utilisation, "kernel": _kernel}
    for name, goals_of in (
        *((f"{n}-{p}", goals_of) for n, goals_of in by_precision.items() for p in PRECISIONS),
        ("linear", _linear),
        ("startup", _startup),
    ):
        if record := results.get(name):
            found += goals_of(record)
    return found


def met(goal: str, measured: float) -> bool:
    """Whether a figure reaches its goal."""
    sign, _, bound = goal.partition(" ")
    return measured <= float(bound) if sign == "≤" else measured >= float(bound)


def table(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All goals, each with its figure."""
    rows = [[what, goal, value, "yes" if met(goal, value) else "no"]
            for what, goal, value in goals(results)]  # fmt: skip
    for row in rows:
        if row[2] < 0.01:
            row[2] = f"{row[2]:.1e}"
    return harness.table("Goals", COLUMNS, rows)


def _step(rows: Mapping[str, Any], precision: str) -> Iterator[Goal]:
    limits = {
        "iqstar, principle": "≤ 0.75",
        "iqstar, principle, by 4": "≤ 0.75",
        "iqstar, contrastive": "≤ 1.0",
        "iqstar, principle, vLLM": "≤ 0.6",
    }
    for side, limit in limits.items():
        for key, base in BASES.items():
            if ratio := rows.get(side, {}).get(key):
                than, name = (
                    base.removeprefix("TRL "),
                    f"{side.removeprefix('iqstar, ')}, {precision}",
                )
                yield f"seconds of a step / {than}: {name}", limit, ratio["seconds"]
                yield f"peak memory (PSS) / {than}: {name}", "≤ 0.7", ratio["peak_pss"]
                yield f"memory above the floor / {than}: {name}", "≤ 0.5", ratio["above_floor"]


def _rollouts(record: Mapping[str, Any]) -> Iterator[Goal]:
    for cell, rows in record["table"].items():
        better = {"16": "≥ 1.8", "64": "≥ 2.5"}.get(cell.split("×")[0])
        own = f"tokens/s of the built-in engine / transformers': {cell}"
        yield own, "≥ 1.3", rows["iqstar"]["ratio"]
        if better:
            best = max(row["ratio"] for row in rows.values())
            yield f"tokens/s of the better engine / transformers': {cell}", better, best


def _utilisation(record: Mapping[str, Any]) -> Iterator[Goal]:
    for side, row in record["table"].items():
        yield f"update, share of its products' rate: {side}", "≥ 0.65", row["utilisation"]


def _kernel(record: Mapping[str, Any]) -> Iterator[Goal]:
    cells = [cell for cell in record["cells"] if "median" in cell]
    if cells:
        extra = max(cell["extra_mib"]["iqstar"] - _copied_head(cell) for cell in cells)
        yield (
            f"extra memory of the head's kernel, largest of {len(cells)} cells, MiB: "
            + cells[0]["precision"],
            "≤ 64",
            extra,
        )
    for cell in cells:
        if (cell["vocab"], cell["tokens"]) == (49152, 1024):
            name = f"{cell['precision']}, {cell['loss']}, 49152×1024"
            yield f"seconds of the head's kernel / naive: {name}", "≤ 1.0", cell["ratio"]
    exact = [c for c in cells if c["precision"] == "32-true"]
    if exact:
        worst = max(v for c in exact for v in c["gradient_difference"].values())
        yield "gradient of the head's kernel, difference from naive, fp32", "≤ 1e-5", worst
    if exact and all("gradient_error" in c for c in exact):
        worst = max(v for c in exact for v in c["gradient_error"]["iqstar"].values())
        yield "gradient of the head's kernel, difference from float64, fp32", "≤ 1e-5", worst


def _copied_head(cell: Mapping[str, Any]) -> float:
    """MiB of the head's weight in bfloat16, which both versions hold under autocast."""
    return cell["vocab"] * cell["dim"] * 2 / 2**20 if cell["precision"] == "bf16-mixed" else 0.0


def _linear(record: Mapping[str, Any]) -> Iterator[Goal]:
    for axis, line in record["fits"].items():
        yield f"linear growth in {axis}, R²", "≥ 0.95", line["r2"]


def _startup(record: Mapping[str, Any]) -> Iterator[Goal]:
    for command, row in record["table"].items():
        yield f"seconds of {command}", "≤ 3" if "help" in command else "≤ 12", row["seconds"]
