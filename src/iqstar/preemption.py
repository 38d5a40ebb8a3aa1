"""How a run ends before its time: told to stop it saves first; if a process fails, all stop."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from iqstar.errors import PreemptedError
from iqstar.ranks import global_max
from iqstar.run_folder import run_folder
from iqstar.slurm import requeue

SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGUSR1") if hasattr(signal, n))
REPEATED = 5.0
"""Seconds within which a signal that comes again is the same one, by another way."""
GRACE = 10.0
"""Seconds that other processes have for their own message, once this one has failed."""


class Preemption(Callback):
    """Saves a checkpoint after the optimiser step during which a signal arrived, then stops.

    One rank that gets the signal is enough. A second signal, later, stops the process at once.
    After SIGUSR1 in a SLURM job the job is queued again; its command should have
    ``--ckpt_path last``. During an evaluation the run stops after the present batch.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._first = 0.0
        self._before: dict[int, Any] = {}
        self._step = 0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to the signals in place of Lightning, which would stop without saving."""
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens, where there was no evaluation before."""
        self._step = trainer.global_step
        self.on_sanity_check_start(trainer, pl_module)

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._received and now - self._first > REPEATED and number in self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._first = self._first or now
        self._received.append(number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks all ranks after every optimiser step.

        Raises:
            PreemptedError: Once the checkpoint is written.
        """
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._stop_if_told(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any
    ) -> None:
        """Asks all ranks after every batch of an evaluation within a training run.

        Raises:
            PreemptedError: Once the checkpoint is written.
        """
        if self._before:
            self._stop_if_told(trainer, pl_module)

    def _stop_if_told(self, trainer: Trainer, module: LightningModule) -> None:
        told = global_max(int(bool(self._received)), module.device)
        if not told:
            return
        again = global_max(int(signal.SIGUSR1 in self._received), module.device)
        saved = "before any step, so nothing was saved"
        if not trainer.sanity_checking:
            path = _folder(trainer) / f"preempted-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            saved = f"after optimiser step {trainer.global_step}, saved {path}"
        if again and trainer.is_global_zero:
            requeue()
        trainer.strategy.barrier()  # SLURM may end a job, and this command, once one process ends
        name = "SIGUSR1" if again else "SIGTERM"
        raise PreemptedError(f"stopped by {name} {saved}; go on with --ckpt_path last")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Puts the handlers back; the processes that this one started do not wait for it."""
        self.on_train_end(trainer, pl_module)
        processes = getattr(trainer.strategy.launcher, "procs", None) or []
        if isinstance(exception, PreemptedError) or not processes:
            return
        deadline = time.monotonic() + GRACE
        for process in processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()


def _folder(trainer: Trainer) -> Path:
    callback = trainer.checkpoint_callback
    folder = getattr(callback, "dirpath", None)
    return Path(folder) if folder else run_folder(trainer) / "checkpoints"
