"""Compares ``iqstar plan``'s peak with the peak that a run's processes really take, on CPUs.

Each case is one ``iqstar fit`` in fresh processes, whose largest resident set is measured. Needs
the bundled model; minutes each:

    python benchmarks/plan_accuracy.py --data harmless-base/test.jsonl.gz full lora
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXPERIMENT = ["--config", "configs/experiment/hh_kind.yaml"]
LORA = ["--config", "configs/policy/lora.yaml"]
CHECKPOINTING = ["--model.policy.gradient_checkpointing", "true"]
SMALL = ["--model.micro_batch_size", "4", "--trainer.accumulate_grad_batches", "4"]
SHARDED = ["--trainer.strategy", "fsdp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
CASES = {
    "full": [],
    "lora": LORA,
    "full, micro-batches of 4": SMALL,
    "full, checkpointing": CHECKPOINTING,
    "full, two processes, fsdp": SHARDED,
    "lora, two processes, fsdp": [*LORA, *SHARDED],
}
"""What each case adds to the experiment."""
LONGEST_PROMPT = 68
"""Tokens of the longest prompt that the experiment's filters leave, with SmolLM2's template."""


def planned(options: list[str]) -> int:
    """Bytes at the peak of each process, by ``iqstar plan``."""
    options = [*options, "--prompt_tokens", str(LONGEST_PROMPT), "--json"]
    command = [sys.executable, "-m", "iqstar.cli", "plan", *EXPERIMENT, *options]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout)["peak_bytes"])


def measured(options: list[str], data: Path, steps: int) -> int:
    """Bytes of the largest resident set among the processes of a run."""
    with tempfile.TemporaryDirectory() as folder:
        small = {
            "data.path": data.resolve(),
            "trainer.max_steps": steps,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_checkpointing": "false",
            "trainer.logger.init_args.save_dir": folder,
        }
        options = [*options, *(part for k, v in small.items() for part in (f"--{k}", str(v)))]
        fit = [sys.executable, "-m", "iqstar.cli", "fit", *EXPERIMENT, *options]
        subprocess.run(fit, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    """Prints one row for one case; each in a process of its own, since maxima only grow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--data", type=Path, required=True, help="a file of HH-RLHF")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    if len(given.cases) > 1:
        print("| case | planned, GiB | measured, GiB | difference |\n|---|---|---|---|", flush=True)
        for case in given.cases:
            own = ["--data", str(given.data), "--steps", str(given.steps), case]
            subprocess.run([sys.executable, __file__, *own], check=False)
        return
    case = given.cases[0]
    real = measured(CASES[case], given.data, given.steps)
    plan = planned(CASES[case])
    print(
        f"| {case} | {plan / 2**30:.2f} | {real / 2**30:.2f} | {plan / real - 1:+.0%} |", flush=True
    )


if __name__ == "__main__":
    main()
