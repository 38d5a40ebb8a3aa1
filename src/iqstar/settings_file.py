"""Keeps all settings of a run beside its results; for the command line only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from iqstar.run_folder import run_folder


class SettingsFile(SaveConfigCallback):
    """Writes all settings of a run to ``config.yaml`` in its folder.

    Not what it went on from, so that the file makes the whole run again. Without a logger it writes
    none: the file could be one of the user's.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"save_to_log_dir": False})
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the folder, on every rank."""
        self._folder = run_folder(trainer) if trainer.logger else None
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file, on the first rank."""
        if self._folder is not None:
            file = str(self._folder / self.config_filename)
            config = self.config.clone()
            config.pop("ckpt_path", None)
            self.parser.save(config, file, skip_none=False, overwrite=True, multifile=False)
