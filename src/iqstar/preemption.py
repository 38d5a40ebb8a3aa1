"""A run that is told to stop saves first: SIGTERM, and SLURM's warning before its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from iqstar.callbacks import run_folder
from iqstar.errors import PreemptedError
from iqstar.ranks import global_max

SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGUSR1") if hasattr(signal, n))


class Preemption(Callback):
    """Saves a checkpoint after the optimiser step during which a signal arrived, then stops.

    One rank that gets the signal is enough. A second signal stops the process at once. After
    SIGUSR1 in a SLURM job the job is queued again; its command should have ``--ckpt_path last``.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to the signals in place of Lightning, which would stop without saving."""
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks all ranks after every optimiser step.

        Raises:
            PreemptedError: Once the checkpoint is written.
        """
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        received = global_max(self._received, pl_module.device)
        if not received:
            return
        path = _folder(trainer) / f"preempted-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        if received != signal.SIGTERM and trainer.is_global_zero:
            requeue()
        raise PreemptedError(
            f"stopped by {signal.Signals(received).name} after optimiser step "
            f"{trainer.global_step}, saved {path}; go on with --ckpt_path last"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Puts the handlers back."""
        self.on_train_end(trainer, pl_module)


def requeue() -> None:
    """Queues this SLURM job again, if this is one."""
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        return
    result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if result.returncode:
        rank_zero_warn(f"scontrol requeue {job} failed: {result.stderr.strip()}")
    else:
        rank_zero_info(f"Queued SLURM job {job} again")


def _folder(trainer: Trainer) -> Path:
    callback = trainer.checkpoint_callback
    folder = getattr(callback, "dirpath", None)
    return Path(folder) if folder else run_folder(trainer) / "checkpoints"
