"""Inverse-Q* as a LightningModule: roll out, score, estimate, credit, loss, log.

Orchestration only; the mathematics is in ``estimators``, ``losses`` and ``logprobs``. Read
:meth:`InverseQStar.collect` and :meth:`InverseQStar.training_step` for the method.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from iqstar.assignment import MicroBatch, assign_credit, credit_rows
from iqstar.chat import ChatFormat
from iqstar.credit import CreditTransform
from iqstar.curves import TRAIN_MEANS, micro_batch_sums, token_metrics, window_curves
from iqstar.errors import InputError, NonFiniteLossError
from iqstar.estimators import OptimalPolicyEstimator
from iqstar.evaluation import Evaluation, Sample, evaluation_metrics, sample_and_score
from iqstar.head import head_loss
from iqstar.judges import Judge
from iqstar.loading import load_policy
from iqstar.losses import DistributionImitationLoss, TokenLoss
from iqstar.mdp import Prompt, PromptBatch, Rollout
from iqstar.metrics import TokenMeans
from iqstar.optim import (
    OptimizerFactory,
    Schedule,
    WarmupCosine,
    default_optimizer,
    parameter_groups,
)
from iqstar.policy import Policy, PolicySpec
from iqstar.ranks import gather, global_sum
from iqstar.resume import (
    check_same_frozen,
    count_batches_as_the_loader,
    frozen_fingerprints,
    random_state,
    rollout_from,
    rollout_state,
    set_random_state,
    warn_inside_window,
    with_behaviour,
)
from iqstar.rollouts import GenerateRollout, RolloutEngine, rollout_seed
from iqstar.sharding import whole


@dataclass
class Progress:
    """What a run has done so far.

    Args:
        rollouts: Rollouts made by each rank.
        samples: Responses sampled by all ranks.
        clock: When the last optimiser step ended, for the throughput.
    """

    rollouts: int = 0
    samples: int = 0
    clock: float = field(default_factory=time.perf_counter)


class InverseQStar(LightningModule):
    """Aligns a causal language model by imitating token credit A* = β log(π̂*/π_ref).

    Args:
        policy: Which model is trained, and how it is loaded.
        estimator: Estimates the optimal policy π̂*.
        loss: What makes the policy imitate it; null for DistributionImitationLoss with reverse KL.
        rollout: Where responses come from; null for GenerateRollout.
        transforms: Credit transforms between estimator and loss, applied in order.
        optimizer: The optimiser, as class path and arguments; AdamW with lr 2e-5 by default.
        schedule: Of the learning rate; null for warm-up and cosine.
        judge: Scores held-out responses; it measures, it never trains.
        beta: Unit of credit, in reward per nat. It moves no fixed point and no gradient; the
            strength of the alignment is the estimator's.
        temperature: Of sampling and of all scoring in training. Evaluation is at 1.
        micro_batch_size: Responses per training step on each device; null takes the whole rollout
            of a batch of prompts at once. An optimiser step takes
            ``trainer.accumulate_grad_batches`` of them from every device.
        epochs_per_rollout: Passes over each rollout before the next one.
        mask_truncated: Leave responses that hit the length limit out of the loss.
        eval_samples: Responses to each held-out prompt in validation.
        seed: Of the rollouts; each rank and each rollout draws its own from it.
    """

    def __init__(
        self,
        policy: PolicySpec,
        estimator: OptimalPolicyEstimator,
        loss: TokenLoss | None = None,
        rollout: RolloutEngine | None = None,
        transforms: list[CreditTransform] | None = None,
        optimizer: OptimizerFactory = default_optimizer,
        schedule: Schedule | None = None,
        judge: Judge | None = None,
        beta: float = 1.0,
        temperature: float = 1.0,
        micro_batch_size: int | None = None,
        epochs_per_rollout: int = 1,
        mask_truncated: bool = False,
        eval_samples: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("beta", beta), ("temperature", temperature)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"model.{name}: must be a positive number, got {value}")
        for name, number in (
            ("micro_batch_size", 1 if micro_batch_size is None else micro_batch_size),
            ("epochs_per_rollout", epochs_per_rollout),
            ("eval_samples", eval_samples),
        ):
            if number < 1:
                raise InputError(f"model.{name}: must be at least 1, got {number}")
        self.spec = policy
        self.estimator = estimator
        self.loss = loss or DistributionImitationLoss()
        self.rollout = rollout or GenerateRollout()
        self.transforms = list(transforms or [])
        self.optimizer = optimizer
        self.schedule = schedule or WarmupCosine()
        self.judge = judge
        self.beta = beta
        self.temperature = temperature
        self.micro_batch_size = micro_batch_size
        self.epochs_per_rollout = epochs_per_rollout
        self.mask_truncated = mask_truncated
        self.eval_samples = eval_samples
        self.seed = seed
        self._check_combination()

        self.strict_loading = False  # frozen weights are not in checkpoints
        self.policy: Policy | None = None
        self.evaluations: list[Evaluation] = []
        self.progress = Progress()
        self.train_means = TokenMeans(TRAIN_MEANS)
        self.val_means = TokenMeans(("kl", "entropy"))
        self.recipe: str | None = None
        self.command: str | None = None
        self._buffer: list[MicroBatch] = []
        self._buffer_seed = 0
        self._batch: PromptBatch | None = None
        self._resumed: dict[str, Any] | None = None
        self._saved_rollout: dict[str, Any] | None = None
        self._window_weight = torch.zeros(())
        self._grad_norm = torch.zeros(())
        self._val_samples: list[Sample] = []

    def _check_combination(self) -> None:
        for transform in self.transforms:
            if self.loss.needs_distribution and not transform.keeps_distribution:
                raise InputError(
                    f"model.transforms: {type(transform).__name__} changes credit at the sampled "
                    f"token only, which leaves no distribution for {type(self.loss).__name__}; "
                    "use RewardImitationLoss or TokenPolicyGradientLoss"
                )
        if self.loss.needs_behaviour and not self.rollout.on_policy:
            raise InputError(
                f"model.loss: {type(self.loss).__name__} needs responses that the policy sampled "
                f"itself, but model.rollout ({type(self.rollout).__name__}) has others; use "
                "GenerateRollout with source: policy, or an imitation loss"
            )

    # -- set-up ------------------------------------------------------------------------------

    @cached_property
    def chat(self) -> ChatFormat:
        """The policy's tokenizer and chat format; reads no weights."""
        return self.spec.chat()

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        """Tokens of a rendered prompt; the data module asks for it."""
        return len(self.chat.prompt_ids(prompt.messages))

    def training_steps(self, prompts: int) -> int:
        """Training steps on the rollout of that many prompts; the data module asks for it."""
        rows = prompts * self.rollout.responses_per_prompt
        return math.ceil(rows / (self.micro_batch_size or rows)) * self.epochs_per_rollout

    def configure_model(self) -> None:
        """Loads the models; called by the trainer on every rank, and again without effect."""
        if self.policy is not None:
            return
        precision = str(self.trainer.precision)
        needed = self.rollout.needs_reference(self.trainer)
        self.policy = load_policy(self.spec, self.chat, precision, reference=needed)
        self.estimator.setup(self.chat, precision)
        self.rollout.setup(self.policy, self.estimator, self.loss, self.temperature, precision)
        self.actor, self.frozen = self.policy.actor, self.policy.frozen

    def configure_optimizers(self) -> Any:
        """The optimiser over the trained weights, and its schedule."""
        optimizer = self.optimizer(parameter_groups(self.actor))
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise InputError("trainer.max_steps: the schedule needs the number of steps; set it")
        scheduler = self.schedule.build(optimizer, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def train(self, mode: bool = True) -> InverseQStar:
        """Switches the policy; frozen models stay in evaluation mode."""
        super().train(mode)
        for frozen in (getattr(self, "frozen", None), self.estimator):
            if frozen is not None:
                frozen.train(False)
        return self

    # -- the method --------------------------------------------------------------------------

    def collect(self, prompts: tuple[Prompt, ...], seed: int) -> list[MicroBatch]:
        """Rolls out, scores, estimates and assigns credit: all before the first update.

        Args:
            prompts: What to respond to.
            seed: Of this rollout.
        """
        assert self.policy is not None
        rollout = self.rollout.roll_out(self.policy, prompts, self.temperature, seed)
        if self.mask_truncated:
            rollout = rollout.without_truncated()
        return self._assign(rollout, seed, self.loss.needs_behaviour)

    def _assign(self, rollout: Rollout, seed: int, needs_behaviour: bool) -> list[MicroBatch]:
        assert self.policy is not None
        return assign_credit(
            self.policy,
            rollout,
            self.estimator,
            self.transforms,
            temperature=self.temperature,
            micro_batch_size=self.micro_batch_size or len(rollout),
            needs_behaviour=needs_behaviour,
            seed=seed,
            known=self.rollout.known_credits(rollout),
        )

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Makes a rollout where one is due, and counts the tokens of the accumulation window."""
        resumed_inside = not self._buffer and batch.step > 0
        if batch.step == 0 or resumed_inside:
            with self.trainer.precision_plugin.forward_context():
                if resumed_inside and self._saved_rollout is not None:
                    self._restore_rollout(self._saved_rollout)
                else:
                    self._new_rollout(batch.prompts)
            self._saved_rollout = None
        self._batch = batch
        if batch.step >= len(self._buffer) * self.epochs_per_rollout:
            raise InputError(
                "data: the loader repeats a batch of prompts more often than its rollout has "
                "micro-batches; use an iqstar.data module, or set model.micro_batch_size to null"
            )
        accumulate = self.trainer.accumulate_grad_batches
        done = batch_idx % accumulate  # not 0 where a run is resumed inside a window
        if done == 0 or resumed_inside:
            window = range(batch.step, min(batch.step + accumulate - done, batch.steps))
            if len(window) + done < accumulate and not batch.last:
                raise InputError(
                    f"trainer.accumulate_grad_batches: an optimiser step takes {accumulate} "
                    f"micro-batches, but the rollout of {len(batch.prompts)} prompts has "
                    f"{batch.steps}, which is not a multiple; choose data.batch_size, "
                    "model.rollout.responses_per_prompt and model.micro_batch_size so that it is"
                )
            weight = sum(
                (self._micro_batch(step).tokens.weight.sum() for step in window),
                start=torch.zeros((), device=self.device),
            )
            self._window_weight = global_sum(weight)

    def _new_rollout(self, prompts: tuple[Prompt, ...]) -> None:
        self._buffer_seed = rollout_seed(self.seed, self.progress.rollouts, self.global_rank)
        self._buffer = self.collect(prompts, self._buffer_seed)
        self.progress.rollouts += 1
        rows = sum(len(m.rollout) for m in self._buffer)
        self.progress.samples += int(global_sum(torch.tensor(rows, device=self.device)))

    def _restore_rollout(self, state: dict[str, Any]) -> None:
        """The rollout that a checkpoint was made in; frozen models score it once more."""
        self._buffer_seed = state["seed"]
        rollout = rollout_from(state, self.chat.pad_id, self.device)
        parts = self._assign(rollout, self._buffer_seed, needs_behaviour=False)
        self._buffer = with_behaviour(parts, state["behaviour"])

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, so scaled that the window's gradient is that of a mean.

        Returns:
            Σ loss · world size · window / N: this undoes the divisions that Lightning
            (accumulation) and DDP or FSDP (ranks) apply, so that the optimiser sees
            Σ loss / N with N the weight of all response tokens of the window on all ranks.
        """
        micro = self._micro_batch(batch.step)
        hidden = self.actor.hidden(micro.sequences)  # log π_θ follows from it, chunk by chunk
        total, sums = head_loss(
            hidden, self.actor.head(self.temperature), lambda z, i: self._per_token(micro, z, i)
        )
        if not torch.isfinite(total):
            raise self._non_finite("loss")
        self.train_means.update(micro_batch_sums(micro, total, sums, self.beta))
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return total * (scale / self._window_weight.clamp(min=1e-12)).to(total)

    def _per_token(
        self, micro: MicroBatch, logits: Tensor, index: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss, and what the curves show, of a chunk of tokens."""
        tokens = micro.tokens[index]
        losses, metrics = self.loss.per_token(logits, tokens, lambda: micro.target.logprobs(index))
        metrics |= token_metrics(logits.detach(), tokens, self.beta)
        return losses * tokens.weight, metrics

    # -- what it shows -----------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the curves of the accumulation window; the gradient norm is that before clipping."""
        grads = [p.grad for p in self.actor.parameters() if p.grad is not None]
        norm = self._grad_norm = whole(torch.nn.utils.get_total_norm(grads))
        if not torch.isfinite(norm):
            raise self._non_finite("gradient norm")
        means = self.train_means.compute()
        tokens = float(global_sum(self.train_means.count("credit")))
        self.train_means.reset()
        now = time.perf_counter()
        curves = {
            **window_curves(means, self.loss.beta_power, self.beta),
            "grad_norm": norm,
            "samples": float(self.progress.samples),
            "tokens_per_second": tokens / max(now - self.progress.clock, 1e-9),
        }
        self.progress.clock = now
        self.log_dict({f"train/{k}": torch.as_tensor(v).float() for k, v in curves.items()})
        self.log("loss", means["loss"].float(), prog_bar=True, logger=False)
        self.log("kl", means["kl"].float(), prog_bar=True, logger=False)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm that was just logged; Lightning would take it once more."""
        if gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(
                self.actor.parameters(), float(gradient_clip_val), self._grad_norm
            )

    def on_train_start(self) -> None:
        """Starts the clock of the throughput curve; a resumed rank goes on where it stopped."""
        if self._resumed is not None:
            set_random_state(self._resumed["random"])
            self._saved_rollout, self._resumed = self._resumed["rollout"], None
        count_batches_as_the_loader(self.trainer)
        self.progress.clock = time.perf_counter()

    # -- evaluation --------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Samples responses to held-out prompts and measures them (see ``iqstar.evaluation``)."""
        assert self.policy is not None
        records, sums = sample_and_score(
            self.policy,
            batch.prompts,
            self.judge,
            like=self.rollout,
            samples=self.eval_samples,
            seed=rollout_seed(self.seed, batch_idx, self.global_rank),
        )
        self.val_means.update(sums)
        self._val_samples += records

    def on_validation_epoch_start(self) -> None:
        """Forgets the previous evaluation."""
        self.val_means.reset()
        self._val_samples = []

    def on_validation_epoch_end(self) -> None:
        """Gathers the evaluation over ranks, keeps and logs it; before training, as step 0."""
        samples = [sample for part in gather(self._val_samples) for sample in part]
        if not samples:
            return
        metrics = evaluation_metrics(samples, self.val_means.compute(), self.judge is not None)
        self.evaluations.append(
            Evaluation(step=self.global_step, metrics=metrics, samples=tuple(samples))
        )
        curves = {f"val/{name}": value for name, value in metrics.items()}
        if self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(curves, step=self.global_step)
        else:
            self.log_dict(curves, sync_dist=False, rank_zero_only=False)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """The same measurement as validation."""
        self.validation_step(batch, batch_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Responses with the credit of each token (:func:`iqstar.assignment.credit_rows`)."""
        assert self.policy is not None
        seed = rollout_seed(self.seed, batch_idx, self.global_rank)
        return [
            row
            for micro in self.collect(batch.prompts, seed)
            for row in credit_rows(self.policy, micro, self.beta, self.temperature)
        ]

    # -- checkpoints -------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained weights only: frozen ones are loaded from where they came from."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what has been done and measured so far, and what each rank needs to go on."""
        warn_inside_window(self.trainer)
        batch = self._batch
        inside = batch is not None and batch.step + 1 < batch.steps
        rank = {
            "random": random_state(),
            "rollout": rollout_state(self._buffer, self._buffer_seed) if inside else None,
        }
        checkpoint["iqstar"] = {
            "progress": asdict(self.progress),
            "evaluations": [asdict(e) for e in self.evaluations],
            "frozen": frozen_fingerprints(self.policy, self.estimator),
            "precision": str(self.trainer.precision),
            "recipe": self.recipe,
            "command": self.command,
            "ranks": gather(rank),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is one of this model, and takes up its records."""
        weights = checkpoint.get("state_dict")  # sharded ones are loaded and checked elsewhere
        if weights is not None and (missing := set(self.state_dict()) - set(weights)):
            raise InputError(
                f"--ckpt_path: the checkpoint lacks {len(missing)} trained weights, {min(missing)} "
                "among them; it belongs to another model or another model.policy.lora"
            )
        if (saved := checkpoint.get("iqstar")) is None:
            return
        check_same_frozen(saved["frozen"], frozen_fingerprints(self.policy, self.estimator))
        if saved["precision"] != str(self.trainer.precision):
            rank_zero_warn(
                f"The checkpoint was trained with trainer.precision={saved['precision']}, this run "
                f"has {self.trainer.precision}: it will not go on exactly as it would have"
            )
        self.progress = Progress(**saved["progress"])
        self.evaluations = [
            Evaluation(**{**e, "samples": tuple(Sample(**s) for s in e["samples"])})
            for e in saved["evaluations"]
        ]
        if len(saved["ranks"]) == self.trainer.world_size:
            self._resumed = saved["ranks"][self.global_rank]

    # -- small helpers -----------------------------------------------------------------------

    def _micro_batch(self, step: int) -> MicroBatch:
        return self._buffer[step % len(self._buffer)]

    def _non_finite(self, what: str) -> NonFiniteLossError:
        rows = self._micro_batch(self._batch.step).rollout.prompts[:3] if self._batch else ()
        prompts = "; ".join(repr(p.messages[-1].content[:60]) for p in rows)
        return NonFiniteLossError(
            f"the {what} is not finite at optimiser step {self.global_step}, rollout "
            f"{self.progress.rollouts}, on the micro-batch that starts with {prompts}; the weights "
            "were not updated; checkpoints saved before, if any, are untouched. Lower "
            "model.optimizer.init_args.lr, set trainer.gradient_clip_val, or use "
            "trainer.precision: 32-true"
        )
