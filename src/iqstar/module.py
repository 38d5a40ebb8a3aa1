"""Inverse-Q* as a LightningModule: roll out, score, estimate, credit, loss, log.

Orchestration only; the mathematics is in ``estimators``, ``losses`` and ``logprobs``. Rollouts,
micro-batches and evaluation are those of every method: :class:`iqstar.alignment.AlignmentModule`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from iqstar.accumulation import by_length
from iqstar.alignment import AlignmentModule
from iqstar.assignment import MicroBatch, assign_credit
from iqstar.credit import CreditTransform
from iqstar.curves import OF_ALL, TRAIN_MEANS, token_metrics
from iqstar.errors import InputError
from iqstar.estimators import OptimalPolicyEstimator
from iqstar.estimators.principle import ToldEstimator
from iqstar.head import head_loss
from iqstar.losses import DistributionImitationLoss, Target, TokenLoss
from iqstar.mdp import Rollout
from iqstar.policy import CausalLM, Policy, PolicySpec
from iqstar.refresh import Refresh


class InverseQStar(AlignmentModule):
    """Aligns a causal language model by imitating token credit A* = β log(π̂*/π_ref).

    Args:
        policy: Which model is trained, and how it is loaded.
        estimator: Estimates the optimal policy π̂*.
        loss: What makes the policy imitate it; null for DistributionImitationLoss with reverse KL.
        transforms: Credit transforms between estimator and loss, applied in order.
        refresh: Lets the reference or the estimator's model follow the policy; null keeps both.
        beta: Unit of credit, in reward per nat. It moves no fixed point and no gradient; the
            strength of the alignment is the estimator's.
        shared: Those of every method (:class:`iqstar.alignment.AlignmentModule`).
    """

    def __init__(
        self,
        policy: PolicySpec,
        estimator: OptimalPolicyEstimator,
        loss: TokenLoss | None = None,
        transforms: list[CreditTransform] | None = None,
        refresh: Refresh | None = None,
        beta: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(policy, **shared)
        if not (math.isfinite(beta) and beta > 0):
            raise InputError(f"model.beta: must be a positive number, got {beta}")
        self.estimator = estimator
        self.loss = loss or DistributionImitationLoss()
        self.transforms = list(transforms or [])
        self.refresh = refresh
        self.beta = beta
        self.beta_power = self.loss.beta_power
        self._check_combination()
        self._moving: list[CausalLM] = []
        self._refreshed = 0

    def _check_combination(self) -> None:
        for transform in self.transforms:
            if self.loss.needs_distribution and not transform.keeps_distribution:
                raise InputError(
                    f"model.transforms: {type(transform).__name__} changes credit at the sampled "
                    f"token only, which leaves no distribution for {type(self.loss).__name__}; "
                    "use RewardImitationLoss, or TokenPolicyGradientLoss without state_baseline"
                )
        if self.refresh is not None and self.rollout.credits_known:
            raise InputError(
                f"model.refresh: the credits of a {type(self.rollout).__name__} were computed "
                "before, so no model of theirs can follow the policy; set it to null, or use "
                "DatasetRollout"
            )
        if self.loss.needs_behaviour and not self.rollout.on_policy:
            raise InputError(
                f"model.loss: {type(self.loss).__name__} needs responses that the policy sampled "
                f"itself, but model.rollout ({type(self.rollout).__name__}) has others; use "
                "GenerateRollout with source: policy, or an imitation loss"
            )

    @property
    def frozen_parts(self) -> nn.Module:
        """The estimator, and the models that it holds."""
        return self.estimator

    def prepare(self, precision: str) -> None:
        """Loads what the estimator and the rollout engine need."""
        assert self.policy is not None
        self.estimator.setup(self.spec, self.chat, precision)
        self.rollout.setup(self.policy, self.estimator, self.loss, self.temperature, precision)
        if self.refresh is not None:
            self.refresh.check(self.spec.dtype, precision)
            self._moving = moving_models(self.policy, self.estimator, self.refresh)

    # -- frozen models that follow the policy -------------------------------------------------

    def frozen_precision(self, precision: str) -> str:
        """Full, where small renewals would be lost in fewer digits; no product changes by it."""
        return precision if self.refresh is None else "32-true"

    def saved_parts(self) -> Sequence[nn.Module]:
        """The models that follow the policy."""
        return self._moving

    def on_train_start(self) -> None:
        """Counts anew in another fit of this module."""
        self._refreshed = min(self._refreshed, self.global_step)
        super().on_train_start()

    def before_rollout(self) -> None:
        """Renews the models that follow the policy, where that is due."""
        if self.refresh is None or self.global_step - self._refreshed < self.refresh.every:
            return
        for model in self._moving:
            self.refresh.apply(model, self.actor)
        self._refreshed = self.global_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds when the models that follow the policy were renewed."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["iqstar"]["refreshed"] = self._refreshed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it up again."""
        super().on_load_checkpoint(checkpoint)
        self._refreshed = checkpoint.get("iqstar", {}).get("refreshed", 0)

    # -- the method --------------------------------------------------------------------------

    def assign(self, rollout: Rollout, seed: int, resuming: bool = False) -> list[MicroBatch]:
        """Scores a rollout, estimates π̂* and assigns credit: all before the first update.

        Where padding is read, micro-batches of an optimiser step are formed by length.
        """
        size = self.micro_batch_size
        if size and not (resuming or self.actor.padding_free):
            rollout = by_length(
                rollout,
                self.count_prompt_tokens,
                size,
                self.trainer.accumulate_grad_batches,
                self.trainer.num_training_batches,
            )
        return self._assigned(rollout, seed, self.transforms, resuming)

    def assign_unchanged(self, rollout: Rollout, seed: int) -> list[MicroBatch]:
        """Credit as the estimator has it; see :meth:`AlignmentModule.assign_unchanged`."""
        return self._assigned(rollout, seed, ())

    def _assigned(
        self,
        rollout: Rollout,
        seed: int,
        transforms: Sequence[CreditTransform],
        resuming: bool = False,
    ) -> list[MicroBatch]:
        assert self.policy is not None
        return assign_credit(
            self.policy,
            rollout,
            self.estimator,
            transforms,
            temperature=self.temperature,
            micro_batch_size=self.micro_batch_size or len(rollout),
            needs_behaviour=self.loss.needs_behaviour and not resuming,
            seed=seed,
            known=self.rollout.known_credits(rollout),
        )

    def losses(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss against the credit; see :meth:`AlignmentModule.losses`."""
        hidden = self.actor.hidden(micro.sequences)  # log π_θ follows from it, chunk by chunk

        def per_token(
            logits: Tensor, index: Tensor, target: Target
        ) -> tuple[Tensor, dict[str, Tensor]]:
            tokens = micro.tokens[index]
            losses, metrics = self.loss.per_token(logits, tokens, target)
            if taken := metrics.keys() & {*TRAIN_MEANS, *OF_ALL}:
                raise InputError(
                    f"model.loss: {type(self.loss).__name__} measures {', '.join(sorted(taken))}, "
                    "but curves of every loss are called so; give it another name"
                )
            curves = token_metrics(logits.detach(), tokens, self.beta)
            return losses * tokens.weight, {**metrics, **curves}

        target = micro.target.logprobs if self.loss.needs_distribution else None
        return head_loss(hidden, self.actor.head(self.temperature), per_token, target)


def moving_models(
    policy: Policy, estimator: OptimalPolicyEstimator, refresh: Refresh
) -> list[CausalLM]:
    """The frozen models that follow the policy; where only one role does, it gets its own copy.

    Raises:
        InputError: If the policy has no frozen copy, or no part of the estimator asks one.
    """
    if policy.frozen is None:
        raise InputError(
            "model.refresh: with adapters the reference is the policy without them, which cannot "
            "follow it; train all weights (model.policy.lora: null)"
        )
    if refresh.of == "both":
        return [policy.frozen]
    told = [m for m in estimator.modules() if isinstance(m, ToldEstimator) and m.model is None]
    if not told:
        raise InputError(
            f"model.refresh.init_args.of: {refresh.of} tells the estimator's model from the "
            f"reference, but {type(estimator).__name__} asks no such model; use both"
        )
    copied = copy.deepcopy(policy.frozen)
    for part in told:
        part.model = copied
    return [policy.frozen if refresh.of == "reference" else copied]
