"""``iqstar fit | validate | test | predict``: a LightningCLI with defaults and readable errors."""

from __future__ import annotations

import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning import Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from iqstar.alignment import AlignmentModule
from iqstar.callbacks import KLLimit, PredictionWriter, SampleTable
from iqstar.chatter import less_chatter
from iqstar.checkpoint_callback import RunCheckpoint
from iqstar.checkpoints import (
    AtomicCheckpointIO,
    check_complete,
    checkpoint_at,
    is_path,
    newest_checkpoint,
    recipe_of,
)
from iqstar.data import PromptDataModule
from iqstar.defaults import as_settings, default_model, default_trainer
from iqstar.errors import InputError
from iqstar.export_callback import Export
from iqstar.foreign_errors import explained
from iqstar.precision import check_precision, default_precision
from iqstar.preemption import Preemption
from iqstar.progress import ProgressBar, WeightsLine
from iqstar.resume import check_same_run
from iqstar.run_folder import runs_folder
from iqstar.settings import CONFIG_FLAGS, Explainer, Setting, read_settings
from iqstar.settings_file import SettingsFile
from iqstar.slurm import check_tasks, slurm_environment
from iqstar.strategies import NAMES as SHARDED
from iqstar.strategies import ShardedStrategy
from iqstar.summary import RunSummary

ROOTS = {
    "model": AlignmentModule,
    "data": PromptDataModule,
    "trainer": Trainer,
    "checkpoint": RunCheckpoint,
    "export": Export,
    "summary": RunSummary,
    "kl": KLLimit,
    "samples": SampleTable,
    "predictions": PredictionWriter,
}
"""Top-level keys of a config, and the classes that take what is below them."""
OF_A_RUN = ("ckpt_path", "weights_only")
"""Options of Lightning's sub-commands, which the ``config.yaml`` of a run holds too."""
CLI_OPTIONS: dict[str, Any] = {
    "model_class": AlignmentModule,
    "datamodule_class": PromptDataModule,
    "trainer_class": Trainer,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
    "auto_configure_optimizers": False,
    "load_from_checkpoint_support": False,
    "save_config_callback": SettingsFile,
    "trainer_defaults": {
        "max_steps": 100,
        "num_sanity_val_steps": -1,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "enable_model_summary": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "runs", "name": "iqstar"},
        },
    },
}
"""How every command that reads a run's settings sets Lightning's CLI up."""


def run_training(command: str, arguments: list[str]) -> None:
    """Runs one of Lightning's sub-commands.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: What follows it on the command line.

    Raises:
        InputError: For bad input of any kind.
    """
    settings = given_settings(command, arguments)

    class OneCommandCLI(IQStarCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: LightningCLI.subcommands()[command]}

    with readable_errors(settings), less_chatter():
        OneCommandCLI(
            args=[command, *arguments],
            parser_kwargs={
                "exit_on_error": False,
                command: {"description": "", "usage": SUPPRESS},  # iqstar.cli wrote them
            },
            **CLI_OPTIONS,
        )


def given_settings(command: str, arguments: list[str]) -> list[Setting]:
    """What the user set, on the command line and in its configs.

    Raises:
        InputError: If there is no config, or one cannot be read.
    """
    settings = read_settings(arguments)
    names = {a.partition("=")[0] for a in arguments}
    wants_help = any(n == "-h" or n.endswith("help") for n in names)
    if not (names & {*CONFIG_FLAGS, "--model"} or wants_help):
        raise InputError(
            f"iqstar {command} needs --config FILE, for example: "
            f"iqstar {command} --config configs/quickstart.yaml"
        )
    return settings


def asked_for_validation(config: Mapping[str, Any]) -> bool:
    """Whether the trainer's settings name an interval of validation; epochs are one."""
    return (
        config.get("val_check_interval") is not None
        or config["check_val_every_n_epoch"] != 1
        or config.get("max_epochs") not in (None, -1)
    )


def add_options_of_a_run(parser: LightningArgumentParser) -> None:
    """Lets a command that trains nothing take the ``config.yaml`` of a run as it is."""
    for name, kind in zip(OF_A_RUN, (str, bool), strict=True):
        parser.add_argument(f"--{name}", type=kind | None, default=None, help=SUPPRESS)


def refuse_checkpoint(path: str | None, reason: str) -> None:
    """For commands that know no checkpoint.

    Args:
        path: What was given.
        reason: Why there is none.

    Raises:
        InputError: If there is one.
    """
    if path is not None:
        raise InputError(f"ckpt_path: {path} was given, but {reason}; set it to null")


