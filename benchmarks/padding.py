"""What padding costs an update on whole conversations, whose lengths differ much.

HH-RLHF's conversations with their own replies, 16 of them a step, frozen scoring included, as one
micro-batch or in micro-batches of 4, which the padded side forms by length; with and without
``padding_free``, in alternating fresh processes:

    python benchmarks/padding.py --rounds 5
"""

from __future__ import annotations

import json
import time
from typing import Any

import harness
from iqstar.allocator import allow_huge_pages

SIDES: dict[str, dict[str, Any]] = {
    "padded": {"padded": True},
    "padding-free": {},
    "padded, by 4": {"padded": True, "micro_batch": 4},
    "padding-free, by 4": {"micro_batch": 4},
}


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains on the data set's replies, and times the optimiser steps.

    Args:
        settings: ``data`` (a file of HH-RLHF), ``prompts`` (of a step), ``tokens`` (of a reply at
            most), ``steps``, ``precision``, ``model``, ``threads``, and where they apply
            ``micro_batch`` (rows) and ``padded``.
    """
    allow_huge_pages()  # as the command does, before torch is imported
    import torch
    from lightning.pytorch import Callback, Trainer

    import memory
    from iqstar import InverseQStar, PolicySpec
    from iqstar.data import HHRLHF
    from iqstar.estimators import PrincipleEstimator
    from iqstar.rollouts import DatasetRollout
    from step_iqstar import PRINCIPLE

    torch.set_num_threads(settings["threads"])
    seconds, read = [], [0, 0]

    class Steps(Callback):
        """Times optimiser steps, and counts what the first micro-batches hold."""

        def on_train_start(self, *arguments: Any) -> None:
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            if trainer.global_step > len(seconds):
                now = time.perf_counter()
                seconds.append(now - self.started)
                self.started = now
                for micro in trainer.lightning_module._buffer:
                    read[0] += sum(micro.sequences.lengths)
                    read[1] += micro.sequences.input_ids.numel()

    module = InverseQStar(
        PolicySpec(
            model=settings["model"],
            attn_implementation="grouped",
            padding_free=not settings.get("padded", False),
        ),
        PrincipleEstimator(PRINCIPLE),
        rollout=DatasetRollout(max_new_tokens=settings["tokens"]),
        micro_batch_size=settings.get("micro_batch"),
    )
    data = HHRLHF(path=settings["data"], batch_size=settings["prompts"], val_prompts=0)
    trainer = Trainer(
        precision=settings["precision"],
        max_steps=1 + settings["steps"],
        accumulate_grad_batches=module.training_steps(settings["prompts"]),
        **harness.TRAINER,
        callbacks=[Steps()],
    )
    trainer.fit(module, datamodule=data)
    return {
        "step": harness.medians([{"s": s} for s in seconds[1:]])["s"],
        "peak_pss": memory.peak()[1] / 2**20,
        "padding": 1 - read[0] / read[1],
    }


def main() -> None:
    """Measures every side in turn."""
    parser = harness.parser(__doc__)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--tokens", type=int, default=128, help="of a reply at most")
    parser.add_argument("--steps", type=int, default=3, help="timed in each process")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker)))
        return
    keys = ("prompts", "tokens", "steps", "precision", "threads", "model")
    data = str(options.data or harness.HH)
    common = {**{k: getattr(options, k) for k in keys}, "data": data}
    samples = harness.alternate(
        {name: {**common, **side} for name, side in SIDES.items()},
        options.rounds,
        lambda s: harness.run_worker(__file__, s, options.threads),
    )
    table = {name: harness.medians(found) for name, found in samples.items()}
    rows = []
    for name, row in table.items():
        base = table[name.replace("padding-free", "padded")]
        cells = (row["padding"], row["step"], row["step"] / base["step"], row["peak_pss"])
        rows.append([name, *cells, row["peak_pss"] / base["peak_pss"]])
    titles = ["side", "padding in rows", "step, s", "/ padded", "peak PSS, MiB", "/ padded"]
    title = f"Whole conversations, {options.precision}"
    shown = harness.table(title, titles, rows)
    harness.finish(options, "padding", [shown], table=table, samples=samples)


if __name__ == "__main__":
    main()
