"""Runs ``iqstar fit`` in forked children and kills them at random moments; see test_crashes.py."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

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


def killed_at_random(folder: Path, kills: int) -> int:
    """Kills so many children, a random time after they have begun to train; the last one ends.

    What was found after every kill is in ``found.json`` then.
    """
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
    found = {
        "steps": steps,
        "half_written": halves,
        "end": [step_of(folder)],
        "status": [os.waitstatus_to_exitcode(status)],
    }
    (folder / "found.json").write_text(json.dumps(found))
    return 0
