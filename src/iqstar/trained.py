"""A module whose policy is loaded, trained by an optimiser and kept in checkpoints."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from iqstar.attention import warn_off_cpus
from iqstar.chat import ChatFormat
from iqstar.errors import InputError
from iqstar.evaluated import EvaluatedModule
from iqstar.judges import Judge
from iqstar.loading import load_policy
from iqstar.optim import (
    OptimizerFactory,
    Schedule,
    WarmupCosine,
    default_optimizer,
    group_settings,
    parameter_groups,
    retune,
)
from iqstar.policy import PolicySpec
from iqstar.ranks import gather
from iqstar.resume import (
    check_same_checkpoint,
    check_same_frozen,
    count_batches_as_the_loader,
    frozen_fingerprints,
    make_up_evaluation,
    owes_evaluation,
    random_state,
    set_random_state,
    warn_inside_window,
)
from iqstar.rollouts import RolloutEngine
from iqstar.room import prompt_room
from iqstar.sharding import whole


class TrainedModule(EvaluatedModule, ABC):
    """Holds the policy and its reference, and whatever else a method trains or freezes.

    Args:
        policy: Which model is trained, and how it is loaded.
        rollout: Where responses come from.
        optimizer: The optimiser, as class path and arguments; AdamW with lr 2e-5 by default.
        schedule: Of the learning rate; null for warm-up and cosine.
        judge: Scores held-out responses; it measures, it does not train.
        eval_samples: Responses to each held-out prompt in validation.
        seed: Of the rollouts and evaluations.

    Attributes:
        recipe: The run's config, for its model card.
        command: The command line that started it.
        goes_on_from: The checkpoint that this process found for ``--ckpt_path last``, or is given.
    """

    def __init__(
        self,
        policy: PolicySpec,
        rollout: RolloutEngine,
        optimizer: OptimizerFactory = default_optimizer,
        schedule: Schedule | None = None,
        judge: Judge | None = None,
        eval_samples: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(rollout, judge, eval_samples, seed)
        self.spec = policy
        self.optimizer = optimizer
        self.schedule = schedule or WarmupCosine()
        self.strict_loading = False  # frozen weights are not in checkpoints
        self.recipe: str | None = None
        self.command: str | None = None
        self.goes_on_from: str | None = None
        self._owes_evaluation = False
        self._resumed: dict[str, Any] | None = None
        self._given: list[dict[str, Any]] = []
        self._loaded = False
        self._grad_norm = torch.zeros(())

    # -- what a method says ------------------------------------------------------------------

    @property
    def frozen_parts(self) -> nn.Module:
        """Frozen models beside the reference."""
        return nn.Module()

    def trained_parts(self) -> Sequence[nn.Module]:
        """The modules whose weights are trained."""
        return (self.actor,)

    def saved_parts(self) -> Sequence[nn.Module]:
        """Frozen modules that a run changes, so that checkpoints must hold them too."""
        return ()

    def frozen_precision(self, precision: str) -> str:
        """In which the reference is held; see :func:`iqstar.loading.load_policy`."""
        return precision

    def prepare(self, precision: str) -> None:
        """Loads what the method needs beside the policy; called once.

        Args:
            precision: The trainer's.
        """

    def unfinished(self) -> dict[str, Any] | None:
        """What this rank needs to go on inside the rollout it trains on; None between rollouts."""
        return None

    def go_on_from(self, unfinished: dict[str, Any] | None) -> None:
        """Takes up what :meth:`unfinished` gave when the checkpoint was made.

        Args:
            unfinished: Of this rank.
        """

    # -- set-up ------------------------------------------------------------------------------

    @cached_property
    def chat(self) -> ChatFormat:
        """The policy's tokenizer and chat format; reads no weights."""
        return self.spec.chat()

    def prompt_room(self) -> int | None:
        """Tokens that a prompt may have (:mod:`iqstar.room`); the data module asks for it."""
        estimator = getattr(self, "estimator", None)
        return prompt_room(self.spec, self.chat, self.rollout.max_new_tokens, estimator)

    def configure_model(self) -> None:
        """Loads the models; called by the trainer on every rank, and again without effect."""
        if self.policy is not None:
            return
        check_same_checkpoint(self.goes_on_from)
        warn_off_cpus(self.spec.attn_implementation, self.trainer.strategy.root_device)
        precision = str(self.trainer.precision)
        needed = self.rollout.needs_reference(self.trainer)
        with torch.device("cpu"):  # not Lightning's device: it moves all of this module at once
            held = self.frozen_precision(precision)
            self.policy = load_policy(self.spec, self.chat, held, reference=needed)
            self.actor, self.frozen = self.policy.actor, self.policy.frozen
            self.prepare(precision)

    def trained_weights(self) -> Iterator[nn.Parameter]:
        """The weights that are trained."""
        for part in self.trained_parts():
            yield from (p for p in part.parameters() if p.requires_grad)

    def configure_optimizers(self) -> Any:
        """The optimiser over the trained weights, and its schedule."""
        optimizer = self.optimizer(parameter_groups(nn.ModuleList(self.trained_parts())))
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise InputError("trainer.max_steps: the schedule needs the number of steps; set it")
        self._given = group_settings(optimizer)
        scheduler = self.schedule.build(optimizer, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def train(self, mode: bool = True) -> TrainedModule:
        """Switches the policy; frozen models stay in evaluation mode."""
        super().train(mode)
        for frozen in (getattr(self, "frozen", None), self.frozen_parts):
            if frozen is not None:
                frozen.train(False)
        return self

    # -- steps -------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Goes on where a resumed run stopped: its rollout, random state, an evaluation it owes.

        The optimiser's rate and other numbers are those of this run's settings.
        """
        count_batches_as_the_loader(self.trainer)
        if self._loaded:
            self._loaded = False
            self._keep_to_settings()
        if self._resumed is not None:
            set_random_state(self._resumed["random"])
            self.go_on_from(self._resumed["rollout"])
            self._resumed = None
        if self._owes_evaluation:  # last, since checkpoints are made in it and at its end
            self._owes_evaluation = False
            make_up_evaluation(self.trainer)

    def _keep_to_settings(self) -> None:
        """What a command says is what runs: a checkpoint has a rate and the like of its own."""
        for optimizer, config in zip(
            self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True
        ):
            if self._given and isinstance(config.scheduler, LambdaLR):
                retune(optimizer, config.scheduler, self._given)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and frees the gradients: a rollout and a forward pass can use their memory.

        Lightning would keep them until the next backward pass.
        """
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()

    def gradient_norm(self) -> Tensor:
        """Over all trained weights and ranks, before clipping."""
        grads = [p.grad for p in self.trained_weights() if p.grad is not None]
        self._grad_norm = whole(torch.nn.utils.get_total_norm(grads))
        return self._grad_norm

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm that :meth:`gradient_norm` took; Lightning would take it again."""
        if gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(
                self.trained_weights(), float(gradient_clip_val), self._grad_norm
            )

    # -- checkpoints -------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained weights, and frozen ones that changed: others are loaded as they were."""
        changed = {id(p) for part in self.saved_parts() for p in part.parameters()}
        trained = {n for n, p in self.named_parameters() if p.requires_grad or id(p) in changed}
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what has been done and measured so far, and what each rank needs to go on."""
        warn_inside_window(self.trainer)
        checkpoint["iqstar"] = self.measured() | {
            "owes_evaluation": owes_evaluation(self.trainer, self.evaluations),
            "frozen": frozen_fingerprints(self.policy, self.frozen_parts),
            "precision": str(self.trainer.precision),
            "recipe": self.recipe,
            "command": self.command,
            "ranks": gather({"random": random_state(), "rollout": self.unfinished()}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is one of this model, and takes up its records."""
        weights = checkpoint.get("state_dict")  # sharded ones are loaded and checked elsewhere
        if weights is not None:
            self.check_weights(set(weights))
        if (saved := checkpoint.get("iqstar")) is None:
            return
        check_same_frozen(saved["frozen"], frozen_fingerprints(self.policy, self.frozen_parts))
        if saved["precision"] != str(self.trainer.precision):
            rank_zero_warn(
                f"The checkpoint was trained with trainer.precision={saved['precision']}, this run "
                f"has {self.trainer.precision}: it will not go on exactly as it would have"
            )
        self.take_up(saved)
        self._loaded = True
        self._owes_evaluation = saved.get("owes_evaluation", False)
        if len(saved["ranks"]) == self.trainer.world_size:
            self._resumed = saved["ranks"][self.global_rank]

    def check_weights(self, saved: set[str]) -> None:
        """Refuses a checkpoint with weights of another model, or of other parts of it.

        Args:
            saved: Their names.

        Raises:
            InputError: If some are missing, or would be lost.
        """
        own = set(self.state_dict())
        moved = {n for n, p in self.named_parameters() if n in own and not p.requires_grad}
        if missing := own - saved - moved:
            raise InputError(
                f"--ckpt_path: the checkpoint lacks {len(missing)} trained weights, {min(missing)} "
                "among them; it belongs to another model, another model.policy.lora or another "
                "method (model.class_path)"
            )
        for names, what in ((moved - saved, "lacks"), (saved - own, "has")):
            if names:
                raise InputError(
                    f"--ckpt_path: the checkpoint {what} weights of a model beside the policy that "
                    f"training changes, {min(names)} among them; give model.class_path, and "
                    "model.refresh or model.separate_value_model, as that run had them"
                )
