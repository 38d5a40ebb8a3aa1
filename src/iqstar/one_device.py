"""What the commands share that score responses under frozen models and train nothing."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from iqstar.data import PromptDataModule
from iqstar.errors import InputError
from iqstar.loading import load_reference
from iqstar.module import InverseQStar
from iqstar.policy import Policy
from iqstar.training_cli import IQStarCLI, add_options_of_a_run, refuse_checkpoint


class OneDeviceCLI(IQStarCLI):
    """Reads what ``iqstar fit`` reads; its trainer has one device and leaves no run behind."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what a run's own ``config.yaml`` holds besides."""
        super().add_arguments_to_parser(parser)
        add_options_of_a_run(parser)

    def _parse_ckpt_path(self) -> None:
        """There is none: credit is that of the model before training."""
        reason = "this command asks the model before training (model.policy.model)"
        refuse_checkpoint(self.config.get("ckpt_path"), reason)

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        for key, value in {"devices": 1, "num_nodes": 1, "strategy": "auto"}.items():
            config[key] = value
        config["logger"] = config["enable_checkpointing"] = False
        return super()._instantiate_trainer(config, callbacks)

    def read_data(self, stage: str) -> PromptDataModule:
        """The data module with its prompts read and split, as a trainer would have it.

        Args:
            stage: ``fit`` or ``validate``.

        Raises:
            InputError: If the data cannot be read, or no prompt is left for the stage.
        """
        data: PromptDataModule = self.datamodule
        self.trainer.strategy.connect(self.model)  # data modules ask it for the length of prompts
        data.trainer = self.trainer
        data.prepare_data()
        data.setup(stage)
        return data


def inverse_q_star(cli: OneDeviceCLI, command: str) -> InverseQStar:
    """The run's module.

    Raises:
        InputError: If its method has no estimator, and so no credit.
    """
    if not isinstance(cli.model, InverseQStar):
        raise InputError(
            f"model: {type(cli.model).__name__} has no estimator, and iqstar {command} scores "
            "with one; leave class_path out, or set it to iqstar.InverseQStar"
        )
    return cli.model


def frozen_models(trainer: Trainer, module: InverseQStar) -> Policy:
    """Loads the reference and the estimator of a run onto the trainer's device.

    Args:
        trainer: Of one device; for its precision and its device.
        module: The run's; its estimator is set up.

    Returns:
        The policy before training.
    """
    precision, plugin = str(trainer.precision), trainer.precision_plugin
    with plugin.module_init_context():
        policy = load_reference(module.spec, module.chat, precision)
        module.estimator.setup(module.spec, module.chat, precision)
    for part in (policy.actor, module.estimator):
        plugin.convert_module(part).to(trainer.strategy.root_device)
    return policy
