"""How the update scales on CPUs: one process of two threads against two processes of one (DDP).

Alternating, in fresh processes, on the bundled model and fixed responses, so that every side does
the same work; sampling and frozen scoring are outside of what is timed. Prints medians and writes
``benchmarks/results/scaling.json``:

    python benchmarks/scaling.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "scaling.json"
RESPONSES = 32
STEPS = 3
"""Optimiser steps timed in a process, after one to warm up."""
TEXT = "It depends on the weather, on the season and on how far you would like to walk that day. "
SIDES = {
    "1 process, 2 threads": (1, 2, "auto"),
    "2 processes, ddp": (2, 1, "ddp"),
    "2 processes, fsdp": (2, 1, "fsdp2"),
}


def worker(processes: int, strategy: str) -> None:
    """Trains on fixed responses; the first rank prints seconds of the update and of its parts."""
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from iqstar import InverseQStar, PolicySpec
    from iqstar.data import RepeatedBatches
    from iqstar.estimators import PrincipleEstimator
    from iqstar.mdp import Message, Prompt
    from iqstar.rollouts import DatasetRollout
    from iqstar.strategies import ShardedStrategy
    from iqstar.training_cli import default_precision

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
        PolicySpec(attn_implementation="grouped"),
        PrincipleEstimator("Be kind."),
        rollout=DatasetRollout(max_new_tokens=48),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=made[strategy](),
        precision=default_precision("cpu"),
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


def measure(processes: int, threads: int, strategy: str) -> dict[str, float]:
    """One side, in fresh processes."""
    command = [sys.executable, __file__, "--worker", str(processes), strategy]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measures all sides in turn and compares their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(int(options.worker[0]), options.worker[1])
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(options.rounds):
        for name, side in SIDES.items():
            runs[name].append(measure(*side))
    base = statistics.median(r["update"] for r in runs["1 process, 2 threads"])
    table = {}
    for name, results in runs.items():
        update = statistics.median(r["update"] for r in results)
        table[name] = {
            "update_seconds": round(update, 3),
            "samples_per_second": round(RESPONSES / update, 2),
            "ratio": round(base / update, 3),
            "all_reduce_seconds": round(statistics.median(r["all_reduce"] for r in results), 3),
        }
        print(f"{name:<22}", table[name])
    RESULT.parent.mkdir(exist_ok=True)
    machine = {"processor": platform.processor(), "cores": os.cpu_count()}
    RESULT.write_text(json.dumps({"machine": machine, "sides": table, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
