"""What ends a run before its time: an estimator that fails on one rank, and a signal."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import distributed

from iqstar.errors import InputError
from iqstar.estimators import NullEstimator


class Dying(NullEstimator):
    """NullEstimator for one rollout; then rank 1 gives up."""

    calls = 0

    def estimate(self, *arguments: Any) -> Any:
        """See NullEstimator."""
        self.calls += 1
        if self.calls > 1 and distributed.get_rank() == 1:
            raise InputError("data.path: rank 1 had enough")
        return super().estimate(*arguments)


class Stopped(Callback):
    """Sends this process SIGTERM once, before a training step or a batch of an evaluation.

    Args:
        step: Optimiser steps done by then.
        batch: Of the evaluation at that step; None for the training step.
    """

    def __init__(self, step: int, batch: int | None = None) -> None:
        self.step = step
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """The signal, where it is due."""
        if self.batch is None and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, *arguments: Any
    ) -> None:
        """The signal, where it is due."""
        if trainer.global_step == self.step and batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)
