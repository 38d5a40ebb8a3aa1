"""A tiny run through the command line, in process: what the CLI's tests share."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from iqstar.cli import main

REMOVED = object()


def write_prompts(file: Path, count: int = 24) -> Path:
    """Synthetic rows of JSONL."""
    rows = (
        {"prompt": f"Tell me about the number {7 * i}, {'please' * (i % 3)}"} for i in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tiny_config(folder: Path, model: Path) -> dict[str, Any]:
    """A run of two steps that takes a second; data and runs are in ``folder``."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "iqstar.InverseQStar",
            "init_args": {
                "policy": {"model": str(model)},
                "estimator": {
                    "class_path": "iqstar.estimators.ContrastiveEstimator",
                    "init_args": {
                        "principle": "Please be kind.",
                        "antiprinciple": "Please be rude.",
                        "strength": 1.0,
                    },
                },
                "rollout": {
                    "class_path": "iqstar.rollouts.GenerateRollout",
                    "init_args": {"max_new_tokens": 4},
                },
                "eval_samples": 2,
            },
        },
        "data": {
            "class_path": "iqstar.data.JSONL",
            "init_args": {
                "path": str(write_prompts(folder / "prompts.jsonl")),
                "batch_size": 4,
                "val_prompts": 3,
            },
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder / "runs"), "name": "run", "version": "v"},
            },
        },
    }


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one key set, or taken out if ``value`` is REMOVED."""
    config = copy.deepcopy(config)
    *above, last = key.split(".")
    place = config
    for name in above:
        place = place.setdefault(name, {})
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    return config


def write_config(folder: Path, config: dict[str, Any], name: str = "config.yaml") -> Path:
    """The config as a YAML file."""
    file = folder / name
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def line_of(file: Path, text: str) -> int:
    """Number of the first line that holds a text, from 1."""
    return next(n for n, line in enumerate(file.read_text().splitlines(), 1) if text in line)


def error_of(capsys: Any, *argv: str, code: int = 2) -> str:
    """Runs a command that must fail with exactly one line, and returns that line."""
    capsys.readouterr()
    got = main(list(argv))
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("iqstar: error: ")]
    assert len(lines) == 1, err
    assert got == code, lines
    assert "Traceback" not in out + err
    assert err.rstrip().splitlines()[-1] == lines[0]
    return lines[0].removeprefix("iqstar: error: ")


def launch(*command: str, **environment: str) -> subprocess.Popen:
    """Starts a command of its own, as a user would."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "PL_"))}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [ours.get("PYTHONPATH")])])
    env = {**ours, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        [sys.executable, *command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str]:
    """Exit code and output of a process."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output
