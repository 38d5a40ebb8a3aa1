"""Runs every benchmark in turn, then compares what was measured with the project's goals.

python benchmarks/all.py --rounds 5
python benchmarks/all.py --fast        # every script once, in small settings: does it all work?
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import goals
import harness

SCRIPTS = ("step", "padding", "rollouts", "kernel", "utilisation", "linear", "startup", "scaling")
FAST = {
    "step": ["--precision", "32-true", "--prompts", "2", "--tokens", "8"],
    "padding": ["--prompts", "4", "--tokens", "8", "--steps", "1"],
    "rollouts": ["--precision", "32-true", "--responses", "2", "--tokens", "8", "--repeats", "1"],
    "kernel": ["--precision", "32-true", "--vocab", "8192", "--lengths", "128"],
    "utilisation": ["--precision", "32-true", "--prompts", "2", "--tokens", "8", "--steps", "1"],
    "linear": ["--prompts", "2", "4", "6", "--tokens", "4", "8", "16"],
    "startup": [],
    "scaling": [],
}
"""Arguments of a smoke run, whose figures mean nothing."""
WITH_SERVER = ("step", "rollouts")
WITH_CONVERSATIONS = ("padding",)
"""Measured where there is a file of HH-RLHF only; the shipped prompts are all short."""


def main() -> None:
    """Runs the scripts; a smoke run writes no result that would be quoted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes of each side")
    parser.add_argument("--fast", action="store_true", help="a smoke run of minutes")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--data", help="a file of HH-RLHF; default: the shipped prompts")
    parser.add_argument("--model", default="bundled", help="as model.policy.model")
    parser.add_argument("--vllm", help="URL of a running server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if options.fast else harness.RESULTS
        conversations = options.data or harness.HH.is_file()
        for name in options.only:
            if name in WITH_CONVERSATIONS and not conversations:
                print(f"{name}: left out; give a file of HH-RLHF with --data")
                continue
            command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
            command += ["--out", str(out), "--model", options.model]
            command += ["--rounds", "1" if options.fast else str(options.rounds)]
            command += FAST[name] if options.fast else []
            command += ["--data", options.data] if options.data else []
            if options.vllm and name in WITH_SERVER:
                command += ["--vllm", options.vllm]
            subprocess.run(command, check=True)
        harness.show(goals.table(goals.read(out)))


if __name__ == "__main__":
    main()
