"""Makes the runs of a comparison, one process each, until all are done or the time is over."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from iqstar.atomic import remove, written_beside
from iqstar.compare.pairs import HELDOUT
from iqstar.compare.plan import SDFT, Comparison, Run, merged
from iqstar.errors import InputError

GRACE = 120.0
"""Seconds that a run is given to save itself at the end of the time."""


def settings_of(run: Run, comparison: Comparison, folder: Path, pairs: Path) -> dict[str, Any]:
    """The settings of ``iqstar fit`` for a run of ours.

    Args:
        run: Which one.
        comparison: What it is a part of.
        folder: Of all runs.
        pairs: The file of pairs, for methods that train on them.
    """
    assert not isinstance(run.method.settings, str)
    steps = run.steps(comparison.responses_per_step)
    own: dict[str, Any] = {
        "seed_everything": run.seed,
        "trainer": {
            "max_steps": steps,
            "val_check_interval": max(steps // run.evaluations, 1),
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": run.name, "version": ""},
            },
        },
    }
    settings = merged(_with_rate(comparison.common, run), run.method.settings)
    if run.method.pairs:
        files = {"path": str(pairs), "heldout_path": str(pairs.with_name(HELDOUT))}
        settings = merged(settings, {"data": {"init_args": files}})
    settings = merged(settings, own)
    settings["trainer"]["check_val_every_n_epoch"] = None
    return settings


def command_of(run: Run, comparison: Comparison, folder: Path, pairs: Path) -> list[str]:
    """The command that makes a run, or goes on with it; its settings are written to a file."""
    place = folder / run.name
    place.mkdir(parents=True, exist_ok=True)
    file = place / "run.yaml"
    if run.method.settings == SDFT:
        content = {
            "common": _with_rate(comparison.common, run),
            "principle": comparison.principle,
            "seed": run.seed,
            "steps": run.steps(comparison.responses_per_step),
            "responses_per_step": comparison.responses_per_step,
            "evaluations": run.evaluations,
            "output": str(place),
        }
        _write(file, content)
        return [sys.executable, "-m", "iqstar.compare.peer", str(file)]
    _write(file, settings_of(run, comparison, folder, pairs))
    return [sys.executable, "-m", "iqstar.cli", "fit", "--config", str(file), "--ckpt_path", "last"]


def _with_rate(common: Mapping[str, Any], run: Run) -> dict[str, Any]:
    return merged(common, {"model": {"init_args": {"optimizer": {"init_args": {"lr": run.rate}}}}})


def _write(file: Path, content: dict[str, Any]) -> None:
    with written_beside(file) as part:
        part.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def execute(
    runs: Sequence[Run],
    command: Callable[[Run], list[str]],
    folder: Path,
    deadline: float | None,
    say: Callable[[str], None],
) -> bool:
    """Makes runs in their order.

    Args:
        runs: Those that are not finished.
        command: Of a run.
        folder: Of all runs; each one's output goes to ``log.txt`` in its own.
        deadline: Of ``time.monotonic``; a run that is not done by then is asked to save itself,
            and goes on next time. None for no deadline.
        say: Told what happens.

    Returns:
        Whether all are done.

    Raises:
        InputError: If a run fails; those before it are kept.
    """
    for number, run in enumerate(runs, start=1):
        if deadline is not None and time.monotonic() >= deadline:
            return False
        started = time.monotonic()
        log = folder / run.name / "log.txt"
        line = command(run)
        with log.open("ab") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output)
            code = _wait(process, deadline)
        seconds = time.monotonic() - started
        if code is None:
            say(f"{run.name}: stopped after {seconds:.0f} s; it goes on next time")
            return False
        if code != 0:
            raise InputError(f"{run.name} failed (exit code {code}): {_last_line(log)}; see {log}")
        remove(folder / run.name / "checkpoints")  # it is finished: a gigabyte that nothing needs
        say(f"{number}/{len(runs)} {run.name}: {seconds:.0f} s")
    return True


def _wait(process: subprocess.Popen[bytes], deadline: float | None) -> int | None:
    """The exit code; None where the deadline came first."""
    try:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        return process.wait(left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None
    except BaseException:  # interrupted: the run must not go on without us
        process.terminate()
        process.wait(GRACE)
        raise


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"
