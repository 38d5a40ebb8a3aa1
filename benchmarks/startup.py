"""Seconds from the shell to help, and to the first training step on the cached bundled model.

The fit is the quickstart's without the evaluation before training (minutes of sampling, not
start-up); its first step begins when the models are loaded and the first prompts are there:

    python benchmarks/startup.py --rounds 5
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from lightning.pytorch import Callback

import harness

BEGAN = "IQSTAR_BENCHMARK_BEGAN"


class FirstStep(Callback):
    """Says when the first step begins, and ends the process."""

    def on_train_batch_start(self, *arguments: Any) -> None:
        """See above; the time is the wall clock's, since the shell's process began it."""
        print("SECONDS", time.time() - float(os.environ[BEGAN]), flush=True)
        os._exit(0)


def seconds_to_help(threads: int) -> float:
    """Seconds that ``iqstar --help`` takes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "iqstar.cli", "--help"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    return time.perf_counter() - started


def seconds_to_step(threads: int) -> float:
    """Seconds until ``iqstar fit`` begins its first step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "iqstar.cli", "fit", "--config", "configs/quickstart.yaml"]
        command += ["--trainer.num_sanity_val_steps", "0", "--trainer.max_steps", "1"]
        command += ["--trainer.logger.init_args.save_dir", folder]
        command += ["--trainer.callbacks+", "startup.FirstStep"]
        paths = [str(harness.ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            BEGAN: str(time.time()),
        }
        done = subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    if not lines:
        raise SystemExit(f"the fit did not begin a step:\n{done.stderr[-4000:]}")
    return float(lines[0].split()[1])


def main() -> None:
    """Measures both in turn."""
    options = harness.parser(__doc__).parse_args()
    sides = {"iqstar --help": seconds_to_help, "iqstar fit, to its first step": seconds_to_step}
    samples = harness.alternate(
        {name: {"name": name} for name in sides},
        options.rounds,
        lambda side: {"seconds": sides[side["name"]](options.threads)},
    )
    table = {name: harness.medians(found) for name, found in samples.items()}
    rows = [[name, row["seconds"]] for name, row in table.items()]
    shown = harness.table("Start-up", ["command", "seconds"], rows)
    harness.finish(options, "startup", [shown], table=table, samples=samples)


if __name__ == "__main__":
    main()
