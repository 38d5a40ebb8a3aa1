"""How a step's seconds grow with the tokens of a response and with the number of prompts.

Each point is a fresh process; the points are visited in turn, round after round:

    python benchmarks/linear.py --rounds 5
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness

STEP = str(Path(__file__).with_name("step.py"))


def fit(x: list[int], y: list[float]) -> dict[str, float]:
    """The straight line through the points, and how much of their variance it explains."""
    intercept, slope, r2 = harness.linear_fit(x, y)
    return {"seconds": intercept, "seconds_per_unit": slope, "r2": r2}


def main() -> None:
    """Measures every point, and fits a line in each direction."""
    parser = harness.parser(__doc__)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 48, 64, 96])
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 8, 16, 24, 32])
    options = parser.parse_args()
    shape = {"steps": 1, "warmup": 1, "threads": options.threads, "model": options.model}
    fixed = {"prompts": 16, "tokens": 48}
    texts = harness.prompts(options.data, 2 * max(16, *options.prompts))

    def side(**point: int) -> dict[str, Any]:
        size = {**fixed, **point}
        side = {"side": "iqstar", "estimator": "principle", "precision": options.precision}
        return {**shape, **size, **side, "texts": texts[: 2 * size["prompts"]]}

    axes = {"tokens": options.tokens, "prompts": options.prompts}
    sides = {json.dumps([k, v]): side(**{k: v}) for k, values in axes.items() for v in values}
    samples = harness.alternate(
        sides, options.rounds, lambda s: harness.run_worker(STEP, s, options.threads)
    )
    points: dict[str, list] = {axis: [] for axis in axes}
    for name, found in samples.items():
        axis, value = json.loads(name)
        seconds = harness.medians([{"s": s["steps"][0]["total"]} for s in found])["s"]
        points[axis].append((value, seconds))
    fits = {axis: fit(*map(list, zip(*found, strict=True))) for axis, found in points.items()}
    rows = [
        [
            f"{axis} {', '.join(str(v) for v, _ in points[axis])}",
            f"{line['seconds']:.2f} + {line['seconds_per_unit']:.4f}·{axis}",
            line["r2"],
        ]
        for axis, line in fits.items()
    ]
    shown = harness.table("Growth of a step", ["points", "seconds", "R²"], rows)
    harness.finish(options, "linear", [shown], fits=fits, points=points, samples=samples)


if __name__ == "__main__":
    main()
