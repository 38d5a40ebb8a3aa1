"""The two sides of ``iqstar eval``: a policy and the reference that it is compared with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from lightning import Trainer

from iqstar.alignment import AlignmentModule
from iqstar.commands.export import load_weights, of_policy, read_trained
from iqstar.errors import InputError
from iqstar.estimators.principle import ToldEstimator
from iqstar.loading import load_frozen, load_policy, load_reference
from iqstar.paired_responses import Telling
from iqstar.policy import Policy
from iqstar.pretrained import quiet_transformers
from iqstar.resume import check_same_frozen

KEY = "--ckpt_path"


@dataclass(frozen=True, kw_only=True)
class PolicySource:
    """Where the policy's weights are from; the reference itself where neither is given.

    Args:
        checkpoint: Of a run.
        model: A folder, file or hub id of a whole model.
    """

    checkpoint: Path | None = None
    model: str | None = None

    @property
    def kind(self) -> str:
        """``checkpoint``, ``model`` or ``reference``."""
        named = "model" if self.model else "reference"
        return "checkpoint" if self.checkpoint else named

    @property
    def path(self) -> str | None:
        """What the user named."""
        return str(self.checkpoint) if self.checkpoint else self.model


def told_principle(module: AlignmentModule) -> Telling:
    """The principle of the run's estimator, and where it tells it.

    Args:
        module: The run's.

    Raises:
        InputError: If it tells none.
    """
    estimator = getattr(module, "estimator", None)
    if not isinstance(estimator, ToldEstimator):
        found = type(estimator or module).__name__
        raise InputError(
            f"--told: {found} tells no principle; set model.estimator to PrincipleEstimator or "
            "ContrastiveEstimator"
        )
    return Telling(principle=estimator.texts["principle"], placement=estimator.placement)


def load_sides(trainer: Trainer, module: AlignmentModule, source: PolicySource) -> Policy:
    """Loads policy and reference onto the trainer's device.

    Args:
        trainer: Of one device; for its precision and its device.
        module: The run's.
        source: Of the policy's weights.

    Returns:
        Both; without a source they are one model.

    Raises:
        InputError: If the checkpoint does not fit the run's settings, or the vocabularies of the
            two models differ.
    """
    precision, plugin = str(trainer.precision), trainer.precision_plugin
    spec = replace(module.spec, gradient_checkpointing=False)
    with plugin.module_init_context(), quiet_transformers(bars=False), warnings.catch_warnings():
        if source.checkpoint is not None:
            policy = load_policy(spec, module.chat, precision)
            _restore(policy, source.checkpoint)
        else:
            policy = load_reference(spec, module.chat, precision)
            if source.model is not None:
                actor = load_frozen(source.model, spec, module.chat, precision, "--policy")
                policy = replace(policy, actor=actor, spec=replace(spec, lora=None))
    for part in {policy.actor, policy.frozen or policy.actor}:
        plugin.convert_module(part).to(trainer.strategy.root_device)
        part.eval()
    return policy


def _restore(policy: Policy, path: Path) -> None:
    checkpoint = read_trained(path, KEY)
    saved = checkpoint["iqstar"].get("frozen", {}).get("reference")
    if saved is not None:
        check_same_frozen({"reference": saved}, {"reference": policy.actor.fingerprint})
    load_weights(policy.actor.model, of_policy(checkpoint["state_dict"]), str(path), KEY)