class IQStarCLI(LightningCLI):
    """Lightning's CLI with this project's defaults.

    Whatever stands later on the command line wins, a config or a value.
    The settings in a checkpoint are a record, and never applied.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments: list[str] = options.get("args") or sys.argv[1:]
        super().__init__(*arguments, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run, and one seed for all."""
        for key, cls in ROOTS.items():
            if issubclass(cls, Callback):
                parser.add_lightning_class_args(cls, key)
        settings = read_settings(self.arguments)
        printing = any(argument.startswith("--print_config") for argument in self.arguments)
        parser.set_defaults(
            {
                "checkpoint.save_last": "link",
                "checkpoint.auto_insert_metric_name": False,
                "model": default_model(settings),
                **default_trainer(settings, printing),
            }
        )
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Checks that the checkpoint is one; its own settings are left alone."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if is_path(path):
            check_complete(checkpoint_at(path))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Finds the checkpoint that ``last`` means."""
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        path = arguments.get("ckpt_path")
        if path == "last":
            arguments["ckpt_path"] = self._last_checkpoint(subcommand)
        elif is_path(path):
            arguments["ckpt_path"] = checkpoint_at(path)
        if (found := arguments.get("ckpt_path")) is not None:
            self.model.goes_on_from = str(found)
        return arguments

    def _last_checkpoint(self, subcommand: str) -> Path | None:
        """The newest complete checkpoint of all runs in the logger's folder.

        None if there is none, so that one command line can start a run and go on with it.
        """
        folder = runs_folder(self.trainer.logger, self.trainer.default_root_dir)
        found = newest_checkpoint(folder)
        if found is None and subcommand != "fit":
            raise InputError(f"--ckpt_path last: there is no complete checkpoint below {folder}")
        if found is None:
            rank_zero_info("No checkpoint yet below %s: starting from the beginning", folder)
        else:
            if subcommand == "fit":
                check_same_run(found, recipe_of(found), self.model.recipe)
            rank_zero_info("Going on from %s", found)
        return found

    def after_fit(self) -> None:
        """Finishes a run that was stopped between its last step and its end.

        Lightning has nothing left to train then, and does nothing at all.
        """
        trainer, module = self.trainer, self.model
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ends = [c for c in callbacks if isinstance(c, Export | RunSummary)]
        done = all(c.finished for c in ends if isinstance(c, RunSummary))
        epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        ended = 0 < trainer.max_steps <= trainer.global_step
        if done or not (ended or 0 < (trainer.max_epochs or 0) <= epochs):
            return
        if all(e.step != trainer.global_step for e in module.evaluations):
            trainer.validate(module, datamodule=self.datamodule, verbose=False)
        for callback in ends:
            callback.on_train_end(trainer, module)

    def instantiate_classes(self) -> None:
        """Builds everything, and hands the module its settings as a record for checkpoints."""
        super().instantiate_classes()
        config = self.config.get(str(self.subcommand), self.config)
        self.model.recipe = self._parser(self.subcommand).dump(config, skip_validation=True)
        self.model.command = shlex.join(["iqstar", *self.arguments])

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Fills in what depends on the machine and on other settings."""
        if config["accelerator"] == "auto" and not torch.cuda.is_available():
            config["accelerator"] = "cpu"  # Apple's GPUs have no float64, which sampling needs
        config["precision"] = config.get("precision") or default_precision(config["accelerator"])
        if config["strategy"] in SHARDED:
            config["strategy"] = ShardedStrategy()
        if isinstance(config["strategy"], ShardedStrategy):
            config["inference_mode"] = False  # its tensors cannot be trained on later
        plugins = config["plugins"] or []
        own = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in own):
            own = [*own, AtomicCheckpointIO()]
        config["plugins"] = [*own, *slurm_environment(own)]
        check_precision(str(config["precision"]))
        if config["max_steps"] > 0 and not asked_for_validation(config):
            # Before and after only: an evaluation costs as much as several steps.
            config |= {"check_val_every_n_epoch": None, "val_check_interval": sys.maxsize}
        callbacks = [*callbacks, WeightsLine(), Preemption()]
        theirs = config["callbacks"] or []
        every = [*callbacks, *(theirs if isinstance(theirs, list) else [theirs])]
        if config.get("enable_progress_bar") is not False and not any(
            isinstance(callback, AnyProgressBar) for callback in every
        ):
            callbacks = [*callbacks, ProgressBar()]
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except ValueError as error:  # an unknown strategy, precision, …
            raise InputError(f"trainer: {error}; see iqstar fit --help") from error
        check_tasks(trainer)
        if isinstance(trainer.strategy, DDPStrategy):  # gradients are the buckets, no copy of them
            trainer.strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
        return trainer


@contextmanager
def readable_errors(
    settings: list[Setting],
    options: tuple[str, ...] = (),
    classes: Mapping[str, type] = MappingProxyType({}),
) -> Iterator[None]:
    """Whatever is the user's to mend becomes an InputError; what is ours keeps its traceback.

    Args:
        settings: What the user set, to point at.
        options: Further top-level keys of the command.
        classes: Those of them that take a class, with its base.
    """
    try:
        yield
    except InputError:
        raise
    except ArgumentError as error:
        keys = [*dict.fromkeys((*ROOTS, "seed_everything", "config", *OF_A_RUN, *options))]
        every = [*as_settings(default_model(settings)), *settings]
        raise Explainer(every, {**ROOTS, **classes}, keys).explain(error.message) from error
    except Exception as error:
        if inner := explained(error):
            raise inner from error
        raise
