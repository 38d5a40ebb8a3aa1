"""Worker: training steps of iqstar, timed phase by phase."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import harness
import memory
from clock import Clock

PRINCIPLE = "Please reply in a very kind, warm and positive tone."
ANTIPRINCIPLE = "Please reply in a cold, rude and negative tone."


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains for a few steps.

    Args:
        settings: ``texts`` (user turns), ``prompts`` (of a step), ``tokens`` (of a response),
            ``steps``, ``warmup``, ``precision``, ``model``, ``estimator``, and where they apply
            ``lora`` (rank), ``micro_batch`` (rows), ``padded`` (whether padding is read), ``vllm``
            (URL of a server).

    Returns:
        Tokens of a step, seconds of every step after the first ones, memory in MiB.
    """
    import torch
    from lightning.pytorch import Callback, Trainer

    from iqstar import InverseQStar, LoRASpec, PolicySpec
    from iqstar.data import JSONL
    from iqstar.estimators import ContrastiveEstimator, PrincipleEstimator
    from iqstar.rollouts import GenerateRollout

    torch.set_num_threads(settings["threads"])
    clock, counted = Clock(), []
    imports = memory.after_imports()

    class Timed(InverseQStar):
        """Tells rollout, frozen scoring and update apart."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            clock.add("scoring")

    class Phases(Callback):
        """The update's phases; all rollouts are of the full length, so counting is easy."""

        def on_train_batch_start(self, *arguments: Any) -> None:
            clock.mark()

        def on_after_backward(self, *arguments: Any) -> None:
            clock.add("forward_backward")

        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            clock.add("optimizer")
            if trainer.global_step > len(clock.steps):
                clock.end_step()

    estimators = {
        "principle": lambda: PrincipleEstimator(PRINCIPLE),
        "contrastive": lambda: ContrastiveEstimator(PRINCIPLE, ANTIPRINCIPLE),
    }
    rollout = GenerateRollout(max_new_tokens=settings["tokens"])
    if settings.get("vllm"):
        from iqstar.vllm_rollout import VLLMRollout

        rollout = VLLMRollout(url=settings["vllm"], max_new_tokens=settings["tokens"])
    sample = rollout.roll_out

    def roll_out(*arguments: Any) -> Any:
        made = clock.timed("generation", sample)(*arguments)
        counted.append(int(made.response_mask.sum()))
        return made

    rollout.roll_out = roll_out
    lora = settings.get("lora")
    module = Timed(
        PolicySpec(
            model=settings["model"],
            attn_implementation="grouped",
            padding_free=not settings.get("padded", False),
            lora=LoRASpec(rank=lora, alpha=2 * lora) if lora else None,
        ),
        estimators[settings["estimator"]](),
        rollout=rollout,
        micro_batch_size=settings.get("micro_batch"),
    )
    module.chat.eos_ids = ()  # every response is of the full length, on every side
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in settings["texts"]))
        data = JSONL(str(file), batch_size=settings["prompts"], val_prompts=0, shuffle=False)
        trainer = Trainer(
            precision=settings["precision"],
            max_steps=settings["warmup"] + settings["steps"],
            accumulate_grad_batches=module.training_steps(settings["prompts"]),
            **harness.TRAINER,
            callbacks=[Phases()],
        )
        trainer.fit(module, datamodule=data)
    state = trainer.optimizers[0].state.values()
    parts = memory.floor(
        imports,
        module.actor.parameters(),
        [] if module.frozen is None else [*module.frozen.parameters(), *module.frozen.buffers()],
        (t for values in state for t in values.values() if torch.is_tensor(t)),
    )
    url = settings.get("vllm")
    server = memory.server_peak(urlparse(url).port)[1] if url else 0
    return {
        "tokens": sum(counted) / len(counted),
        "steps": clock.steps[settings["warmup"] :],
        "memory": memory.report(parts, server),
    }
