"""Runs ``iqstar fit`` in forked children and kills them at random moments; see test_crashes.py.

Usage: python killed.py FOLDER KILLS. Prints JSON: what was found after every kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from iqstar import training_cli  # noqa: F401  # imported once, for all children
from iqstar.checkpoints import newest_checkpoint, read_checkpoint
from iqstar.cli import main


def start(folder: Path, *options: str) -> int:
    """A child that trains, saves after every step, and goes on where an earlier one stopped."""
    child = os.fork()
    if child == 0:
        with (folder / "child.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = main(["fit", "--config", str(folder / "config.yaml"), *options])
        os._exit(code)
    return child


def step_of(folder: Path) -> int:
    """Optimiser step of the newest complete checkpoint, which must load; 0 without one."""
    newest = newest_checkpoint(folder)
    return 0 if newest is None else int(read_checkpoint(newest)["global_step"])


def killed_at_random(folder: Path, kills: int) -> dict[str, list[int]]:
    """Kills so many children, a random time after they have begun to train; the last one ends."""
    draw = random.Random(0)
    steps, halves = [0], []
    for _ in range(kills):
        child = start(folder, "--ckpt_path", "last")
        before, waited = step_of(folder), time.monotonic()
        while step_of(folder) == before and time.monotonic() - waited < 60:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps.append(step_of(folder))
        halves.append(len(list(folder.rglob("*.part"))))
    _, status = os.waitpid(start(folder, "--ckpt_path", "last"), 0)
    return {
        "steps": steps,
        "half_written": halves,
        "end": [step_of(folder)],
        "status": [os.waitstatus_to_exitcode(status)],
    }


if __name__ == "__main__":
    print(json.dumps(killed_at_random(Path(sys.argv[1]), int(sys.argv[2]))))
