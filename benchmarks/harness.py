"""What all benchmarks share: fresh alternating processes, medians, prompts, tables, results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
HH = ROOT / "../shared/data/hh_rlhf/harmless-base_test_a.jsonl.gz"
"""Real prompts, where they are; otherwise the shipped ones are taken, or those of ``--data``."""
PACKAGES = ("torch", "transformers", "lightning", "trl", "peft", "accelerate", "iqstar")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16")
"""Instructions that decide how fast a processor multiplies matrices."""

CROWDED = 0.05
"""Share of the machine that others may use before a measurement is called into question."""

TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "gradient_clip_val": 1.0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Of every Trainer that is timed: nothing runs beside the training."""
Sample = dict[str, Any]
"""What one worker process measured."""


def parser(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has.

    Args:
        doc: The script's docstring; its first line describes the command.
        rounds: How often each side runs by default.
    """
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--rounds", type=int, default=rounds, help="fresh processes of each side")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    made.add_argument("--model", default="bundled", help="as model.policy.model")
    made.add_argument("--data", type=Path, help="a file of HH-RLHF; default: the shipped prompts")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    made.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return made


# -- measuring -----------------------------------------------------------------------------------


def run_worker(script: str, settings: Mapping[str, Any], threads: int, **env: str) -> Sample:
    """Runs a script's worker in a fresh process; its last line of output is JSON.

    To that it adds ``others``: the share of the machine's processor time that other programs took
    meanwhile. Seconds measured beside other work say little.

    Args:
        script: Path of the script; it gets ``--worker JSON``.
        settings: What the worker is told.
        threads: Of the process.
        env: Further environment variables.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        **env,
    }
    command = [sys.executable, script, "--worker", json.dumps(settings)]
    before, started = foreign_seconds(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, env=environment, stdout=-1, stderr=errors, text=True)
        if done.returncode:
            errors.seek(0)
            raise SystemExit(f"{Path(script).name} {settings} failed:\n{errors.read()[-4000:]}")
    result: Sample = json.loads(done.stdout.splitlines()[-1])
    spent = (time.perf_counter() - started) * (os.cpu_count() or 1)
    return result | {"others": round(max(0.0, foreign_seconds() - before) / spent, 3)}


def foreign_seconds() -> float:
    """Processor seconds since the start that this process and its children did not use."""
    try:
        busy = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:  # not Linux
        return 0.0
    ticks = sum(map(int, busy)) - int(busy[3]) - int(busy[4])  # less idle and waiting
    own = os.times()
    mine = own.user + own.system + own.children_user + own.children_system
    return ticks / os.sysconf("SC_CLK_TCK") - mine


def alternate(
    sides: Mapping[str, Mapping[str, Any]],
    rounds: int,
    measure: Callable[[Mapping[str, Any]], Sample],
) -> dict[str, list[Sample]]:
    """Measures all sides in turn, ``rounds`` times over, so that all meet the same machine.

    Args:
        sides: Name of each side, and its settings.
        rounds: How often.
        measure: One measurement of a side.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, settings in sides.items():
            started = time.perf_counter()
            samples[name].append(measure(settings))
            took = time.perf_counter() - started
            others = samples[name][-1].get("others", 0.0)
            crowded = f", {others:.0%} of the machine used by others" if others > CROWDED else ""
            print(f"round {number + 1}: {name}: {took:.0f} s{crowded}", file=sys.stderr, flush=True)
    return samples


def medians(samples: Sequence[Sample]) -> Sample:
    """The median of every number over the samples, inside mappings too; others as in the first."""
    result: Sample = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, dict):
            result[key] = medians(values)
        elif isinstance(first, int | float) and not isinstance(first, bool):
            result[key] = statistics.median(values)
        else:
            result[key] = first
    return result


def linear_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares ``y = a + b·x``: a, b and R², the share of y's variance that it explains."""
    slope, intercept = statistics.linear_regression(x, y)
    return intercept, slope, statistics.correlation(x, y) ** 2


# -- what is measured on -------------------------------------------------------------------------


def prompts(data: Path | None, count: int) -> list[str]:
    """User turns, the same for every side: of HH-RLHF as configs/experiment/hh_kind.yaml filters.

    Args:
        data: A file of HH-RLHF; None for the one next to the checkout, or the shipped prompts.
        count: How many; they repeat where there are fewer.
    """
    from iqstar.data import HHRLHF, Sample

    path = data or (HH if HH.is_file() else None)
    if path:
        bounds = {"first_turn_only": True, "min_prompt_chars": 10, "max_prompt_chars": 150}
        module: Any = HHRLHF(path=str(path), **bounds)
    else:
        module = Sample()
    module.setup()
    texts = [prompt.messages[-1].content for prompt in module.train_prompts]
    return [texts[i % len(texts)] for i in range(count)]


def machine() -> dict[str, Any]:
    """The processor, its cores and matrix instructions, and the memory."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in info.splitlines())
    }
    present = set(fields.get("flags", "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "family": "/".join(fields.get(k, "") for k in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in present],
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Python, the packages, and the commit of this checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return found | {"commit": done.stdout.strip() or "unknown"}


# -- what is shown and kept ----------------------------------------------------------------------


def digits(value: Any) -> str:
    """A number to three significant digits, never in powers of ten; anything else as text."""
    if isinstance(value, float):
        whole = len(str(int(abs(value))))
        return f"{value:.{max(0, 3 - whole)}f}"
    return "" if value is None else str(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What one table shows, as text: for the terminal, the result file and the docs."""
    body = [[digits(value) for value in row] for row in rows]
    return {"title": title, "columns": list(columns), "rows": body}


def show(shown: Mapping[str, Any]) -> None:
    """Prints a :func:`table`."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=shown["title"], title_justify="left")
    for number, column in enumerate(shown["columns"]):
        made.add_column(column, justify="right" if number else "left")
    for row in shown["rows"]:
        made.add_row(*row)
    Console(width=max(150, Console().width)).print(made)


def finish(
    options: argparse.Namespace,
    name: str,
    tables: Sequence[Mapping[str, Any]],
    **content: Any,
) -> Path:
    """Prints the tables, and writes ``NAME.json``: machine, versions, command, all samples.

    Args:
        options: The command line's.
        name: Of the result.
        tables: Each by :func:`table`.
        content: What was measured.
    """
    for shown in tables:
        show(shown)
    hidden = ("worker", "out", "data")
    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / f"{name}.json"
    record = {
        "benchmark": name,
        "script": Path(sys.argv[0]).name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "options": {k: v for k, v in vars(options).items() if k not in hidden},
        "tables": list(tables),
        **content,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
