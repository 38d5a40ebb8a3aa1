"""What all methods of alignment share: a policy, rollouts, micro-batches, evaluation, resuming.

A method is a subclass that says how rows get their credit and what is the loss of a micro-batch:
:class:`iqstar.module.InverseQStar`, and in ``iqstar.baselines`` those that it is compared with.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from iqstar.accumulation import accumulation_window, check_whole_windows
from iqstar.assignment import MicroBatch, assign_credit, credit_rows
from iqstar.curves import TRAIN_MEANS, Sums, micro_batch_sums, window_curves
from iqstar.errors import InputError, NonFiniteLossError
from iqstar.estimators import NullEstimator
from iqstar.judges import Judge
from iqstar.mdp import Prompt, PromptBatch, Rollout
from iqstar.metrics import TokenMeans
from iqstar.optim import OptimizerFactory, Schedule, default_optimizer
from iqstar.policy import PolicySpec
from iqstar.ranks import global_sum
from iqstar.resume import rollout_from, rollout_state, with_kept
from iqstar.rollouts import GenerateRollout, RolloutEngine, rollout_seed
from iqstar.trained import TrainedModule


class AlignmentModule(TrainedModule):
    """A policy that is trained on the micro-batches of one rollout after another.

    Args:
        policy: Which model is trained, and how it is loaded.
        rollout: Where responses come from; null for GenerateRollout.
        optimizer: The optimiser, as class path and arguments; AdamW with lr 2e-5 by default.
        schedule: Of the learning rate; null for warm-up and cosine.
        judge: Scores held-out responses; it measures, it does not train.
        temperature: Of sampling and of all scoring in training. Evaluation is at 1.
        micro_batch_size: Responses per training step on each device; null takes the whole rollout
            of a batch of prompts at once. An optimiser step takes
            ``trainer.accumulate_grad_batches`` of them from every device.
        epochs_per_rollout: Passes over each rollout before the next one.
        mask_truncated: Leave responses that hit the length limit out of the loss, and of the
            rewards of methods that have some.
        eval_samples: Responses to each held-out prompt in validation.
        seed: Of the rollouts; each rank and each rollout draws its own from it.
    """

    beta: float = 1.0
    """Unit of credit; the methods that have none report in nats."""
    beta_power: int = 0
    """The method's own objective is β to this power times the loss."""
    kept: ClassVar[tuple[str, ...]] = ("behaviour",)
    """What of :class:`TokenCredits` a resumed run cannot compute again inside a rollout."""
    curves: ClassVar[tuple[str, ...]] = ()
    """Quantities of the method that every rank measures in every step."""

    def __init__(
        self,
        policy: PolicySpec,
        rollout: RolloutEngine | None = None,
        optimizer: OptimizerFactory = default_optimizer,
        schedule: Schedule | None = None,
        judge: Judge | None = None,
        temperature: float = 1.0,
        micro_batch_size: int | None = None,
        epochs_per_rollout: int = 1,
        mask_truncated: bool = False,
        eval_samples: int = 4,
        seed: int = 0,
    ) -> None:
        engine = rollout or GenerateRollout()
        super().__init__(policy, engine, optimizer, schedule, judge, eval_samples, seed)
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"model.temperature: must be a positive number, got {temperature}")
        for name, number in (
            ("micro_batch_size", 1 if micro_batch_size is None else micro_batch_size),
            ("epochs_per_rollout", epochs_per_rollout),
            ("eval_samples", eval_samples),
        ):
            if number < 1:
                raise InputError(f"model.{name}: must be at least 1, got {number}")
        self.temperature = temperature
        self.micro_batch_size = micro_batch_size
        self.epochs_per_rollout = epochs_per_rollout
        self.mask_truncated = mask_truncated
        self.train_means = TokenMeans((*TRAIN_MEANS, *self.curves))
        self._buffer: list[MicroBatch] = []
        self._buffer_seed = 0
        self._batch: PromptBatch | None = None
        self._saved_rollout: dict[str, Any] | None = None
        self._window_weight = torch.zeros(())

    # -- what a method says ------------------------------------------------------------------

    @abstractmethod
    def assign(self, rollout: Rollout, seed: int, resuming: bool = False) -> list[MicroBatch]:
        """Cuts a rollout into micro-batches and gives every response token its credit.

        Args:
            rollout: The responses.
            seed: Of this rollout.
            resuming: Whether what :attr:`kept` names follows from a checkpoint; it need not be
                computed then.
        """

    def assign_unchanged(self, rollout: Rollout, seed: int) -> list[MicroBatch]:
        """As :meth:`assign`, for what trains nothing."""
        return self.assign(rollout, seed)

    def without_credit(self, rollout: Rollout, seed: int, group: int = 1) -> list[MicroBatch]:
        """A rollout with log-probs of the reference, but no credit.

        Args:
            rollout: The responses.
            seed: Of this rollout.
            group: Neighbouring rows that stay in one micro-batch.
        """
        assert self.policy is not None
        return assign_credit(
            self.policy,
            rollout,
            NullEstimator(),
            (),
            temperature=self.temperature,
            micro_batch_size=self.micro_batch_size or len(rollout) // group,
            needs_behaviour=False,
            seed=seed,
            group=group,
        )

    @abstractmethod
    def losses(self, micro: MicroBatch) -> tuple[Tensor, Sums]:
        """The weighted sum of a micro-batch's token losses, differentiable, and its metrics' sums.

        Args:
            micro: Rows that are trained on together.
        """

    def before_rollout(self) -> None:
        """Called when the last rollout is done with, and the next one is due."""

    # -- for the data module -----------------------------------------------------------------

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        """Tokens of a rendered prompt; the data module asks for it."""
        return len(self.chat.prompt_ids(prompt.messages))

    def training_steps(self, prompts: int) -> int:
        """Training steps on the rollout of that many prompts; the data module asks for it."""
        rows = prompts * self.rollout.responses_per_prompt
        return math.ceil(rows / (self.micro_batch_size or rows)) * self.epochs_per_rollout

    def setup(self, stage: str) -> None:
        """Checks what needs no model, before one is loaded."""
        if stage == "fit":
            check_whole_windows(self.trainer)

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
        return self.assign(rollout, seed)

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Makes a rollout where one is due, and counts the tokens of the accumulation window."""
        self.progress.begin_step()
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
            left = self.trainer.num_training_batches - batch_idx
            window = accumulation_window(batch, done, accumulate, left)
            weight = sum(
                (self._micro_batch(step).tokens.weight.sum() for step in window),
                start=torch.zeros((), device=self.device),
            )
            self._window_weight = global_sum(weight)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Adds to the time that training took, and lets go of a rollout that is used up."""
        self.progress.end_step()
        if self._batch is not None and self._batch.used_up:
            self._buffer = []  # its hidden states; before an evaluation and the next rollout

    def _new_rollout(self, prompts: tuple[Prompt, ...]) -> None:
        self.before_rollout()
        self._buffer_seed = rollout_seed(self.seed, self.progress.rollouts, self.global_rank)
        self._buffer = self.collect(prompts, self._buffer_seed)
        self.progress.rollouts += 1
        rows = sum(len(m.rollout) for m in self._buffer)
        self.progress.samples += int(global_sum(torch.tensor(rows, device=self.device)))

    def _restore_rollout(self, state: dict[str, Any]) -> None:
        """The rollout that a checkpoint was made in; frozen models score it once more."""
        if any(set(saved) != set(self.kept) for saved in state["kept"]):
            raise InputError(
                "--ckpt_path: the checkpoint was made inside a rollout of another method; give "
                "model.class_path as that run had it, or take a checkpoint between two rollouts"
            )
        self._buffer_seed = state["seed"]
        rollout = rollout_from(state, self.chat.pad_id, self.device)
        parts = self.assign(rollout, self._buffer_seed, resuming=True)
        self._buffer = with_kept(parts, state)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, so scaled that the window's gradient is that of a mean.

        Returns:
            Σ loss · world size · window / N: this undoes the divisions that Lightning
            (accumulation) and DDP or FSDP (ranks) apply, so that the optimiser sees
            Σ loss / N with N the weight of all response tokens of the window on all ranks.
        """
        micro = self._micro_batch(batch.step)
        total, sums = self.losses(micro)
        if not torch.isfinite(total):
            raise self._non_finite("loss")
        self.train_means.update(micro_batch_sums(micro, total, sums, self.beta))
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return total * (scale / self._window_weight.clamp(min=1e-12)).to(total)

    # -- what it shows -----------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the curves of the accumulation window; the gradient norm is that before clipping."""
        norm = self.gradient_norm()
        if not torch.isfinite(norm):
            raise self._non_finite("gradient norm")
        if self._window_weight == 0:  # nothing to learn from: momentum and decay shall rest too
            self.zero_grad()
        means = self.train_means.compute()
        tokens = float(global_sum(self.train_means.count("credit")))
        self.train_means.reset()
        now = time.perf_counter()
        curves = {
            **window_curves(means, self.beta_power, self.beta),
            "grad_norm": norm,
            "samples": float(self.progress.samples),
            "tokens_per_second": tokens / max(now - self.progress.clock, 1e-9),
        }
        self.progress.clock = now
        self.log_dict({f"train/{k}": torch.as_tensor(v).float() for k, v in curves.items()})
        self.log("loss", means["loss"].float(), prog_bar=True, logger=False)
        self.log("kl", means["kl"].float(), prog_bar=True, logger=False)

    def on_train_start(self) -> None:
        """Starts the clock of the throughput curve, and forgets the rollout of an earlier fit."""
        self._buffer, self._batch, self._saved_rollout = [], None, None
        super().on_train_start()
        self.progress.clock = time.perf_counter()

    # -- resuming ----------------------------------------------------------------------------

    def unfinished(self) -> dict[str, Any] | None:
        """The rollout, its seed and :attr:`kept`, where updates on it are still to come."""
        if self._saved_rollout is not None:  # not yet taken up again
            return self._saved_rollout
        if self._batch is None or self._batch.used_up:
            return None
        return rollout_state(self._buffer, self._buffer_seed, self.kept)

    def go_on_from(self, unfinished: dict[str, Any] | None) -> None:
        """Keeps it until the next training step, where frozen models score it once more."""
        self._saved_rollout = unfinished

    # -- predictions ------------------------------------------------------------------------

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Responses with the credit of each token (:func:`iqstar.assignment.credit_rows`)."""
        assert self.policy is not None
        seed = rollout_seed(self.seed, batch_idx, self.global_rank)
        rollout = self.rollout.roll_out(self.policy, batch.prompts, self.temperature, seed)
        return [
            row
            for micro in self.assign_unchanged(rollout, seed)
            for row in credit_rows(self.policy, micro, self.rollout, self.beta, self.temperature)
        ]

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
