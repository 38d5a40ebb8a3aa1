"""``iqstar fit | validate | test | predict``: a LightningCLI with defaults and readable errors."""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import iqstar.credit
import iqstar.estimators
import iqstar.judges
import iqstar.losses
import iqstar.optim
import iqstar.rollouts
from iqstar.callbacks import PredictionWriter, RunSummary, SampleTable
from iqstar.data import PromptDataModule
from iqstar.errors import InputError
from iqstar.module import InverseQStar

CLASSES = (iqstar.estimators, iqstar.losses, iqstar.rollouts, iqstar.judges, iqstar.credit)
"""Modules whose classes a config may name."""


def run_training(command: str, arguments: list[str]) -> None:
    """Runs one of Lightning's sub-commands.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: What follows it on the command line.

    Raises:
        InputError: For bad input of any kind.
    """
    _check_arguments(command, arguments)
    try:
        IQStarCLI(
            InverseQStar,
            PromptDataModule,
            trainer_class=Trainer,
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "max_steps": 100,
                "num_sanity_val_steps": -1,
                "log_every_n_steps": 1,
                "gradient_clip_val": 1.0,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "name": "iqstar"},
                },
            },
            args=[command, *arguments],
        )
    except MisconfigurationException as error:
        raise InputError(f"trainer: {error}") from error


def default_precision() -> str:
    """``bf16-mixed`` where the processor multiplies bfloat16 fast, ``32-true`` elsewhere."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bf16-mixed" if fast is not None and fast() else "32-true"


class Parser(LightningArgumentParser):
    """A parser whose errors are one line with the nearest right thing."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises what jsonargparse found wrong as an :class:`InputError`."""
        raise explain(message) from ex


class IQStarCLI(LightningCLI):
    """Lightning's CLI with this project's defaults.

    A value on the command line wins over one in a config, and a later config over an earlier one.
    Checkpoints hold weights and state only, no settings.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run, and one seed for all."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
                "model": {"class_path": "iqstar.InverseQStar"},
            }
        )
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Leaves a checkpoint's own settings alone: command line > config."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Fills in what depends on the machine and on other settings."""
        config["precision"] = config.get("precision") or default_precision()
        if config.get("enable_progress_bar") is not False:
            callbacks = [*callbacks, RichProgressBar()]
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)


def _check_arguments(command: str, arguments: list[str]) -> None:
    """Missing and unreadable configs, before a parser is built."""
    asked = [a for a in arguments if a.split("=")[0] in ("--config", "-c")]
    wants_help = any(a in ("-h", "--help") or ".help" in a for a in arguments)
    if not asked and not wants_help and not any(a.startswith("--model") for a in arguments):
        raise InputError(
            f"iqstar {command} needs --config FILE, for example: "
            f"iqstar {command} --config configs/quickstart.yaml"
        )
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config", "-c"):
            file = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
            if not file or file.startswith("-"):
                raise InputError(f"{name}: no file is given; write {name} FILE")
            if not Path(file).is_file():
                raise InputError(f"{name}: {file} does not exist or is not a file")


def explain(message: str) -> InputError:
    """Shortens a parser's message to what is wrong, and adds the nearest right thing."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split())
    if match := re.search(r"Unexpected (?:key|keys?)?:? ?['\"]?([\w.]+)", text):
        return InputError(_nearest_key(match[1], text))
    if match := re.search(r"[Kk]ey ['\"]([\w.]+)['\"] is not expected", text):
        return InputError(_nearest_key(match[1], text))
    if match := re.search(r"Unrecognized arguments?:? (\S+)", text):
        return InputError(_nearest_key(match[1].lstrip("-").partition("=")[0], text))
    return InputError(text)


def _nearest_key(key: str, text: str) -> str:
    del text
    known = known_keys()
    name = key.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "see iqstar fit --help"
    return f"unknown key {key}; {hint}"


def known_keys() -> list[str]:
    """Names of all settings of all classes a config may use."""
    classes: list[Any] = [InverseQStar, Trainer, ModelCheckpoint, RunSummary, PromptDataModule]
    for module in CLASSES:
        classes += [c for c in vars(module).values() if inspect.isclass(c)]
    classes += [iqstar.policy.PolicySpec, iqstar.policy.LoRASpec]
    return sorted({name for cls in classes for name in inspect.signature(cls).parameters})
