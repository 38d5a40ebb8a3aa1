"""Anthropic's HH-RLHF: pairs of dialogues, a chosen and a rejected one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from iqstar.data.base import PromptDataModule
from iqstar.data.report import quantiles
from iqstar.data.turns import RowError, has_same_role, make_prompt
from iqstar.mdp import Message, Prompt

_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES: dict[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """One side of a pair.

    Args:
        turns: Every turn before the final reply, as written: roles may repeat, turns be empty.
        reply: The final reply.
    """

    turns: tuple[Message, ...]
    reply: str


def parse_dialogue(text: str) -> Dialogue:
    r"""Splits a dialogue at its last ``\n\nAssistant:``; all before it is the prompt.

    Raises:
        RowError: If there is no assistant turn, or the text does not start with a role.
    """
    if not isinstance(text, str):
        raise RowError(f"a dialogue must be text, found {type(text).__name__}")
    before, marker, reply = text.rpartition("\n\nAssistant:")
    if not marker:
        raise RowError(r"no assistant turn (\n\nAssistant:) in the dialogue; remove the row")
    lead, *parts = _MARKER.split(before)
    if lead.strip():
        raise RowError(r"the dialogue does not start with \n\nHuman:; remove the row")
    turns = tuple(
        Message(role=_ROLES[role], content=content.strip())
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    )
    return Dialogue(turns=turns, reply=reply.strip())


def audit_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over (chosen, rejected) rows.

    ``multi_turn`` (more than one human turn) and ``same_role`` (two consecutive turns of one
    role, the final reply included) are counted in chosen; a pair is ``usable`` if its prompts
    agree and neither reply is empty; ``prompts`` are the distinct ones of chosen.
    """
    total = dict.fromkeys(
        ["usable", "multi_turn", "differing_prompts", "empty_chosen", "same_role"], 0
    )
    details = dict.fromkeys(["empty_rejected", "same_first_char", "prefix_pairs", "malformed"], 0)
    prompts, pairs = set(), set()
    reply_chars: list[int] = []
    for row in rows:
        try:
            chosen, rejected = parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"])
        except RowError:
            details["malformed"] += 1
            continue
        a, b = chosen.reply, rejected.reply
        final = Message(role="assistant", content=a)
        differing = chosen.turns != rejected.turns
        total["multi_turn"] += sum(m.role == "user" for m in chosen.turns) > 1
        total["same_role"] += has_same_role([*chosen.turns, final])
        total["differing_prompts"] += differing
        total["empty_chosen"] += not a
        details["empty_rejected"] += not b
        prompts.add(chosen.turns)
        pairs.add((row["chosen"], row["rejected"]))
        reply_chars += [len(a), len(b)]
        if not differing and a and b:
            total["usable"] += 1
            details["same_first_char"] += a[0] == b[0]
            details["prefix_pairs"] += a.startswith(b) or b.startswith(a)
    return {
        "rows": len(rows),
        "usable": total.pop("usable"),
        "prompts": len(prompts),
        **total,
        "duplicates": len(rows) - details["malformed"] - len(pairs),
        "details": {**details, "reply_chars": quantiles(reply_chars) if reply_chars else {}},
    }


class HHRLHF(PromptDataModule):
    r"""Anthropic's HH-RLHF (hub: Anthropic/hh-rlhf): rows of chosen and rejected.

    The prompt is the chosen dialogue up to its last ``\n\nAssistant:``, every turn a message;
    a differing prompt of the rejected one is ignored. Consecutive turns of one role are joined by
    a blank line. A prompt that ends with an assistant turn is skipped and counted.
    """

    hub_id: ClassVar[str | None] = "Anthropic/hh-rlhf"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("chosen", "rejected"),)

    def hub_options(self) -> dict[str, Any]:
        """The training split, of one folder if ``subset`` names it."""
        return {"split": "train"} | ({"data_dir": self.subset} if self.subset else {})

    def parse(self, row: Mapping[str, Any]) -> Prompt:
        """The chosen dialogue's prompt, with the chosen reply for replay."""
        parse_dialogue(row["rejected"])  # a pair is well formed or not as a whole
        chosen = parse_dialogue(row["chosen"])
        return make_prompt(chosen.turns, chosen.reply)

    def summarize(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See :func:`audit_pairs`."""
        return audit_pairs(rows)
