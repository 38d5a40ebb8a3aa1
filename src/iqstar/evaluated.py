"""A module whose policy is measured on held-out prompts: before training, in it, and after."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning import LightningModule

from iqstar.engine import RolloutEngine
from iqstar.evaluation import (
    Evaluation,
    Sample,
    evaluation_metrics,
    in_order,
    sample_and_score,
)
from iqstar.judges import Judge
from iqstar.judges.base import check_named
from iqstar.mdp import PromptBatch
from iqstar.metrics import TokenMeans
from iqstar.policy import Policy
from iqstar.ranks import gather
from iqstar.rollouts import rollout_seed


@dataclass
class Progress:
    """What a run has done so far.

    Args:
        rollouts: Rollouts made by each rank.
        samples: Responses sampled by all ranks.
        seconds: Time spent on training steps and their rollouts.
        clock: When the last optimiser step ended, for the throughput.
        started: When the present training step began; None between steps.
    """

    rollouts: int = 0
    samples: int = 0
    seconds: float = 0.0
    clock: float = field(default_factory=time.perf_counter)
    started: float | None = None

    def begin_step(self) -> None:
        """Starts the clock of a training step."""
        self.started = time.perf_counter()

    def end_step(self) -> None:
        """Counts its time."""
        self.seconds, self.started = self.state()["seconds"], None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, which may be made within a step."""
        step = 0.0 if self.started is None else time.perf_counter() - self.started
        return {**asdict(self), "seconds": self.seconds + step, "started": None}


class EvaluatedModule(LightningModule):
    """Samples responses of its policy to held-out prompts, scores them, and keeps what it found.

    Args:
        rollout: Whose length limit, stop strings and batch size evaluations take over.
        judge: Scores the responses; null measures all else.
        eval_samples: Responses to each prompt.
        seed: Of the sampling.

    Attributes:
        evaluations: All that were made, oldest first.
        progress: What training has done so far.
    """

    def __init__(
        self, rollout: RolloutEngine, judge: Judge | None, eval_samples: int, seed: int
    ) -> None:
        super().__init__()
        if judge is not None:
            check_named(judge)
        self.rollout = rollout
        self.judge = judge
        self.eval_samples = eval_samples
        self.seed = seed
        self.policy: Policy | None = None
        self.progress = Progress()
        self.evaluations: list[Evaluation] = []
        self.val_means = TokenMeans(("kl", "entropy"))
        self._val_samples: list[Sample] = []

    @property
    def on_policy(self) -> bool:
        """Whether the responses that are trained on are the policy's own."""
        return self.rollout.on_policy

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
        samples = in_order(gather(self._val_samples), self.eval_samples)
        if not samples:
            return
        metrics = evaluation_metrics(samples, self.val_means.compute(), self.judge is not None)
        self.evaluations.append(
            Evaluation(
                step=self.global_step,
                metrics=metrics,
                samples=tuple(samples),
                sampled=self.progress.samples,
                seconds=round(self.progress.seconds, 3),
                judge=None if self.judge is None else self.judge.identity,
            )
        )
        curves = {f"val/{name}": value for name, value in metrics.items()}
        if self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(curves, step=self.global_step)
        else:
            self.log_dict(curves, sync_dist=False, rank_zero_only=False)

    def measured(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run's progress and evaluations."""
        evaluations = [asdict(found) for found in self.evaluations]
        return {"progress": self.progress.state(), "evaluations": evaluations}

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`measured` gave."""
        self.progress = Progress(**saved["progress"])
        self.evaluations = [
            Evaluation(**{**found, "samples": tuple(Sample(**s) for s in found["samples"])})
            for found in saved["evaluations"]
        ]

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """The same measurement as validation."""
        self.validation_step(batch, batch_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end
