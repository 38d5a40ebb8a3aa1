"""Credit of labelled responses: which can be compared, and what each token of them gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer
from rich.console import Console
from rich.progress import track

from iqstar.assignment import assign_credit
from iqstar.data.labelled import LabelledItem, LabelledSet
from iqstar.data.turns import NO_ROOM
from iqstar.errors import InputError
from iqstar.mdp import Prompt
from iqstar.module import InverseQStar
from iqstar.one_device import frozen_models
from iqstar.ranking import Numbers
from iqstar.rollouts import DatasetRollout


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A response's credit.

    Args:
        credits: A* of every token.
        truncated: Whether the length limit cut the response.
    """

    credits: Numbers
    truncated: bool


def comparable(
    labelled: LabelledSet, module: InverseQStar, limit: int | None, max_prompt_tokens: int | None
) -> tuple[list[LabelledItem], dict[str, int]]:
    """The first items that the model can tell apart and read, and why others are left out.

    Raises:
        InputError: If none is left.
    """
    items: list[LabelledItem] = []
    dropped, room = Counter(labelled.dropped), module.prompt_room()
    for item in labelled.items:
        if len(items) == limit:
            break
        tokens = module.count_prompt_tokens(item.responses[0])
        replies = [module.chat.response_ids(str(r.response)) for r in item.responses]
        kept = {tuple(reply[: module.rollout.max_new_tokens]) for reply in replies}
        if max_prompt_tokens is not None and tokens > max_prompt_tokens:
            dropped[f"over data.max_prompt_tokens={max_prompt_tokens}"] += 1
        elif room is not None and tokens > room:
            dropped[NO_ROOM.format(room)] += 1
        elif len(kept) < len(replies):
            dropped["equal sides, once cut at max_new_tokens"] += 1
        else:
            items.append(item)
    if not items:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise InputError(
            f"--data: none of {labelled.rows} rows can be compared ({reasons}); give "
            "pairs of one prompt and two different replies, or answers that are not empty"
        )
    return items, dict(dropped)


def check_classes(items: Sequence[LabelledItem]) -> None:
    """Checks that there are safe answers and unsafe ones.

    Raises:
        InputError: If there are not.
    """
    for wanted, name in ((True, "safe"), (False, "unsafe")):
        if all(item.safe is not wanted for item in items):
            raise InputError(
                f"--data: none of the {len(items)} answers is {name}, so there is nothing to "
                f"compare; give rows with is_safe: {str(wanted).lower()} too, or raise --limit"
            )


def score(
    trainer: Trainer, module: InverseQStar, prompts: Sequence[Prompt], batch_size: int
) -> list[Scored]:
    """A*/β of the tokens of each response, under frozen models.

    Args:
        trainer: Of one device; for its precision and its device.
        module: The run's.
        prompts: With responses.
        batch_size: Responses that are scored together; they are alike in length. An estimator
            whose credit depends on its rollout has all responses to a prompt in one, however many.

    Raises:
        InputError: If a credit is not finite.
    """
    policy, plugin = frozen_models(trainer, module), trainer.precision_plugin
    engine = DatasetRollout(module.rollout.max_new_tokens)

    def size(index: int) -> tuple[int, str]:
        text = str(prompts[index].response)  # of equally long ones, labels decide nothing
        tokens = module.chat.response_ids(text)[: engine.max_new_tokens]
        return module.count_prompt_tokens(prompts[index]) + len(tokens), text

    found: dict[int, Scored] = {}
    batches = track(
        _batches(
            prompts,
            [size(index) for index in range(len(prompts))],
            batch_size,
            together=bool(module.estimator.mixing()),
        ),
        "Scoring",
        console=Console(stderr=True),
        disable=trainer.progress_bar_callback is None,
    )
    for seed, rows in enumerate(batches):
        rollout = engine.roll_out(policy, [prompts[i] for i in rows], module.temperature, seed)
        with torch.no_grad(), plugin.forward_context():
            (micro,) = assign_credit(
                policy,
                rollout,
                module.estimator,
                (),
                temperature=module.temperature,
                micro_batch_size=len(rollout),
                needs_behaviour=False,
                seed=seed,
            )
        credits = micro.tokens.credit.double().cpu().split(rollout.lengths.tolist())
        for i, credit, cut in zip(rows, credits, rollout.truncated.tolist(), strict=True):
            if not credit.isfinite().all():
                raise InputError(
                    "model.estimator: the credit of the response to "
                    f"{prompts[i].messages[-1].content[:60]!r} is not finite; use "
                    "trainer.precision: 32-true, or a weaker estimator"
                )
            found[i] = Scored(credits=credit.numpy(), truncated=cut)
    return [found[i] for i in range(len(prompts))]


def _batches(
    prompts: Sequence[Prompt], sizes: Sequence[tuple[int, str]], batch_size: int, together: bool
) -> list[list[int]]:
    """Rows alike in size; together, those to one prompt: an estimator may sample for it."""
    groups: dict[Any, list[int]] = {}
    for index in sorted(range(len(prompts)), key=sizes.__getitem__):
        groups.setdefault(prompts[index].messages if together else index, []).append(index)
    batches: list[list[int]] = []
    for group in sorted(groups.values(), key=lambda rows: sizes[rows[-1]]):
        if not batches or len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        batches[-1] += group
    return batches
