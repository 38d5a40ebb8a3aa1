"""Exports the policy at the end of a run, and beside every checkpoint where that is asked for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from iqstar.alignment import AlignmentModule
from iqstar.atomic import remove
from iqstar.card import RunRecord, model_card, settings_of
from iqstar.checkpoint_callback import save_newest
from iqstar.export import SHARD_SIZE, Dtype, check_replaceable, check_shard_size, export_policy
from iqstar.run_folder import run_folder
from iqstar.sharding import full_state_dict, is_sharded

FOLDER = "policy"
"""What the exported model is called in a run's folder."""


class Export(Callback):
    """Writes the policy in Hugging Face format, or as a PEFT adapter, with a model card.

    Args:
        at_end: Write ``policy/`` into the run's folder after the last step.
        every_save: Write ``NAME.policy/`` beside every checkpoint ``NAME.ckpt``, before the next
            step; it is removed when the run removes the checkpoint.
        dtype: Of the written weights; null for that of the trained ones.
        max_shard_size: Largest file of weights, such as 500MB; adapters are one file always.
    """

    def __init__(
        self,
        at_end: bool = True,
        every_save: bool = False,
        dtype: Dtype | None = None,
        max_shard_size: str = SHARD_SIZE,
    ) -> None:
        check_shard_size(max_shard_size, "export.max_shard_size")
        self.at_end = at_end
        self.every_save = every_save
        self.dtype = dtype
        self.max_shard_size = max_shard_size
        self._beside: dict[Path, int] = {}  # exported checkpoint → its step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks before training where the model will go.

        Raises:
            InputError: If something else is there.
        """
        if self.at_end and stage == "fit":
            folder = run_folder(trainer) / FOLDER
            key = "logger.init_args.save_dir" if trainer.logger else "default_root_dir"
            check_replaceable(folder, "export.at_end", f"move it, or set trainer.{key}")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Exports what was saved since the last step; the weights are still those."""
        self._follow_checkpoints(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the policy; every rank takes part, the first one writes.

        What training has left is saved before, so that a failure loses nothing.
        """
        save_newest(trainer)
        if self.at_end:
            self._export(trainer, pl_module, run_folder(trainer) / FOLDER)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports what was saved after the last step."""
        self._follow_checkpoints(trainer, pl_module)

    def _follow_checkpoints(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.every_save:
            return
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback._last_checkpoint_saved:
                continue
            newest, step = Path(callback._last_checkpoint_saved), callback._last_global_step_saved
            if self._beside.get(newest) != step:
                self._export(trainer, pl_module, _beside(newest))
                self._beside[newest] = step
        if trainer.is_global_zero:  # the record stays, so that it is the same on all ranks
            for checkpoint in self._beside:
                if not checkpoint.exists():
                    remove(_beside(checkpoint))

    def _export(self, trainer: Trainer, module: LightningModule, folder: Path) -> None:
        assert isinstance(module, AlignmentModule)
        policy = module.policy
        assert policy is not None
        weights = None
        if is_sharded(policy.actor):
            whole = full_state_dict(policy.actor)
            weights = {name.removeprefix("model."): weight for name, weight in whole.items()}
        if not trainer.is_global_zero:
            return
        export_policy(
            policy,
            folder,
            card=model_card(
                record_of_run(module, trainer), policy.spec, fingerprint=policy.actor.fingerprint
            ),
            weights=weights,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
        )


def record_of_run(module: AlignmentModule, trainer: Trainer) -> RunRecord:
    """What a run knows of itself at its present step; settings from its parts where no YAML is."""
    recipe = module.recipe
    data = getattr(trainer, "datamodule", None)
    return RunRecord(
        settings=yaml.safe_load(recipe) if recipe else settings_of(module, data),
        recipe=recipe,
        command=module.command,
        step=trainer.global_step,
        samples=module.progress.samples,
        evaluations=[asdict(found) for found in module.evaluations],
    )


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(f".{FOLDER}")
