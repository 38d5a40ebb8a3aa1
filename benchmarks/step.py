"""One training step (rollout and update) of iqstar against TRL's SDFT: seconds and memory.

Same model, prompts, principle, lengths, precision and threads, in alternating fresh processes; no
response ends early, so that both sides make and train on the same number of tokens:

    python benchmarks/step.py --precision bf16-mixed 32-true --rounds 5
"""

from __future__ import annotations

import json
from typing import Any

import harness

SIDES: dict[str, dict[str, Any]] = {
    "iqstar, principle": {"side": "iqstar", "estimator": "principle"},
    "iqstar, contrastive": {"side": "iqstar", "estimator": "contrastive"},
    "iqstar, principle, LoRA 8": {"side": "iqstar", "estimator": "principle", "lora": 8},
    "TRL SDFT, sampled_token": {"side": "trl", "mode": "sampled_token"},
    "TRL SDFT, full_logits": {"side": "trl", "mode": "full_logits"},
    "TRL SDFT, full_logits, LoRA 8": {"side": "trl", "mode": "full_logits", "lora": 8},
}
PHASES = ("generation", "scoring", "forward_backward", "optimizer", "other")
BASE = ("TRL SDFT, full_logits", "TRL SDFT, sampled_token")
"""What others are compared with: the first that ran."""


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Steps of one side, in this process."""
    if settings["side"] == "iqstar":
        import step_iqstar as module
    else:
        import step_trl as module
    return module.run(settings)


def summary(samples: list[harness.Sample]) -> harness.Sample:
    """Medians over rounds: of the seconds of a process's median step, its phases, its memory."""
    rounds = []
    for sample in samples:
        steps = harness.medians(
            [{p: s.get(p, 0.0) for p in (*PHASES, "total")} for s in sample["steps"]]
        )
        rounds.append({"seconds": steps, "memory": sample["memory"], "tokens": sample["tokens"]})
    return harness.medians(rounds)


def compare(table: dict[str, harness.Sample]) -> None:
    """Adds each side's ratios to TRL's: of seconds, of the whole peak, of that above the floor."""
    base = next((table[name] for name in BASE if name in table), None)
    for row in table.values() if base else ():
        row["ratio"] = {
            "seconds": row["seconds"]["total"] / base["seconds"]["total"],
            **{k: row["memory"][k] / base["memory"][k] for k in ("peak_pss", "above_floor")},
        }


def show(title: str, table: dict[str, harness.Sample]) -> None:
    """Prints what was measured."""
    rows = [
        [
            name,
            *(row["seconds"][p] for p in ("total", *PHASES)),
            row.get("ratio", {}).get("seconds"),
        ]
        for name, row in table.items()
    ]
    harness.show(f"{title}: seconds of a step", ["side", "total", *PHASES, "ratio"], rows)
    parts = (
        "peak_rss",
        "peak_pss",
        "floor",
        "imports",
        "policy",
        "frozen",
        "gradients",
        "optimizer",
    )
    rows = [
        [
            name,
            *(row["memory"][p] for p in (*parts, "above_floor")),
            row.get("ratio", {}).get("above_floor"),
        ]
        for name, row in table.items()
    ]
    harness.show(f"{title}: MiB", ["side", *parts, "above", "ratio"], rows)


def main() -> None:
    """Measures every side in turn, for each precision."""
    parser = harness.parser(__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed", "32-true"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help=" | ".join(SIDES))
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--tokens", type=int, default=48, help="of every response")
    parser.add_argument("--steps", type=int, default=1, help="timed in each process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these")
    parser.add_argument("--micro-batch", type=int, help="rows that iqstar trains on at once")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker)))
        return
    shape = {k: getattr(options, k) for k in ("prompts", "tokens", "steps", "warmup", "threads")}
    texts = harness.prompts(options.data, options.prompts * (options.steps + options.warmup))
    for precision in options.precision:
        common = {**shape, "precision": precision, "model": options.model, "texts": texts}
        sides = {name: {**common, **SIDES[name]} for name in options.sides}
        for side in sides.values():
            if side["side"] == "iqstar":
                side["micro_batch"] = options.micro_batch
        samples = harness.alternate(
            sides, options.rounds, lambda s: harness.run_worker(__file__, s, options.threads)
        )
        table = {name: summary(found) for name, found in samples.items()}
        if len(counts := {row["tokens"] for row in table.values()}) > 1:
            raise SystemExit(f"the sides made different numbers of tokens: {counts}")
        compare(table)
        show(f"{options.prompts}×{options.tokens}, {precision}", table)
        settings = {
            **shape,
            "precision": precision,
            "model": options.model,
            "rounds": options.rounds,
        }
        harness.write(options.out, f"step-{precision}", settings, table=table, samples=samples)


if __name__ == "__main__":
    main()
