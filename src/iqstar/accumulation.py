"""Which training steps share an optimiser step: the window over which N is counted (method §4).

Inside of a window rows may change places: their gradients are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Trainer

from iqstar.errors import InputError
from iqstar.mdp import Prompt, PromptBatch, Rollout
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


def by_length(
    rollout: Rollout,
    prompt_tokens: Callable[[Prompt], int],
    size: int,
    accumulate: int,
    batches: int | float,
) -> Rollout:
    """Sorts the rows of each window, so that its micro-batches need little padding.

    Responses to one prompt stay together: what they begin with is read once.

    Args:
        rollout: The rows.
        prompt_tokens: Counts a prompt's tokens.
        size: Of a micro-batch, at most.
        accumulate: ``trainer.accumulate_grad_batches``.
        batches: Micro-batches of an epoch, ``trainer.limit_train_batches`` heeded.

    Returns:
        The same rows; in their old order where a window is cut short, goes on in another epoch of
        the rollout, or is one micro-batch.
    """
    if accumulate == 1 or batches % accumulate:
        return rollout
    spans = even_spans(len(rollout), size, rollout.response_ids.device)
    if len(spans) % accumulate:
        return rollout
    counts = {prompt: prompt_tokens(prompt) for prompt in rollout.prompts}
    rows = zip(rollout.prompts, rollout.lengths.tolist(), strict=True)
    lengths = [counts[prompt] + length for prompt, length in rows]
    order: list[int] = []
    for first in range(0, len(spans), accumulate):
        of_prompt: dict[Prompt, list[int]] = {}
        for row in range(spans[first][0], spans[first + accumulate - 1][1]):
            of_prompt.setdefault(rollout.prompts[row], []).append(row)
        together = sorted(of_prompt.values(), key=lambda rows: max(lengths[r] for r in rows))
        order += [row for rows in together for row in rows]
    return rollout.take(order)


def _uneven(accumulate: int, prompts: int, steps: int) -> InputError:
    return InputError(
        f"trainer.accumulate_grad_batches: an optimiser step takes {accumulate} micro-batches, "
        f"but the rollout of {prompts} prompts has {steps}, which is not a multiple; choose "
        "data.batch_size, model.rollout.responses_per_prompt and model.micro_batch_size so that "
        "it is"
    )
