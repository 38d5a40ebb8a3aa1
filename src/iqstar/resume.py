"""What a rank needs, beside weights and optimiser, to go on exactly where it stopped.

Random state, and the rollout it is training on: its responses and, where a loss needs them, the
policy's log-probs at the weights that sampled it (of a baseline, its rewards and advantages too).
All else of a rollout follows from frozen models and is computed again. Plain values only, which
load with ``weights_only``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from iqstar.assignment import MicroBatch
from iqstar.errors import InputError
from iqstar.evaluation import Evaluation
from iqstar.mdp import Message, Prompt, Rollout, make_rollout
from iqstar.policy import CausalLM, Policy
from iqstar.ranks import gather

FILES = ("data.init_args.path", "data.init_args.heldout_path")
IDENTITY = (
    "model.class_path", "model.init_args.estimator", "model.init_args.loss",
    "model.init_args.reward", "data.class_path", "data.init_args.subset", *FILES,
    "data.init_args.seed", "data.init_args.val_prompts", "seed_everything",
)  # fmt: skip
"""Settings without which a run is another one, or would learn from what it is measured on."""


def frozen_fingerprints(policy: Policy | None, estimator: nn.Module) -> dict[str, str]:
    """Identity of the weights that checkpoints leave out, by their role."""
    assert policy is not None
    own = {
        f"estimator.{name}": part.fingerprint
        for name, part in estimator.named_modules()
        if isinstance(part, CausalLM)
    }
    return {"reference": policy.actor.fingerprint} | own


def check_same_frozen(saved: dict[str, str], here: dict[str, str]) -> None:
    """Checks that frozen models are those that a checkpoint was trained against.

    Args:
        saved: Fingerprints in the checkpoint, by role.
        here: Those of this run.

    Raises:
        InputError: If one differs.
    """
    for role in sorted(saved.keys() | here.keys()):
        then, now = (side.get(role, "none")[:12] for side in (saved, here))
        if then != now:
            raise InputError(
                f"--ckpt_path: the checkpoint was trained with other frozen weights ({role}: "
                f"{then} there, {now} here); give the same model.policy.model and "
                "model.estimator, or a checkpoint of these"
            )


def check_same_run(path: Path, saved: str | None, here: str | None) -> None:
    """Checks that the newest checkpoint is one of the run that is to go on.

    Steps, rates and the like may change from stop to stop; what is learnt, and from what, may not.

    Args:
        path: The checkpoint.
        saved: The settings it was made with, as YAML; None where they are not known.
        here: Those of this run.

    Raises:
        InputError: If it is of a run with another method, estimator, loss, reward or data set.
    """
    then, now = (yaml.safe_load(text) if text else {} for text in (saved, here))
    for key in IDENTITY if then and now else ():
        if _differ(_at(then, key), _at(now, key)):
            raise InputError(
                f"--ckpt_path last: the newest checkpoint, {path}, is of a run with another {key}; "
                "give the path of the one that you mean (of this one, to go on all the same), or "
                "each run a folder of its own with trainer.logger.init_args.name"
            )


def check_same_checkpoint(path: str | None) -> None:
    """Checks that all processes go on from one checkpoint, which each has looked for itself.

    Args:
        path: What this one has found; None for nothing.

    Raises:
        InputError: If another has found another.
    """
    found = gather(path)
    if len(set(found)) > 1:
        told = ", ".join(f"process {rank}: {path or 'none'}" for rank, path in enumerate(found))
        raise InputError(
            f"--ckpt_path: not all processes go on from the same checkpoint ({told}); keep runs "
            "where all nodes see them (trainer.logger.init_args.save_dir), or give the path"
        )


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    if key in FILES and settings:
        paths = [settings] if isinstance(settings, str) else settings
        return [Path(path).expanduser().resolve() for path in paths]
    return settings


def _differ(then: Any, now: Any) -> bool:
    """Whether two settings do; a key that only one of two versions knows is no difference."""
    if isinstance(then, dict) and isinstance(now, dict):
        return any(_differ(then[key], now[key]) for key in then.keys() & now.keys())
    return bool(then != now)


def count_batches_as_the_loader(trainer: Trainer) -> None:
    """Sets the trainer's count of batches in an epoch to where a resumed loader goes on.

    With another number of processes the same prompts are another number of batches.
    """
    position = getattr(trainer.train_dataloader, "position", None)
    now: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if position is not None and now.ready != position:
        now.ready = now.started = now.processed = now.completed = position


def owes_evaluation(trainer: Trainer, evaluations: Sequence[Evaluation]) -> bool:
    """Whether an evaluation follows the present batch, or is going on, and is not among these."""
    loop, step = trainer.fit_loop.epoch_loop, trainer.global_step
    due = step > 0 and loop._should_check_val_fx(None)  # type: ignore[arg-type]
    return due and all(found.step != step for found in evaluations)


def make_up_evaluation(trainer: Trainer) -> None:
    """Makes the whole evaluation that a stop or a crash cut off.

    Lightning takes an evaluation for done that was to follow the step in which a checkpoint was
    made, and goes on in the middle of one that had begun.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = connector._first_loop_iter
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first
    loop.reset_restart_stage()


