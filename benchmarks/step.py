"""One training step (rollout and update) of iqstar against TRL's SDFT: seconds and memory.

Same model, prompts, principle, lengths, precision and threads, in alternating fresh processes; no
response ends early, so that both sides make and train on the same number of tokens:

    python benchmarks/step.py --precision bf16-mixed 32-true --rounds 5
    python benchmarks/step.py --vllm http://localhost:8000   # also with a server that is running
"""

from __future__ import annotations

import json
from typing import Any

import harness
from iqstar.allocator import allow_huge_pages

SIDES: dict[str, dict[str, Any]] = {
    "iqstar, principle": {"side": "iqstar", "estimator": "principle"},
    "iqstar, principle, by 4": {"side": "iqstar", "estimator": "principle", "micro_batch": 4},
    "iqstar, contrastive": {"side": "iqstar", "estimator": "contrastive"},
    "iqstar, principle, LoRA 8": {"side": "iqstar", "estimator": "principle", "lora": 8},
    "TRL SDFT, sampled_token": {"side": "trl", "mode": "sampled_token"},
    "TRL SDFT, full_logits": {"side": "trl", "mode": "full_logits"},
    "TRL SDFT, full_logits, by 4": {"side": "trl", "mode": "full_logits", "micro_batch": 4},
}
"""*by 4*: in micro-batches of 4 rows, whose gradients add up; the others take all rows at once."""
FURTHER: dict[str, dict[str, Any]] = {
    "iqstar, principle, padded": {"side": "iqstar", "estimator": "principle", "padded": True},
    "TRL SDFT, topk_logits": {"side": "trl", "mode": "topk_logits"},
    "TRL SDFT, full_logits, LoRA 8": {"side": "trl", "mode": "full_logits", "lora": 8},
}
"""Measured where ``--sides`` asks for them."""
WITH_VLLM = "iqstar, principle, vLLM"
BASES = {"ratio": "TRL SDFT, full_logits", "ratio_sampled": "TRL SDFT, sampled_token"}
"""What all are compared with. The loss of the first is most like ours by default: the whole
distribution; the second sees sampled tokens only, and is faster."""
PHASES = ("generation", "scoring", "forward_backward", "optimizer", "other")
PARTS = ("imports", "policy", "frozen", "gradients", "optimizer")
RATIOS = {"peak_pss": "whole", "above_floor": "above the floor"}


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Steps of one side, in this process."""
    if settings["side"] == "iqstar":
        allow_huge_pages()  # as the command does, before torch is imported
        import step_iqstar as module
    else:
        import step_trl as module
    return module.run(settings)


def summary(samples: list[harness.Sample]) -> harness.Sample:
    """Medians over rounds: seconds of a process's median step, its phases, and its memory."""
    rounds = []
    for sample in samples:
        steps = [{p: step.get(p, 0.0) for p in (*PHASES, "total")} for step in sample["steps"]]
        rounds.append({**sample, "steps": None, "seconds": harness.medians(steps)})
    return harness.medians(rounds)


def compare(table: dict[str, harness.Sample]) -> None:
    """Adds each side's ratios to the bases': of seconds, of the whole peak, of that above floor.

    Args:
        table: Summaries by the names of their sides; a base need not be among them.
    """
    for key, name in BASES.items():
        base = table.get(name)
        for row in table.values():
            row[key] = {}
            if base is not None:
                row[key]["seconds"] = row["seconds"]["total"] / base["seconds"]["total"]
                row[key] |= {k: row["memory"][k] / base["memory"][k] for k in RATIOS}


def tables(title: str, table: dict[str, harness.Sample]) -> list[dict[str, Any]]:
    """What is shown of the summaries: seconds, and memory."""
    seconds = [
        [
            name,
            *(row["seconds"][p] for p in ("total", *PHASES)),
            *(row[key].get("seconds") for key in BASES),
        ]
        for name, row in table.items()
    ]
    sizes = ("peak_rss", "peak_pss", "floor", *PARTS, "above_floor")
    memory = [
        [name, *(row["memory"][s] for s in sizes), *(row[b].get(k) for b in BASES for k in RATIOS)]
        for name, row in table.items()
    ]
    phases = [p.replace("_", " + ") for p in PHASES]
    above = ("peak RSS", "peak PSS", "floor", *PARTS, "above")
    bases = [name.removeprefix("TRL SDFT, ") for name in BASES.values()]
    faster = [f"/ {base}" for base in bases]
    smaller = [f"{what} / {base}" for base in bases for what in RATIOS.values()]
    return [
        harness.table(f"{title}: seconds", ["side", "total", *phases, *faster], seconds),
        harness.table(f"{title}: MiB", ["side", *above, *smaller], memory),
    ]


def main() -> None:
    """Measures every side in turn, for each precision."""
    parser = harness.parser(__doc__)
    every = SIDES | FURTHER
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed", "32-true"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help=" | ".join(every))
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--tokens", type=int, default=48, help="of every response")
    parser.add_argument("--steps", type=int, default=1, help="timed in each process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these")
    parser.add_argument("--vllm", help="URL of a running server, for a side that samples there")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker)))
        return
    chosen = {name: every[name] for name in options.sides}
    if options.vllm:
        chosen[WITH_VLLM] = {**SIDES["iqstar, principle"], "vllm": options.vllm}
    texts = harness.prompts(options.data, options.prompts * (options.steps + options.warmup))
    keys = ("prompts", "tokens", "steps", "warmup", "threads", "model")
    common = {**{k: getattr(options, k) for k in keys}, "texts": texts}
    for precision in options.precision:
        samples = harness.alternate(
            {name: {**common, "precision": precision, **side} for name, side in chosen.items()},
            options.rounds,
            lambda s: harness.run_worker(__file__, s, options.threads),
        )
        table = {name: summary(found) for name, found in samples.items()}
        if len(counts := {row["tokens"] for row in table.values()}) > 1:
            raise SystemExit(f"the sides made different numbers of tokens: {counts}")
        compare(table)
        title = f"A step of {options.prompts}×{options.tokens} tokens, {precision}"
        shown = tables(title, table)
        harness.finish(options, f"step-{precision}", shown, table=table, samples=samples)


if __name__ == "__main__":
    main()
