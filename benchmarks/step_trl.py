"""Worker: training steps of TRL's ``SDFTTrainer``, timed phase by phase.

Its defaults, but for what makes the work the same on both sides: one response to a prompt, no
gradient checkpointing, no end of sequence, the precision, and AdamW's learning rate.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import memory
from clock import Clock
from step_iqstar import PRINCIPLE


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains for a few steps; arguments and result as those of :func:`step_iqstar.run`.

    Args:
        settings: As there, with ``mode`` (TRL's ``distillation_mode``) for ``estimator``.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from iqstar.pretrained import resolve_model

    torch.set_num_threads(settings["threads"])
    clock, counted = Clock(), []
    imports = memory.after_imports()

    class Phases(TrainerCallback):
        """Generation and the steps' ends; the rest is told apart by what is wrapped below."""

        def on_generation_prompts_selected(self, *arguments: Any, **options: Any) -> None:
            clock.mark()

        def on_self_distillation_batch_prepared(self, *arguments: Any, **options: Any) -> None:
            clock.add("generation")
            counted.append(options["completion_ids"].numel())

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clock.add("optimizer")
            clock.end_step()

    rows = [
        {"prompt": [{"role": "user", "content": text}], "privileged_context": PRINCIPLE}
        for text in settings["texts"]
    ]
    rows_at_once = min(settings.get("micro_batch") or settings["prompts"], settings["prompts"])
    lora, sampled = settings.get("lora"), settings["mode"] == "sampled_token"
    with tempfile.TemporaryDirectory() as folder:
        config = SDFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=settings["precision"] == "bf16-mixed",
            model_init_kwargs={"dtype": "float32"},
            max_steps=settings["warmup"] + settings["steps"],
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=settings["prompts"] // rows_at_once,
            num_generations=1,
            max_completion_length=settings["tokens"],
            generation_kwargs={"eos_token_id": None},
            distillation_mode=settings["mode"],
            distillation_alpha=1.0 if sampled else 0.5,
            gradient_checkpointing=False,
            learning_rate=2e-5,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SDFTTrainer(
            model=resolve_model(settings["model"]),
            args=config,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Phases()],
            peft_config=LoraConfig(r=lora, lora_alpha=2 * lora) if lora else None,
        )
        trainer.eos_token_ids = [-1]  # every response is of the full length, on every side
        trainer.model.generation_config.eos_token_id = None
        if trainer.teacher_model is not trainer.model:
            trainer.teacher_model.register_forward_pre_hook(
                lambda *_: clock.add("forward_backward")
            )
            trainer.teacher_model.register_forward_hook(lambda *_: clock.add("scoring"))
        backward = trainer.accelerator.backward

        def timed_backward(*arguments: Any, **options: Any) -> None:
            backward(*arguments, **options)
            clock.add("forward_backward")

        trainer.accelerator.backward = timed_backward
        trainer.train()
    state = trainer.optimizer.state.values()
    parts = memory.floor(
        imports,
        trainer.model.parameters(),
        [*trainer.teacher_model.parameters(), *trainer.teacher_model.buffers()],
        (t for values in state for t in values.values() if torch.is_tensor(t)),
    )
    return {
        "tokens": sum(counted) / len(counted),
        "steps": clock.steps[settings["warmup"] :],
        "memory": memory.report(parts),
    }
