"""The end of a run: a last evaluation, and what came of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iqstar.alignment import AlignmentModule
from iqstar.atomic import written_beside
from iqstar.evaluation import Evaluation
from iqstar.export_callback import FOLDER, Export
from iqstar.judges import Judge
from iqstar.run_folder import run_folder

ROWS = (
    ("judge", "judge score"),
    ("kl", "KL to the reference (nats/token)"),
    ("entropy", "entropy (nats/token)"),
    ("response_length", "response length (tokens)"),
    ("distinct_2", "distinct-2"),
    ("eos_rate", "ended by themselves"),
)
"""What the summary's table shows, in this order."""


class RunSummary(Callback):
    """Evaluates after the last step and writes ``summary.json``.

    The run's folder then holds ``summary.json``, ``samples.json`` (held-out responses before and
    after) and the log, beside the trained model that :class:`~iqstar.export_callback.Export` wrote.

    Args:
        examples: Before/after responses printed at the end, one to each of the first prompts.
    """

    def __init__(self, examples: int = 3) -> None:
        self.examples = examples
        self.finished = False
        self._before = 0.0
        self._started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        """Seconds so far, of the processes that went before too."""
        return {"seconds": self._before + time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self._before = state_dict["seconds"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops after the last step in the way that makes Lightning validate once more."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes and prints the summary."""
        assert isinstance(pl_module, AlignmentModule)
        self.finished = True
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        exports = any(isinstance(c, Export) and c.at_end for c in callbacks)
        ends = first_and_last(pl_module.evaluations, trainer.global_step)
        summary = summarize(pl_module, ends) | {
            "optimizer_steps": trainer.global_step,
            "seconds": round(self.state_dict()["seconds"], 1),
            "policy": str(folder / FOLDER) if exports else None,
            "precision": str(trainer.precision),
            "evaluations": evaluation_rows(pl_module.evaluations),
        }
        write_json(folder / "summary.json", summary)
        samples = {
            name: [{**asdict(s), **_numbers({"score": s.score})} for s in end.samples]
            for name, end in ends.items()
        }
        write_json(folder / "samples.json", samples)
        print_summary(summary, ends, self.examples, pl_module.eval_samples)


def evaluation_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Evaluations without their samples, as plain JSON values."""
    return [
        {
            "step": e.step,
            "sampled": e.sampled,
            "seconds": e.seconds,
            "metrics": _numbers(e.metrics),
        }
        for e in evaluations
    ]


def first_and_last(history: Sequence[Evaluation], steps: int) -> dict[str, Evaluation]:
    """The evaluation before training and that after the last step, those that were made.

    Args:
        history: All evaluations of a run.
        steps: Optimiser steps of the run.

    Returns:
        ``before`` and ``after``; not the first where it was on other prompts, which it says.
    """
    ends = {}
    if history and history[0].step == 0:
        ends["before"] = history[0]
    if history and history[-1].step == steps > 0:
        ends["after"] = history[-1]
    asked = [[sample.prompt for sample in end.samples] for end in ends.values()]
    if len(asked) == 2 and asked[0] != asked[1]:
        rank_zero_warn(
            "The evaluation before training was on other held-out prompts than the last one, so "
            "the summary does not compare them; keep data and model.eval_samples when a run goes on"
        )
        del ends["before"]
    return ends


def summarize(module: AlignmentModule, ends: Mapping[str, Evaluation]) -> dict[str, Any]:
    """What was measured; a number that was not is null.

    Returns:
        ``samples`` (responses sampled in training), ``kl`` (mean over held-out on-policy response
        tokens of KL(π_θ‖π_ref), exact over the vocabulary, nats, T = 1), ``judge`` (name, before,
        after, prompts), ``before`` and ``after`` with all metrics, and the number of weights.
        ``summary.json`` also has ``optimizer_steps``, ``seconds`` (training and evaluation),
        ``policy`` (path of the trained model), ``precision``, and all ``evaluations`` with the
        responses that training had sampled and the seconds that it had taken by then.
    """
    before, after = (
        _comparable(ends[name], module.judge) if name in ends else None
        for name in ("before", "after")
    )
    trained, total = module.policy.trainable() if module.policy else (0, 0)
    last = ends.get("after", ends.get("before"))
    judge = module.judge and {
        "name": module.judge.name,
        "version": module.judge.version,
        "before": before.get("judge") if before else None,
        "after": after.get("judge") if after else None,
        "prompts": len(last.samples) // module.eval_samples if last else 0,
        "samples_per_prompt": module.eval_samples,
    }
    return {
        "samples": module.progress.samples,
        "kl": after["kl"] if after else None,
        "judge": judge,
        "trained_weights": trained,
        "weights": total,
        "before": before,
        "after": after,
    }


def _comparable(evaluation: Evaluation, judge: Judge | None) -> dict[str, float | None]:
    """Its metrics, without the score of a judge that is not the run's any more."""
    same = judge is None or evaluation.judge in (None, judge.identity)
    metrics = evaluation.metrics
    return _numbers(metrics if same else {k: v for k, v in metrics.items() if k != "judge"})


def _numbers(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}


def print_summary(
    summary: dict[str, Any], ends: Mapping[str, Evaluation], examples: int, per_prompt: int
) -> None:
    """Prints the before/after table, some responses and where the model is."""
    console = Console()
    before, after = summary["before"] or {}, summary["after"] or {}
    table = Table(title="Held-out prompts", show_edge=False)
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in ROWS:
        values = [_shown(side.get(name)) for side in (before, after)]
        if name == "judge" and summary["judge"]:
            label = f"{label} ({summary['judge']['name']})"
        table.add_row(label, *values)
    console.print()
    console.print(table)
    if len(ends) == 2:
        sides = zip(ends["before"].samples, ends["after"].samples, strict=True)
        for first, last in islice(sides, 0, examples * per_prompt, per_prompt):
            console.print(f"\n[bold]{_escaped(first.prompt)}[/bold]")
            console.print(f"[dim]before[/dim] {_escaped(first.response)}")
            console.print(f"[dim]after [/dim] {_escaped(last.response)}")
    console.print(
        f"\n{summary['samples']} sampled responses, {summary['optimizer_steps']} optimiser steps, "
        f"{summary['seconds']:.0f} s"
    )
    if summary["policy"]:
        console.print(f"Trained model: {summary['policy']}", soft_wrap=True, markup=False)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _escaped(text: str) -> str:
    return escape(" ".join(text.split()))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one go, so that a reader never sees half of it."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    with written_beside(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
