"""How the update scales on CPUs: one process of two threads against two processes of one each.

Alternating, in fresh processes, on the bundled model and fixed responses, so that every side does
the same work; sampling and frozen scoring are outside of what is timed:

    python benchmarks/scaling.py --rounds 5
"""

from __future__ import annotations

import json
import os
import statistics
import time
from typing import Any

import harness
from iqstar.allocator import allow_huge_pages

RESPONSES = 32
STEPS = 3
"""Optimiser steps timed in a process, after one to warm up."""
TEXT = "It depends on the weather, on the season and on how far you would like to walk that day. "
SIDES = {
    "1 process, 2 threads": {"processes": 1, "threads": 2, "strategy": "auto"},
    "2 processes, ddp": {"processes": 2, "threads": 1, "strategy": "ddp"},
    "2 processes, fsdp": {"processes": 2, "threads": 1, "strategy": "fsdp2"},
}
BASE = "1 process, 2 threads"


def worker(settings: dict[str, Any]) -> None:
    """Trains on fixed responses; the first rank prints seconds of the update and of its parts.

    Args:
        settings: ``processes``, ``strategy``, ``model``, ``precision``.
    """
    allow_huge_pages()  # as the command does, before torch is imported
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from iqstar import InverseQStar, PolicySpec
    from iqstar.data import RepeatedBatches
    from iqstar.estimators import PrincipleEstimator
    from iqstar.mdp import Message, Prompt
    from iqstar.rollouts import DatasetRollout
    from iqstar.strategies import ShardedStrategy

    processes, strategy = settings["processes"], settings["strategy"]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    asked = (Message(role="user", content="How long does it take to walk around the lake?"),)
    prompts = [Prompt(messages=asked, response=TEXT * 2) for _ in range(RESPONSES * (STEPS + 1))]

    class Data(LightningDataModule):
        def train_dataloader(self) -> RepeatedBatches:
            place = {"rank": self.trainer.global_rank, "world_size": processes}
            return RepeatedBatches(prompts, RESPONSES // processes, **place)

        def transfer_batch_to_device(self, batch: Any, device: Any, index: int) -> Any:
            return batch

    class Clock(Callback):
        """Times forward and backward pass and optimiser step: between scoring and batch end."""

        def __init__(self) -> None:
            self.updates: list[float] = []
            self.started = 0.0

        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            self.updates.append(time.perf_counter() - self.started)

    clock = Clock()

    class Timed(InverseQStar):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            self.trainer.strategy.barrier()
            clock.started = time.perf_counter()

    made = {
        "auto": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True),
        "fsdp2": lambda: ShardedStrategy(process_group_backend="gloo"),
    }
    module = Timed(
        PolicySpec(model=settings["model"], attn_implementation="grouped"),
        PrincipleEstimator("Be kind."),
        rollout=DatasetRollout(max_new_tokens=48),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=made[strategy](),
        precision=settings["precision"],
        max_steps=STEPS + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(module, datamodule=Data())
    reduce = _all_reduce_seconds(module) if processes > 1 else 0.0
    if trainer.is_global_zero:
        print(json.dumps({"update": statistics.median(clock.updates[1:]), "all_reduce": reduce}))


def _all_reduce_seconds(module: Any) -> float:
    """Seconds to sum one float32 number for every trained weight over the ranks; median of 5."""
    import torch

    count = sum(p.numel() for p in module.actor.parameters() if p.requires_grad)
    buffer, seconds = torch.zeros(count), []
    for _ in range(5):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(buffer)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Measures all sides in turn and compares their medians."""
    parser = harness.parser(__doc__)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    common = {"model": options.model, "precision": options.precision}
    samples = harness.alternate(
        {name: {**common, **side} for name, side in SIDES.items()},
        options.rounds,
        lambda s: harness.run_worker(__file__, s, s["threads"]),
    )
    table = {name: harness.medians(found) for name, found in samples.items()}
    for row in table.values():
        row["responses_per_second"] = RESPONSES / row["update"]
        row["ratio"] = table[BASE]["update"] / row["update"]
    columns = ("update", "responses_per_second", "ratio", "all_reduce")
    rows = [[name, *(row[c] for c in columns)] for name, row in table.items()]
    titles = ["side", "update, s", "responses/s", "speed-up", "all-reduce, s"]
    title = f"Update of {RESPONSES} responses, {options.precision}"
    shown = harness.table(title, titles, rows)
    harness.finish(options, "scaling", [shown], table=table, samples=samples)


if __name__ == "__main__":
    main()
