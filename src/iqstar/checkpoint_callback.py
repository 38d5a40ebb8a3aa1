"""When a run writes checkpoints: as Lightning does, and so that the newest state is among them."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's checkpoints, and the newest state beside them.

    ``monitor`` keeps the best only; ``every_n_train_steps`` and ``train_time_interval`` leave out
    the last steps. A run that goes on from such a checkpoint loses steps. So what held-out prompts
    were measured on, and what the last step left, is saved in any case, as ``newest-STEP.ckpt``,
    one at a time. ``save_top_k: 0`` saves nothing, or with ``save_last: true`` what Lightning saves
    then.
    """

    _newest = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drops the link to the newest checkpoint where there is to be none."""
        super().setup(trainer, pl_module, stage)
        if self.save_top_k == 0 and self.save_last == "link":
            self.save_last = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was measured."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self.save_newest(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was measured, where epochs are."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self.save_newest(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what the last step left."""
        self.save_newest(trainer)
        super().on_train_end(trainer, pl_module)

    def save_newest(self, trainer: Trainer) -> None:
        """Saves, unless this step's state is saved already."""
        if self._should_skip_saving_checkpoint(trainer) or self.save_top_k == 0:
            return
        metrics = self._monitor_candidates(trainer)
        previous, self._newest = self._newest, self.format_checkpoint_name(metrics, "newest-{step}")
        self._save_checkpoint(trainer, self._newest)
        self._save_last_checkpoint(trainer, metrics)
        if previous and self._should_remove_checkpoint(trainer, previous, self._newest):
            self._remove_checkpoint(trainer, previous)


def save_newest(trainer: Trainer) -> None:
    """Saves what training has left; for those who do what may fail before Lightning saves it.

    Lightning calls the callbacks that save checkpoints after all others. Outside of training
    nothing is saved.
    """
    if not trainer.training:
        return
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, RunCheckpoint):
            callback.save_newest(trainer)
