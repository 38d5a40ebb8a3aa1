"""Where a run's files are: those of its logger, whichever logger that is."""

from __future__ import annotations

from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import Logger


def runs_folder(logger: Logger | None, root: str) -> Path:
    """The folder of all runs of a logger's name.

    Args:
        logger: The trainer's first one.
        root: ``trainer.default_root_dir``, the folder where there is no logger.
    """
    if logger is None:
        return Path(root)
    own = getattr(logger, "root_dir", None)  # TensorBoard's and CSV's have one
    return Path(own or Path(logger.save_dir or root) / str(logger.name))


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run, where Lightning puts its checkpoints too; every rank must ask.

    Without a logger, which numbers runs, it is ``trainer.default_root_dir`` itself.
    """
    logger = trainer.logger
    folder = runs_folder(logger, trainer.default_root_dir)
    if logger is not None:
        version = logger.version
        folder /= version if isinstance(version, str) else f"version_{version}"
    folder = Path(trainer.strategy.broadcast(str(folder)))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
