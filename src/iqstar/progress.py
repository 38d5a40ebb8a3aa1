"""What a run shows on the terminal while it trains."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_info

from iqstar.alignment import AlignmentModule


class WeightsLine(Callback):
    """Says how many weights are trained, in place of Lightning's table of modules."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says it once, when the models are loaded."""
        assert isinstance(pl_module, AlignmentModule)
        assert pl_module.policy is not None
        trained, total = pl_module.policy.trainable()
        rank_zero_info(
            "Training %s of %s weights (%.1f%%), %s",
            *(f"{trained:,}", f"{total:,}", 100 * trained / total, trainer.precision),
        )


class ProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, in optimiser steps rather than endless epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loss and KL, without the run's version number."""
        metrics: dict[str, Any] = super().get_metrics(*args, **kwargs)
        metrics.pop("v_num", None)
        return metrics
