"""Which training steps share an optimiser step: the window over which N is counted (method §4).

Inside of a window rows may change places: their gradients are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import Trainer

from iqstar.errors import InputError
from iqstar.mdp import PromptBatch, Rollout
from iqstar.ranks import even_spans


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
        raise _uneven(accumulate, len(batch.prompts), batch.steps)
    return window


def check_whole_windows(trainer: Trainer) -> None:
    """Checks that rollouts hold whole accumulation windows, before anything is computed.

    What the data module does not tell is left to :func:`accumulation_window`.

    Raises:
        InputError: If a window would go on in another rollout.
    """
    data: Any = getattr(trainer, "datamodule", None)
    accumulate = trainer.accumulate_grad_batches
    steps = getattr(data.train_dataloader(), "steps", [0]) if data else [0]
    limit = trainer.limit_train_batches
    few = isinstance(limit, int) or limit < 1 or 0 < trainer.max_steps * accumulate <= steps[0]
    if len(steps) > 1 and steps[0] % accumulate and not few:
        raise _uneven(accumulate, data.batch_size, steps[0])


def by_length(rollout: Rollout, lengths: Sequence[int], size: int, accumulate: int) -> Rollout:
    """The rows of each window sorted, so that its micro-batches need little padding.

    Args:
        rollout: The rows.
        lengths: Tokens of each, the prompt's included.
        size: Of a micro-batch, at most.
        accumulate: Micro-batches of a window.

    Returns:
        The same rows; in their old order where windows would differ from epoch to epoch.
    """
    spans = even_spans(len(rollout), size, rollout.response_ids.device)
    if accumulate == 1 or len(spans) % accumulate:
        return rollout
    order: list[int] = []
    for first in range(0, len(spans), accumulate):
        rows = range(spans[first][0], spans[first + accumulate - 1][1])
        order += sorted(rows, key=lambda row: lengths[row])
    return rollout.take(order)


def _uneven(accumulate: int, prompts: int, steps: int) -> InputError:
    return InputError(
        f"trainer.accumulate_grad_batches: an optimiser step takes {accumulate} micro-batches, "
        f"but the rollout of {prompts} prompts has {steps}, which is not a multiple; choose "
        "data.batch_size, model.rollout.responses_per_prompt and model.micro_batch_size so that "
        "it is"
    )
