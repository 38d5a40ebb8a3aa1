"""Training on credits that were computed before (``iqstar score``), without frozen models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from iqstar.credit_file import AGAIN, CreditFile
from iqstar.errors import InputError
from iqstar.losses import TokenLoss
from iqstar.mdp import Prompt, Rollout, TokenCredits
from iqstar.policy import CausalLM, Policy
from iqstar.resume import frozen_fingerprints
from iqstar.rollouts import DatasetRollout


class ScoredRollout(DatasetRollout):
    """Replays the data set's own responses, with credits from a file that iqstar score wrote.

    No frozen model scores anything in training. The file has the credits of the responses' tokens
    and no distributions: the loss must be one of sampled tokens, such as RewardImitationLoss.

    Args:
        path: The file, written for the same model, estimator, temperature, precision and data.
        max_new_tokens: Length limit of a response; at most the one that the file was made with.
    """

    credits_known = True

    def __init__(self, path: str, max_new_tokens: int = 64) -> None:
        super().__init__(max_new_tokens)
        self.path = Path(path).expanduser()
        self._file: CreditFile | None = None

    def setup(
        self,
        policy: Policy,
        estimator: nn.Module,
        loss: TokenLoss,
        temperature: float,
        precision: str,
    ) -> None:
        """See :meth:`iqstar.engine.RolloutEngine.setup`.

        Raises:
            InputError: If the file cannot be read, or has the credits of something else.
        """
        if loss.needs_distribution:
            raise InputError(
                f"model.loss: {type(loss).__name__} compares whole distributions, but "
                f"{self.path} has the credits of the responses' own tokens only; use "
                "RewardImitationLoss, or DatasetRollout in place of ScoredRollout"
            )
        file = CreditFile(self.path)
        check_origin(file, origin(policy, estimator, temperature, precision))
        limit = file.about["max_new_tokens"]
        if self.max_new_tokens > limit:
            raise InputError(
                f"model.rollout.init_args.max_new_tokens: {self.max_new_tokens}, but the responses "
                f"of {self.path} were cut at {limit} tokens; set {limit} or less, or {AGAIN}"
            )
        self._file = file

    def needs_reference(self, trainer: Trainer) -> bool:
        """Training does not need it; evaluation does, for its KL."""
        return trainer.state.fn != TrainerFn.FITTING or trainer.limit_val_batches > 0

    def roll_out(
        self, policy: Policy, prompts: Sequence[Prompt], temperature: float, seed: int
    ) -> Rollout:
        """See :meth:`iqstar.engine.RolloutEngine.roll_out`."""
        if self._file is None:
            raise InputError(
                "model.rollout: a ScoredRollout inside another engine is scored as all else there; "
                "write DatasetRollout, or use ScoredRollout alone"
            )
        return super().roll_out(policy, prompts, temperature, seed)

    def known_credits(self, rollout: Rollout) -> TokenCredits:
        """See :meth:`iqstar.engine.RolloutEngine.known_credits`."""
        assert self._file is not None
        rows = [
            self._file.of(prompt, ids[mask].tolist())
            for prompt, ids, mask in zip(
                rollout.prompts, rollout.response_ids, rollout.response_mask, strict=True
            )
        ]
        device = rollout.response_ids.device
        reference, credit = (
            torch.from_numpy(np.concatenate(parts)).to(device) for parts in zip(*rows, strict=True)
        )
        return TokenCredits(
            actions=rollout.actions,
            reference=reference,
            credit=credit,
            weight=torch.ones_like(reference),
        )


def origin(
    policy: Policy, estimator: nn.Module, temperature: float, precision: str
) -> dict[str, str]:
    """All that decides the credit of a given response, under the keys of the YAML.

    Args:
        policy: The policy and its reference.
        estimator: Of the optimal policy, after its set-up.
        temperature: Of scoring.
        precision: The trainer's.
    """
    chat = policy.actor.chat
    template = chat.template or chat.tokenizer.chat_template
    frozen = frozen_fingerprints(policy, estimator)
    return {
        "model.policy.model": frozen.pop("reference"),
        "vocabulary": digest(sorted(chat.tokenizer.get_vocab().items())),
        "model.policy.chat_template": digest([template, chat.end_of_turn]),
        "model.temperature": repr(float(temperature)),
        "trainer.precision": precision,
        **dict(estimator_settings(estimator)),
        **{f"model.{role} (weights)": value for role, value in frozen.items()},
    }


def check_origin(file: CreditFile, here: Mapping[str, str]) -> None:
    """Checks that the credits of a file are those of a run.

    Args:
        file: The file.
        here: The run's :func:`origin`.

    Raises:
        InputError: If they are of another model, estimator, temperature or precision.
    """
    there = file.about["origin"]
    for key in [*here, *(key for key in there if key not in here)]:
        then, now = (_short(side.get(key, "nothing")) for side in (there, here))
        if there.get(key) != here.get(key):
            raise InputError(
                f"{key}: the credits of {file.path} were made with {then}, this run has {now}; "
                f"set it as it was there, or {AGAIN}"
            )


def estimator_settings(
    estimator: nn.Module, key: str = "model.estimator"
) -> Iterator[tuple[str, str]]:
    """Class and plain settings of an estimator and of those inside it, under the YAML's keys."""
    yield key, f"{type(estimator).__module__}.{type(estimator).__qualname__}"
    for name, value in vars(estimator).items():
        entries = value if isinstance(value, dict) else {name: value}
        if not name.startswith("_") and name != "training":
            yield from ((f"{key}.{entry}", repr(v)) for entry, v in entries.items() if _plain(v))
    for name, child in estimator.named_children():
        if not isinstance(child, CausalLM):
            yield from estimator_settings(child, f"{key}.{name}")


def digest(value: Any) -> str:
    """SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"
