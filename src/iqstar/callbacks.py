"""What happens beside training: sample tables, a KL limit, predictions on disk."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from iqstar.alignment import AlignmentModule
from iqstar.errors import InputError
from iqstar.evaluation import Evaluation
from iqstar.run_folder import run_folder


class SampleTable(Callback):
    """Writes a table of sampled responses to TensorBoard at every evaluation.

    Args:
        rows: Held-out prompts shown, the first response to each; not selected.
    """

    def __init__(self, rows: int = 8) -> None:
        self.rows = rows

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the newest evaluation."""
        assert isinstance(pl_module, AlignmentModule)
        if not pl_module.evaluations:
            return
        newest = pl_module.evaluations[-1]
        text = markdown_table(newest, pl_module.eval_samples, self.rows)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", text, global_step=newest.step)


def markdown_table(evaluation: Evaluation, per_prompt: int, rows: int) -> str:
    """The first response to each of the first prompts, as a Markdown table."""
    lines = ["| prompt | response | score |", "|---|---|---|"]
    for sample in evaluation.samples[::per_prompt][:rows]:
        prompt, response = (
            text.replace("|", "\\|").replace("\n", "<br>")
            for text in (sample.prompt, sample.response)
        )
        lines.append(f"| {prompt} | {response} | {sample.score:.2f} |")
    return "\n".join(lines)


class KLLimit(Callback):
    """Stops a run that has moved too far from the reference; it still evaluates and exports.

    Args:
        limit: Largest mean of ``train/kl`` over the last steps, nats per token; null for none.
        steps: Optimiser steps that are averaged.
    """

    def __init__(self, limit: float | None = None, steps: int = 5) -> None:
        if (limit is not None and limit <= 0) or steps < 1:
            raise InputError(
                f"kl: limit must be positive or null and steps at least 1, got {limit} and {steps}"
            )
        self.limit = limit
        self._recent: deque[float] = deque(maxlen=steps)
        self._step = 0
        self._stopped = False

    def state_dict(self) -> dict[str, Any]:
        """The steps that are averaged, and whether they stopped the run."""
        return {"recent": list(self._recent), "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the steps of a checkpoint."""
        self._recent.extend(kl for kl in state_dict["recent"] if not math.isnan(kl))
        self._stopped = state_dict.get("stopped", False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes note of the step that a resumed run starts from.

        Raises:
            InputError: If the responses are not the policy's own: what they estimate is no KL.
        """
        assert isinstance(pl_module, AlignmentModule)
        if self.limit is not None and not pl_module.on_policy:
            raise InputError(
                "kl.limit: train/kl estimates the KL from responses that the policy samples, and "
                "this run trains on others; leave kl.limit out, and see val/kl"
            )
        self._step = trainer.global_step
        if self._stopped:  # it stays so, unless the limit is a higher one now
            self._stop_if_far(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the newest optimiser step, once."""
        if self.limit is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        kl = float(trainer.callback_metrics["train/kl"])
        if not math.isnan(kl):  # as it is where every response was left out: nothing was measured
            self._recent.append(kl)
            self._stop_if_far(trainer)

    def _stop_if_far(self, trainer: Trainer) -> None:
        if self.limit is None or len(self._recent) < (self._recent.maxlen or 0):
            return
        mean = sum(self._recent) / len(self._recent)
        if mean > self.limit:
            rank_zero_info(f"Stopping: train/kl is {mean:.3f}, above kl.limit={self.limit}")
            trainer.should_stop = self._stopped = True


class PredictionWriter(BasePredictionWriter):
    """Writes responses with their per-token credits as JSON lines.

    Args:
        path: The file; null for ``predictions.jsonl`` in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._opened: Path | None = None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Appends a batch; with several ranks each writes a file of its own."""
        path = (
            Path(self.path).expanduser() if self.path else run_folder(trainer) / "predictions.jsonl"
        )
        if trainer.world_size > 1:
            path = path.with_suffix(f".{trainer.global_rank}{path.suffix}")
        mode = "a" if self._opened == path else "w"
        self._opened = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8") as file:
                for row in prediction:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(
                f"predictions.path: cannot write {path} ({error.strerror}); name another file"
            ) from error
