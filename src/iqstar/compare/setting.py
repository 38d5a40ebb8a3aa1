"""What the runs of a comparison share, built from its common settings: data, policy, judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer

from iqstar.chatter import less_chatter
from iqstar.compare.plan import merged
from iqstar.data import PromptDataModule
from iqstar.errors import InputError
from iqstar.mdp import Prompt
from iqstar.module import InverseQStar
from iqstar.one_device import OneDeviceCLI
from iqstar.settings import read_settings
from iqstar.training_cli import CLI_OPTIONS, IQStarCLI, readable_errors

NO_ESTIMATOR = {
    "model": {
        "class_path": "iqstar.InverseQStar",
        "init_args": {"estimator": {"class_path": "iqstar.estimators.NullEstimator"}},
    }
}
"""Makes the common settings those of a whole run."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the runs share.

    Args:
        module: Holds the policy's specification, the rollout engine and the judge; no weights yet.
        data: Its prompts are read and split.
        trainer: Of one device, for its precision.
    """

    module: InverseQStar
    data: PromptDataModule
    trainer: Trainer

    def prompts(self, number: int) -> list[Prompt]:
        """The first prompts that a run trains on, in its order."""
        found: list[Prompt] = []
        loader = self.data.train_dataloader()
        while len(found) < number:
            for batch in loader:
                found += batch.prompts if batch.step == 0 else ()
        return found[:number]


def check(settings: Mapping[str, Any], file: Path) -> None:
    """Parses a run's settings and builds its parts, without weights or data.

    Args:
        settings: Those of ``iqstar fit``.
        file: Where they may be written, for the parser to read.

    Raises:
        InputError: If they are wrong, or no judge says what is better.
    """
    file.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
    _read(file)


def _read(file: Path) -> _CommonCLI:
    arguments = ["--config", str(file)]
    with readable_errors(read_settings(arguments)), less_chatter():
        cli = _CommonCLI(
            args=arguments, run=False, parser_kwargs={"exit_on_error": False}, **CLI_OPTIONS
        )
    judge = cli.model.judge
    if judge is None:
        raise InputError("common.model.init_args.judge: methods are compared by it; set one")
    if not judge.higher_is_better:
        raise InputError(
            f"common.model.init_args.judge: a higher score of {type(judge).__name__} is not "
            "better, but methods are compared by it; choose another judge"
        )
    return cli


class _CommonCLI(OneDeviceCLI):
    """Reads what the runs share; draws what they draw at the start."""

    _set_seed = IQStarCLI._set_seed


def build(common: Mapping[str, Any], seed: int, file: Path) -> Setting:
    """Builds what the common settings describe.

    Args:
        common: Settings of ``iqstar fit`` without an estimator.
        seed: Of the run.
        file: Where the settings may be written, for the parser to read.

    Raises:
        InputError: If they are wrong, no judge says what is better, or the data cannot be read.
    """
    settings = merged(merged(NO_ESTIMATOR, common), {"seed_everything": seed})
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    cli = _read(file)
    with less_chatter():
        data = cli.read_data("fit")
    return Setting(module=cli.model, data=data, trainer=cli.trainer)
