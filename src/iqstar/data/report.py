"""Counts of what became of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the rows.

    Args:
        rows: Rows read.
        skipped: Why a row gives no prompt of its own → how many.
        cut: Prompts that ``first_turn_only`` shortened.
        train: Prompts to train on.
        heldout: Prompts to evaluate on.
    """

    rows: int
    skipped: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    train: int = 0
    heldout: int = 0

    def __str__(self) -> str:
        text = f"{self.rows} rows → {self.train} prompts to train on, {self.heldout} held out"
        if self.cut:
            text += f"; {self.cut} cut to their first turn"
        return text + "".join(f"; {n} skipped: {why}" for why, n in self.skipped.items())


def quantiles(values: Sequence[int]) -> dict[str, float]:
    """Minimum, quartiles, 95th percentile, maximum and mean."""
    data = torch.tensor(values, dtype=torch.float64)
    points = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    result = {name: round(float(data.quantile(q)), 1) for name, q in points.items()}
    return {**result, "mean": round(float(data.mean()), 1)}
