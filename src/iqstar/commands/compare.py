"""``iqstar compare``: methods side by side, from one YAML, in stages that can be gone on with."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from iqstar.atomic import written_beside
from iqstar.commands.options import OptionParser, path, writable
from iqstar.compare import curves as results
from iqstar.compare.kept import SETTINGS, WRITTEN_TO, check_same, keep
from iqstar.compare.page import claims, markdown, plot
from iqstar.compare.pairs import PAIR_FILES, write_pairs
from iqstar.compare.plan import (
    SDFT,
    TRL,
    Comparison,
    Method,
    Run,
    main_runs,
    sweep_runs,
)
from iqstar.compare.reading import read_comparison
from iqstar.compare.runner import (
    command_of,
    description_of,
    ended_by_sigterm,
    execute,
    settings_of,
)
from iqstar.compare.setting import build, check
from iqstar.errors import InputError, missing_packages

DESCRIPTION = """Trains every method of a comparison on the same policy, prompts, seeds and budget
of sampled responses: first each family's learning rates are tried, then the methods run with the
best ones. Every run is a process of its own (iqstar fit); a finished one is never made again, and
one that was stopped goes on. The table and the plots show what is finished."""


def parser() -> OptionParser:
    """The command's options."""
    made = OptionParser("compare", DESCRIPTION)
    made.add_argument("--config", type=path, required=True, help="such as configs/compare.yaml")
    made.add_argument("--output", type=path, help="folder of the runs; default: runs/NAME of it")
    made.add_argument("--minutes", type=float, help="stop after so many, to go on another time")
    made.add_argument("--fast", action="store_true", help="the small version in the YAML")
    made.add_argument("--data", help="in place of common.data.init_args.path")
    made.add_argument("--report", type=path, help="Markdown file; default: results.md in output")
    made.add_argument("--report-only", "--report_only", action="store_true", help="run nothing")
    return made


def main(argv: list[str]) -> int:
    """Makes what is not finished of a comparison, and writes its report.

    Args:
        argv: The arguments after ``iqstar compare``.

    Returns:
        The exit code: 0 if all is finished, 75 if the time was over before (run it again).

    Raises:
        InputError: If the YAML is wrong, or a run fails.
    """
    options = parser().options(argv)
    comparison = read_comparison(options.config, options.fast)
    if options.data:
        data = {"data": {"init_args": {"path": options.data}}}
        comparison = comparison.with_common(data)
    name = options.config.stem + ("-fast" if options.fast else "")
    output: Path = options.output or Path("runs") / name
    if options.minutes is not None and options.minutes <= 0:
        raise InputError(f"--minutes: must be positive, got {options.minutes}")
    if options.report is not None and options.report.suffix != ".md":
        raise InputError(f"--report: must end in .md, got {options.report}")
    report = options.report or output / "results.md"
    flag = "--report" if options.report else "--output"
    with writable(flag, report):  # rather told now than after hours of runs
        report.parent.mkdir(parents=True, exist_ok=True)
        with report.open("ab"):
            pass
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    with ended_by_sigterm():
        done = not options.report_only and make(comparison, output, deadline)
    with writable(flag, report):
        write_report(comparison, output, report)
    _say(f"Report: {report}")
    if not (done or options.report_only):
        _say("The time is over; the same command goes on")
    return 0 if done or options.report_only else 75


def make(comparison: Comparison, output: Path, deadline: float | None) -> bool:
    """Makes the runs that are not finished.

    Args:
        comparison: What to run.
        output: Folder of the runs.
        deadline: Of ``time.monotonic``; None for no end.

    Returns:
        Whether all are finished.

    Raises:
        InputError: If settings are wrong, those of a finished run are others, or a run fails.
    """
    output.mkdir(parents=True, exist_ok=True)
    pairs = output / "pairs.jsonl"

    def remaining(runs: Iterable[Run]) -> list[Run]:
        found = list(runs)
        for run in found:
            folder = output / run.name
            places = (*WRITTEN_TO, *PAIR_FILES) if run.method.pairs else WRITTEN_TO
            now = description_of(run, comparison, output, pairs)
            check_same(folder / SETTINGS, now, str(folder), places)
        return results.pending(found, output)

    def command(run: Run) -> list[str]:
        keep(output / run.name / SETTINGS, description_of(run, comparison, output, pairs))
        return command_of(run, output)

    if find_spec("matplotlib") is None:
        raise missing_packages("drawing plots", "matplotlib")
    sweeps = remaining(sweep_runs(comparison))
    for method in comparison.methods:
        _check(method, comparison, output)
    _make_pairs(comparison, output, pairs)
    if not execute(sweeps, command, output, deadline, _say):
        return False
    rates = {name: found.rate for name, found in results.choices(comparison, output).items()}
    for name in sorted(comparison.families.keys() - rates.keys()):
        _say(f"families.{name}: no run of its sweep ended with a score, its methods are left out")
    return execute(remaining(main_runs(comparison, rates)), command, output, deadline, _say)


def _check(method: Method, comparison: Comparison, output: Path) -> None:
    """What is wrong with a method's settings is said before the first run, not hours after it."""
    if method.settings == SDFT:
        if find_spec("trl") is None:
            raise missing_packages(f"methods.{method.name}: {SDFT}", TRL)
    else:
        rate = comparison.families[method.family].rates[0]
        run = Run(method=method, rate=rate, seed=0, responses=method.responses, evaluations=1)
        settings = settings_of(run, comparison, output, output / "pairs.jsonl")
        try:
            check(settings, output / "check.yaml")
        except InputError as error:
            raise InputError(f"methods.{method.name}: {error}") from error


def _make_pairs(comparison: Comparison, output: Path, pairs: Path) -> None:
    methods = [method for method in comparison.methods if method.pairs]
    if not methods:
        return
    needed, seed = max(method.responses for method in methods), comparison.sweep_seed
    settings = {"common": dict(comparison.common), "responses": needed, "seed": seed}
    file = pairs.with_suffix(".yaml")
    if pairs.exists() and file.exists():
        runs = ", ".join(str(output / f"{method.name}-*") for method in methods)
        check_same(file, settings, f"{file} and what was trained on the pairs ({runs})")
        return
    setting = build(comparison.common, seed, output / "common.yaml")
    kept, dropped = write_pairs(setting, needed, pairs)
    keep(file, settings)  # last: where it is, all is done
    _say(f"{kept} pairs for DPO, {dropped} left out whose responses the judge ties")


def write_report(comparison: Comparison, output: Path, report: Path) -> None:
    """Writes the Markdown page and, in a folder of its name, its plots.

    Args:
        comparison: What was to be run.
        output: Folder of the runs.
        report: The page.
    """
    chosen = results.choices(comparison, output)
    curves = results.finished(comparison, output)
    parts = [
        "# Methods side by side",
        f"Written by `iqstar compare` (its repository: docs/compare.md). {_versions()}.",
        markdown(comparison, curves, chosen),
    ]
    if curves:
        files = plot(comparison, curves, report.with_suffix(""))
        parts += [claims(comparison, curves)]
        parts += [f"![{file.stem}]({report.stem}/{file.name})" for file in files]
    with written_beside(report) as part:
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _versions() -> str:
    found = {name: _version(name) for name in ("iqstar", "torch", "transformers", "trl")}
    known = [f"{name} {number}" for name, number in found.items() if number]
    return f"{', '.join(known)}; {os.cpu_count()} CPU cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
