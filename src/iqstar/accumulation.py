"""Which training steps share an optimiser step: the window over which N is counted (method §4)."""

from __future__ import annotations

from iqstar.errors import InputError
from iqstar.mdp import PromptBatch


def accumulation_window(batch: PromptBatch, done: int, accumulate: int, left: int | float) -> range:
    """The steps on a batch of prompts that its present accumulation window still has.

    Args:
        batch: The batch, at the first of these steps.
        done: Steps that the window had before.
        accumulate: ``trainer.accumulate_grad_batches``.
        left: Steps that the epoch still has, ``trainer.limit_train_batches`` heeded.

    Raises:
        InputError: If the window would go on in another rollout.
    """
    most = min(accumulate - done, left)
    window = range(batch.step, int(min(batch.step + most, batch.steps)))
    if len(window) < most and not batch.last:
        raise InputError(
            f"trainer.accumulate_grad_batches: an optimiser step takes {accumulate} "
            f"micro-batches, but the rollout of {len(batch.prompts)} prompts has "
            f"{batch.steps}, which is not a multiple; choose data.batch_size, "
            "model.rollout.responses_per_prompt and model.micro_batch_size so that it is"
        )
    return window
