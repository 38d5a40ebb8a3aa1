"""DPO's pairs: two responses of the reference to each prompt, ordered by the judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from iqstar.atomic import written_beside
from iqstar.compare.setting import Setting
from iqstar.errors import InputError
from iqstar.evaluation import evaluation_engine
from iqstar.judges import scores_of
from iqstar.loading import load_reference
from iqstar.mdp import Prompt
from iqstar.rollouts import rollout_seed

AT_ONCE = 32
"""Prompts answered together."""
HELDOUT = "heldout.jsonl"
"""Beside the pairs: the prompts of all evaluations."""
PAIR_FILES = ("data.init_args.path", "data.init_args.heldout_path")
"""Settings of a method that trains on the pairs: where they are."""


def write_pairs(setting: Setting, responses: int, path: Path) -> tuple[int, int]:
    """Samples pairs and writes them, with the held-out prompts beside.

    A pair whose responses have the same score, or one without, says nothing and is left out; its
    responses and its label count all the same.

    Args:
        setting: What the runs share; its judge orders the pairs.
        responses: To sample, two to each prompt.
        path: The file to write.

    Returns:
        Number of pairs that are written, and of those that are left out.

    Raises:
        InputError: If the prompts do not suffice, or no pair is left.
    """
    module, trainer = setting.module, setting.trainer
    assert module.judge is not None
    prompts = setting.prompts(responses // 2)
    if (known := len({prompt.messages for prompt in prompts})) < len(prompts):
        raise InputError(
            f"common.data: {known} prompts are too few for pairs of {responses} responses, two to "
            "a prompt; give more prompts, or lower budget.run or the responses of the methods with "
            "pairs"
        )
    precision, plugin = str(trainer.precision), trainer.precision_plugin
    with plugin.module_init_context():
        policy = load_reference(module.spec, module.chat, precision)
    plugin.convert_module(policy.actor).to(trainer.strategy.root_device)
    engine = evaluation_engine(module.rollout, 2)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(prompts), AT_ONCE):
        asked = prompts[start : start + AT_ONCE]
        with plugin.forward_context():
            seed = rollout_seed(module.seed, start)
            rollout = engine.sample(policy.actor, asked, module.temperature, seed)
        texts = [text.strip() for text in engine.texts(module.chat, rollout)]
        scores = scores_of(module.judge, rollout.prompts, texts)
        whole = [not cut for cut in rollout.truncated.tolist()]
        for number, prompt in zip(range(0, len(texts), 2), asked, strict=True):
            two = slice(number, number + 2)
            if row := _pair(prompt, texts[two], whole[two], scores[two]):
                rows.append(row)
    if not rows:
        raise InputError("budget: the judge tells no pair of responses apart; sample more")
    _write(path.with_name(HELDOUT), [_heldout(prompt) for prompt in setting.data.heldout_prompts])
    _write(path, rows)
    return len(rows), len(prompts) - len(rows)


def _pair(
    prompt: Prompt, texts: list[str], complete: list[bool], scores: list[float]
) -> dict[str, Any] | None:
    first, second = scores
    if math.isnan(first - second) or first == second or not all(texts) or texts[0] == texts[1]:
        return None
    row: dict[str, Any] = _asked(prompt)
    better = int(second > first)
    for side, index in (("chosen", better), ("rejected", 1 - better)):
        row |= {side: texts[index], f"{side}_complete": complete[index]}
    return row


def _asked(prompt: Prompt) -> dict[str, Any]:
    return {"messages": prompt.turns}


def _heldout(prompt: Prompt) -> dict[str, Any]:
    """The prompt with the data set's own response, which some judges compare with."""
    return _asked(prompt) | ({"response": prompt.response} if prompt.response else {})


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with written_beside(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
