"""Makes the runs of a comparison, one process each, until all are done or the time is over."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from iqstar.atomic import remove
from iqstar.compare.kept import SETTINGS
from iqstar.compare.pairs import HELDOUT
from iqstar.compare.plan import SDFT, Comparison, Run, merged
from iqstar.errors import NON_FINITE, InputError
from iqstar.summary import write_json

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
            "check_val_every_n_epoch": None,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": run.name, "version": ""},
            },
        },
    }
    settings = _with_rate(merged(comparison.common, run.method.settings), run)
    batches = settings.get("trainer", {}).get("accumulate_grad_batches", 1)  # of a step
    own["trainer"]["val_check_interval"] = batches * math.ceil(steps / run.evaluations)
    if run.method.pairs:
        files: dict[str, Any] = {
            "path": str(pairs),
            "heldout_path": str(pairs.with_name(HELDOUT)),
        }
        if "subset" in settings.get("data", {}).get("init_args", {}):
            files["subset"] = None  # of the data set that the prompts are from
        settings = merged(settings, {"data": {"init_args": files}})
    return merged(settings, own)


def description_of(run: Run, comparison: Comparison, folder: Path, pairs: Path) -> dict[str, Any]:
    """All that a run depends on, as its ``run.yaml`` has it: our settings, or the peer's."""
    if run.method.settings == SDFT:
        return {
            "common": _with_rate(comparison.common, run),
            "principle": comparison.principle,
            "seed": run.seed,
            "steps": run.steps(comparison.responses_per_step),
            "responses_per_step": comparison.responses_per_step,
            "evaluations": run.evaluations,
            "output": str(folder / run.name),
        }
    return settings_of(run, comparison, folder, pairs)


def command_of(run: Run, folder: Path) -> list[str]:
    """The command that makes a run, or goes on with it; its settings are in ``run.yaml``."""
    file = str(folder / run.name / SETTINGS)
    if run.method.settings == SDFT:
        return [sys.executable, "-m", "iqstar.compare.peer", file]
    return [sys.executable, "-m", "iqstar.cli", "fit", "--config", file, "--ckpt_path", "last"]


def _with_rate(settings: Mapping[str, Any], run: Run) -> dict[str, Any]:
    optimizer = {"init_args": {"lr": run.rate}}
    return merged(settings, {"model": {"init_args": {"optimizer": optimizer}}})


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
        InputError: If a run fails; those before it are kept. One that diverges is finished.
    """
    for number, run in enumerate(runs, start=1):
        if deadline is not None and time.monotonic() >= deadline:
            return False
        started = time.monotonic()
        log = folder / run.name / "log.txt"
        line = command(run)
        with log.open("ab") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output, env=one_gpu())
            code = _wait(process, deadline)
        seconds = time.monotonic() - started
        if code is None:
            say(f"{run.name}: stopped after {seconds:.0f} s; it goes on next time")
            return False
        if code == NON_FINITE:
            write_json(folder / run.name / "summary.json", {"evaluations": []})
        elif code != 0:
            raise InputError(f"{run.name} failed (exit code {code}): {_last_line(log)}; see {log}")
        remove(folder / run.name / "checkpoints")  # it is finished: a gigabyte that nothing needs
        end = f": {_last_line(log)}" if code else ""
        say(f"{number}/{len(runs)} {run.name}: {seconds:.0f} s{end}")
    return True


def one_gpu() -> dict[str, str] | None:
    """The environment of a run: with the first GPU of several, since budgets are of one device."""
    if torch.cuda.device_count() < 2:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible.partition(",")[0]}


def _wait(process: subprocess.Popen[bytes], deadline: float | None) -> int | None:
    """The exit code; None where the deadline came first."""
    try:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        return process.wait(left)
    except subprocess.TimeoutExpired:
        _end(process)
        return None
    except BaseException:  # interrupted: the run must not go on without us
        _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a run to save itself, and kills it if it does not in time."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process in the way of an exception, so that its run ends too."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may ask for signals
        return
    earlier = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"
