"""Scores a rollout under a frozen model, told a principle or not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iqstar.distributions import HeadDistributions
from iqstar.errors import InputError
from iqstar.head import LanguageHead
from iqstar.mdp import Rollout, TokenSequences, pack
from iqstar.policy import CausalLM, Policy
from iqstar.prefixes import KnownContexts

KEPT, KEPT_BYTES = 4, 2**28
"""Keys and values are kept of so many micro-batches, and of more while they are fewer bytes.

Those of 4 are less than what autograd will keep of one, when they are gone.
"""


class RolloutScorer:
    """Frozen scoring of one rollout, in the micro-batches in which the policy will be trained.

    The rows that are scored together, their padding and their order are those of training, so
    that equal weights give equal bits (method §7, identity 3).

    Args:
        policy: The policy and its reference.
        micro_batches: The rollout's rows, as training will meet them.
        temperature: That of all scoring.
    """

    def __init__(
        self, policy: Policy, micro_batches: Sequence[Rollout], temperature: float = 1.0
    ) -> None:
        self.policy = policy
        self.micro_batches = tuple(micro_batches)
        self.temperature = temperature
        self.sequences = tuple(
            pack_prompts(policy.actor, rollout) for rollout in self.micro_batches
        )
        self._heads: dict[int, LanguageHead] = {}
        self._known: list[KnownContexts | None] = []

    @property
    def tokens(self) -> int:
        """Number of response tokens in the rollout."""
        return sum(len(s.predictors) for s in self.sequences)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Start and stop of each micro-batch on the axis of all response tokens."""
        return list(pairwise(accumulate((len(s.predictors) for s in self.sequences), initial=0)))

    def reference(self) -> HeadDistributions:
        """π_ref at every response token, given the unmodified prompts."""
        with self.policy.reference() as model:
            return self._score(model, self.sequences, self._known)

    def unconditioned(self, model: CausalLM) -> HeadDistributions:
        """Another frozen model of the same vocabulary, given the unmodified prompts."""
        return self._score(model, [pack_prompts(model, part) for part in self.micro_batches])

    def conditioned(
        self, principle: str | Sequence[str], placement: str, model: CausalLM | None = None
    ) -> HeadDistributions:
        """A frozen model at every response token, told a principle.

        The reference goes on from what it has read of each prompt before the principle.

        Args:
            principle: The text, never cut; or one for each row of the rollout.
            placement: Where it goes (:meth:`iqstar.chat.ChatFormat.prompt_ids`).
            model: Another frozen model of the same vocabulary; None for the reference.
        """
        with self.policy.reference() as reference:
            chosen = model or reference
            sizes = [len(part) for part in self.micro_batches]
            texts = iter([principle] * sum(sizes) if isinstance(principle, str) else principle)
            packed = [
                pack_prompts(chosen, part, list(islice(texts, size)), placement)
                for part, size in zip(self.micro_batches, sizes, strict=True)
            ]
            return self._score(chosen, packed, self._known if chosen is reference else None)

    @torch.no_grad()
    def behaviour(self) -> Float[Tensor, " tokens"]:
        """Log π_θ of the response tokens at the current weights, by our own scoring."""
        parts = self._score(self.policy.actor, self.sequences)
        return torch.cat(
            [
                parts.window(start, stop).at(rollout.actions)
                for rollout, (start, stop) in zip(self.micro_batches, self.spans, strict=True)
            ]
        )

    @torch.no_grad()
    def _score(
        self,
        model: CausalLM,
        sequences: Sequence[TokenSequences],
        known: list[KnownContexts | None] | None = None,
    ) -> HeadDistributions:
        """Distributions of a model; fills ``known`` if it is empty, and starts from it if not."""
        states: list[Tensor] = []
        filling, held = known == [], 0
        for number, packed in enumerate(sequences):
            if known is None or not (model.sharing and packed.contexts):
                states.append(model.hidden(packed))
                continue
            keep = filling and (number < KEPT or held < KEPT_BYTES)
            hidden, keys = model.hidden_and_keys(packed, None if filling else known[number], keep)
            states.append(hidden)
            if filling:
                known.append(keys if keep else None)
                held += keys.keys.nbytes if keep else 0
        if id(model) not in self._heads:
            self._heads[id(model)] = model.frozen_head(self.temperature)
        return HeadDistributions(torch.cat(states), self._heads[id(model)])


def pack_prompts(
    model: CausalLM,
    rollout: Rollout,
    principles: Sequence[str] | None = None,
    placement: str = "after_user",
) -> TokenSequences:
    """Model inputs of a rollout's rows, its prompts rendered with or without principles.

    Args:
        model: Whose chat format renders them.
        rollout: The rows.
        principles: One for each row.
        placement: Where they go.

    Raises:
        InputError: If a row is longer than the model's positions.
    """
    chat = model.chat
    told: Sequence[str | None] = principles or [None] * len(rollout)
    contexts = [
        chat.prompt_ids(prompt.messages, text, placement)
        for prompt, text in zip(rollout.prompts, told, strict=True)
    ]
    sequences = pack(contexts, rollout, chat.pad_id)
    longest = sequences.input_ids.shape[1]
    if model.max_tokens is not None and longest > model.max_tokens:
        also = " with its principle" if principles else ""
        raise InputError(
            f"data.max_prompt_tokens: a prompt{also} and its response make {longest} tokens, more "
            f"than the model's {model.max_tokens} positions; lower data.max_prompt_tokens or the "
            "rollout's max_new_tokens"
        )
    return sequences


def token_positions(rollout: Rollout) -> Int[Tensor, " tokens"]:
    """Position of each response token in its response, from 0."""
    time = torch.arange(rollout.response_ids.shape[1], device=rollout.response_ids.device)
    return time.expand_as(rollout.response_ids)[rollout.response_mask]
