"""The outside peer: TRL's ``SDFTTrainer`` on the same prompts, measured by the same evaluation.

Its own defaults hold, but for one response to a prompt, the budget, the length limit, and what all
runs here share: optimiser, learning rate's schedule, gradients clipped to norm 1. A run that is
stopped starts over. Run as ``python -m iqstar.compare.peer SETTINGS.yaml``.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from iqstar.compare.plan import TRL, merged
from iqstar.compare.setting import Setting, build
from iqstar.errors import InputError, NonFiniteLossError, fail, missing_packages
from iqstar.evaluation import Evaluation, Sample, evaluation_metrics, sample_and_score
from iqstar.loading import load_policy
from iqstar.metrics import TokenMeans
from iqstar.optim import parameter_groups
from iqstar.policy import Policy
from iqstar.rollouts import rollout_seed
from iqstar.summary import evaluation_rows, write_json

PLAIN_ATTENTION = {"model": {"init_args": {"policy": {"attn_implementation": "sdpa"}}}}


class Evaluations(TrainerCallback):
    """Evaluates before training and after every so many steps, outside of the clock.

    Args:
        setting: What all runs share.
        policy: Whose actor TRL trains.
        interval: Optimiser steps between evaluations.
        responses_per_step: Responses of each step.
    """

    def __init__(
        self, setting: Setting, policy: Policy, interval: int, responses_per_step: int
    ) -> None:
        self.setting = setting
        self.policy = policy
        self.interval = interval
        self.responses_per_step = responses_per_step
        self.found: list[Evaluation] = []
        self.seconds = 0.0
        self._started = 0.0

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        """Evaluates the reference."""
        self._evaluate(0)

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Stops the clock, and evaluates where that is due.

        Raises:
            NonFiniteLossError: If a weight became NaN or infinite.
        """
        self.seconds += time.perf_counter() - self._started
        if not all(p.isfinite().all() for p in self.policy.actor.parameters()):
            raise NonFiniteLossError(f"a weight is not finite after step {state.global_step}")
        if state.global_step % self.interval == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        module, plugin = self.setting.module, self.setting.trainer.precision_plugin
        means, samples = TokenMeans(("kl", "entropy")), list[Sample]()
        training = self.policy.actor.training
        self.policy.actor.eval()
        for number, batch in enumerate(self.setting.data.val_dataloader()):
            with plugin.forward_context():
                records, sums = sample_and_score(
                    self.policy,
                    batch.prompts,
                    module.judge,
                    like=module.rollout,
                    samples=module.eval_samples,
                    seed=rollout_seed(module.seed, number, 0),
                )
            means.update(sums)
            samples += records
        self.policy.actor.train(training)
        metrics = evaluation_metrics(samples, means.compute(), module.judge is not None)
        self.found.append(
            Evaluation(
                step=step,
                metrics=metrics,
                samples=tuple(samples),
                sampled=step * self.responses_per_step,
                seconds=round(self.seconds, 3),
            )
        )


def run(given: dict[str, Any]) -> None:
    """Trains, evaluates, and writes ``summary.json``.

    Args:
        given: ``common``, ``principle``, ``seed``, ``steps``, ``responses_per_step``,
            ``evaluations`` and ``output``, as :func:`iqstar.compare.runner.command_of` writes them.

    Raises:
        InputError: If TRL is not installed, or the settings are wrong.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    except ImportError as error:
        raise missing_packages("the outside peer", TRL) from error
    from datasets import Dataset

    output, steps, batch = Path(given["output"]), given["steps"], given["responses_per_step"]
    common = merged(given["common"], PLAIN_ATTENTION)
    setting = build(common, given["seed"], output / "common.yaml")
    module = setting.module
    precision = str(setting.trainer.precision)
    policy = load_policy(module.spec, module.chat, precision)
    for part in (policy.actor, policy.frozen):
        if part is not None:
            part.to(setting.trainer.strategy.root_device)
    optimizer = module.optimizer(parameter_groups(policy.actor))
    schedule = module.schedule.build(optimizer, steps)
    rows = [
        {
            "prompt": prompt.turns,
            "privileged_context": given["principle"],
        }
        for prompt in setting.prompts(steps * batch)
    ]
    evaluations = Evaluations(setting, policy, math.ceil(steps / given["evaluations"]), batch)
    config = SDFTConfig(
        output_dir=str(output / "trl"),
        use_cpu=setting.trainer.strategy.root_device.type == "cpu",
        bf16=precision == "bf16-mixed",
        max_steps=steps,
        per_device_train_batch_size=batch,
        num_generations=1,
        max_completion_length=module.rollout.max_new_tokens,
        gradient_checkpointing=False,
        max_grad_norm=1.0,
        seed=given["seed"],
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SDFTTrainer(
        model=policy.actor.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=module.chat.tokenizer,
        callbacks=[evaluations],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    judge = module.judge and {"name": module.judge.name, "version": module.judge.version}
    write_json(
        output / "summary.json",
        {
            "samples": steps * batch,
            "optimizer_steps": steps,
            "seconds": round(evaluations.seconds, 1),
            "precision": precision,
            "judge": judge,
            "evaluations": evaluation_rows(evaluations.found),
        },
    )


if __name__ == "__main__":
    try:
        run(yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except InputError as error:
        sys.exit(fail(error))
