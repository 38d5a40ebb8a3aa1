"""Pure functions on conversations, shared by the data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from iqstar.mdp import Message, Prompt

HeldOut = int | Literal["auto"] | None
"""A number of prompts to hold out; None for all."""
HELDOUT = 64
"""What ``auto`` stands for where there are prompts enough."""
NO_ROOM = "over {} tokens, response and principle pass the model's positions"
"""Why a prompt is left out that is longer than the module's ``prompt_room``."""


class RowError(ValueError):
    """A row that is not what its data set promises: fatal in a local file, where it can be fixed.

    Rows of the hub's own files are skipped and counted instead.
    """


class UnusableRowError(ValueError):
    """A row of a kind that the real files contain, but which is no prompt: skipped and counted."""


def merge_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Joins consecutive turns of one role by a blank line: chat templates want them to alternate.

    Empty turns vanish where they can be merged; elsewhere they stay, for the caller to see.
    """
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            parts = [merged[-1].content, message.content]
            merged[-1] = Message(role=message.role, content="\n\n".join(p for p in parts if p))
        else:
            merged.append(message)
    return tuple(merged)


def has_same_role(messages: Sequence[Message]) -> bool:
    """Whether two consecutive turns have the same role."""
    return any(a.role == b.role for a, b in pairwise(messages))


def make_prompt(messages: Sequence[Message], response: str | None = None) -> Prompt:
    """A prompt of these turns, checked.

    Raises:
        RowError: If the user says nothing at all.
        UnusableRowError: If it does not start and end with the user, or a turn is empty.
    """
    if not any(m.content for m in messages if m.role == "user"):
        raise RowError("the prompt is empty; remove the row or fill in the user's turn")
    merged = merge_turns(messages)
    talk = [m for m in merged if m.role != "system"]
    if any(m.role == "system" for m in merged[1:]):
        raise UnusableRowError("system turn inside the conversation")
    if talk[-1].role != "user":
        raise UnusableRowError("prompt ends with an assistant turn")
    if talk[0].role != "user":
        raise UnusableRowError("prompt starts with an assistant turn")
    if not all(m.content for m in merged):
        raise UnusableRowError("prompt with an empty turn")
    return Prompt(messages=merged, response=response or None)


def first_turn(prompt: Prompt) -> Prompt:
    """The prompt up to its first human turn; the reply it got there becomes the response.

    Raises:
        UnusableRowError: If it loses its pair of replies, which are to a later turn.
    """
    cut = next(i for i, m in enumerate(prompt.messages) if m.role == "user") + 1
    if cut == len(prompt.messages):
        return prompt
    if prompt.rejected is not None:
        raise UnusableRowError("pair of a later turn")
    return Prompt(messages=prompt.messages[:cut], response=prompt.messages[cut].content)


def count_chars(prompt: Prompt) -> int:
    """Characters of all human and assistant turns."""
    return sum(len(m.content) for m in prompt.messages if m.role != "system")


def split_key(prompt: Prompt, seed: int) -> bytes:
    """A pseudo-random key that depends on the seed and on how the conversation opens, only.

    Conversations that open alike (up to case and spaces) have the same key, so that a split by
    key puts a conversation and its own continuation on the same side.
    """
    opening = next(m.content for m in prompt.messages if m.role == "user")
    text = json.dumps([seed, " ".join(opening.casefold().split())])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def heldout_size(wanted: HeldOut, prompts: int = 2 * HELDOUT) -> int | None:
    """How many prompts to hold out; None for all.

    Args:
        wanted: As set.
        prompts: How many are to be split; ``auto`` takes half of them at most.
    """
    return min(HELDOUT, (prompts + 1) // 2) if wanted == "auto" else wanted


def split_prompts(
    prompts: Sequence[Prompt], size: int | None, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Held-out and training prompts, both in the order of :func:`split_key`.

    Args:
        prompts: Distinct prompts.
        size: Number of prompts to hold out (as many as there are, at most); None for all.
        seed: Seed of the split.

    Returns:
        The two sides. A prompt that opens like the last held-out one is on neither.
    """
    ordered = sorted(prompts, key=lambda prompt: split_key(prompt, seed))
    heldout = ordered[:size]
    last = split_key(heldout[-1], seed) if heldout else None
    return heldout, [p for p in ordered[len(heldout) :] if split_key(p, seed) != last]