def warn_inside_window(trainer: Trainer) -> None:
    """Says that a checkpoint that is saved now is not one to go on from exactly."""
    if trainer.fit_loop.epoch_loop._should_accumulate():
        rank_zero_warn(
            "This checkpoint is saved inside an accumulation window, whose gradient is not in it: "
            "a run that goes on from it does so with the rest of the window only. Save at "
            "optimiser steps, with checkpoint.every_n_train_steps"
        )


def random_state() -> dict[str, Any]:
    """The state of all global random generators of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": random.getstate(),
        "numpy": [str(kind), keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts all global random generators back to a state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def rollout_state(
    micro_batches: Sequence[MicroBatch], seed: int, kept: Sequence[str]
) -> dict[str, Any]:
    """A rollout as plain values.

    Args:
        micro_batches: The rollout, as it is trained on.
        seed: With which it was made.
        kept: Fields of its tokens that cannot be computed again.
    """
    parts = [micro.rollout for micro in micro_batches]
    return {
        "seed": seed,
        "prompts": [_plain(prompt) for part in parts for prompt in part.prompts],
        "responses": [response for part in parts for response in part.responses],
        "truncated": [bool(cut) for part in parts for cut in part.truncated],
        "rows": [len(part) for part in parts],
        "kept": [
            {name: _own(getattr(micro.tokens, name)) for name in kept} for micro in micro_batches
        ],
        "scores": [_own(micro.scores) for micro in micro_batches],
    }


def rollout_from(state: dict[str, Any], pad_id: int, device: torch.device) -> Rollout:
    """The responses of :func:`rollout_state`."""
    prompts = [_prompt(values) for values in state["prompts"]]
    rollout = make_rollout(prompts, state["responses"], state["truncated"], pad_id)
    return rollout.to(device)


def with_kept(micro_batches: Sequence[MicroBatch], state: dict[str, Any]) -> list[MicroBatch]:
    """The same micro-batches with what :func:`rollout_state` kept of them.

    Raises:
        InputError: If the rollout was cut into other micro-batches.
    """
    sizes = [len(micro.rollout) for micro in micro_batches]
    if "rows" in state and sizes != state["rows"]:
        raise InputError(
            f"--ckpt_path: the checkpoint was made inside a rollout in micro-batches of "
            f"{state['rows']} responses, this run has {sizes}; set model.micro_batch_size and "
            "model.rollout.responses_per_prompt as they were, or take a checkpoint between two "
            "rollouts"
        )
    return [
        replace(
            micro,
            tokens=replace(micro.tokens, **_all_like(kept, micro)),
            scores=_like(scores, micro),
        )
        for micro, kept, scores in zip(micro_batches, state["kept"], state["scores"], strict=True)
    ]


def _own(values: Tensor | None) -> Tensor | None:
    """A copy in main memory, without the storage of the rest of the rollout."""
    return None if values is None else values.detach().cpu().clone()


def _all_like(saved: dict[str, Tensor | None], micro: MicroBatch) -> dict[str, Any]:
    return {name: _like(value, micro) for name, value in saved.items()}


def _like(saved: Tensor | None, micro: MicroBatch) -> Tensor | None:
    return None if saved is None else saved.to(micro.tokens.credit.device)


def _plain(prompt: Prompt) -> dict[str, Any]:
    return {
        "messages": [(m.role, m.content) for m in prompt.messages],
        "response": prompt.response,
        "complete": prompt.complete,
        "rejected": prompt.rejected,
        "rejected_complete": prompt.rejected_complete,
    }


def _prompt(values: dict[str, Any]) -> Prompt:
    messages = tuple(Message(role=role, content=text) for role, text in values["messages"])
    rest = {name: value for name, value in values.items() if name != "messages"}
    return Prompt(messages=messages, **rest)
