"""Pairs of replies for DPO: the only data modules whose labels training reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from iqstar.data.beavertails import BeaverTails
from iqstar.data.hh_rlhf import HHRLHF, parse_dialogue
from iqstar.data.jsonl import JSONL, has_prompt, is_complete, parse_messages, parse_row
from iqstar.data.reading import Row, find_files, read_file
from iqstar.data.turns import RowError, UnusableRowError, make_prompt
from iqstar.mdp import Message, Prompt

SIDES = ("chosen", "rejected")
"""Columns of the two replies."""


def with_pair(prompt: Prompt, chosen: str, rejected: str) -> Prompt:
    """The prompt with both replies.

    Raises:
        UnusableRowError: If one is empty, or both are the same.
    """
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        raise UnusableRowError("pair with an empty reply")
    if chosen == rejected:
        raise UnusableRowError("pair with equal replies")
    return replace(prompt, response=chosen, rejected=rejected)


class HHPairs(HHRLHF):
    """HH-RLHF's own pairs: chosen is preferred to rejected. One pair of each prompt is used."""

    def parse(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt with both final replies; rows whose prompts differ are skipped."""
        chosen, rejected = parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"])
        if chosen.turns != rejected.turns:
            raise UnusableRowError("pair whose prompts differ")
        return with_pair(make_prompt(chosen.turns), chosen.reply, rejected.reply)


class BeaverTailsPairs(BeaverTails):
    """BeaverTails: of each prompt its first safe response, preferred to its first unsafe one."""

    def rows(self) -> Iterator[Row]:
        """One row for each prompt that has both kinds of response; all others are left out.

        Its categories of harm are those of any of the prompt's rows: a safe response has none.
        """
        sides: dict[str, dict[bool, Row]] = {}
        harms: dict[str, dict[str, bool]] = {}
        for row in super().rows():
            prompt, safe = str(row.values["prompt"]).strip(), row.values["is_safe"]
            if not (isinstance(safe, bool) and isinstance(row.values["response"], str)):
                yield row  # for parse to refuse
                continue
            sides.setdefault(prompt, {}).setdefault(safe, row)
            category = row.values.get("category")
            if isinstance(category, Mapping):
                known = harms.setdefault(prompt, {})
                known |= {name: bool(here or known.get(name)) for name, here in category.items()}
        for prompt, found in sides.items():
            if len(found) == 2:
                safe, unsafe = found[True], found[False]
                values = {**safe.values, "rejected": unsafe.values["response"]}
                values |= {"category": harms[prompt]} if prompt in harms else {}
                yield replace(safe, values=values)

    def parse(self, row: Mapping[str, Any]) -> Prompt:
        """The question, with the safe answer before the unsafe one."""
        if not isinstance(row["is_safe"], bool):
            raise RowError(f"is_safe must be true or false, found {row['is_safe']!r}")
        if not isinstance(row["response"], str):
            raise RowError("response must be text")
        prompt = super().parse(row)
        return with_pair(prompt, prompt.response or "", row["rejected"])


class SafeRLHFPairs(JSONL):
    """PKU-SafeRLHF (hub: PKU-Alignment/PKU-SafeRLHF): the safer of two responses is preferred."""

    hub_id: ClassVar[str | None] = "PKU-Alignment/PKU-SafeRLHF"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("prompt", "response_0", "response_1", "safer_response_id"),
    )

    def hub_options(self) -> dict[str, Any]:
        """The training split, of the configuration that ``subset`` names."""
        return {"split": "train"} | ({"name": self.subset} if self.subset else {})

    def parse(self, row: Mapping[str, Any]) -> Prompt:
        """The question, with the safer answer before the other."""
        sides = [row["response_0"], row["response_1"]]
        if not all(isinstance(side, str) for side in sides):
            raise RowError("response_0 and response_1 must be text")
        if row["safer_response_id"] not in (0, 1):
            raise RowError(f"safer_response_id must be 0 or 1, found {row['safer_response_id']!r}")
        chosen = int(row["safer_response_id"])
        prompt = make_prompt([Message(role="user", content=str(row["prompt"]).strip())])
        return with_pair(prompt, sides[chosen], sides[1 - chosen])


class JSONLPairs(JSONL):
    """Your own pairs: rows of prompt (or messages), chosen and rejected.

    Each is text, or a list of {role, content}. A list of a reply may begin with the prompt, which
    need not be there a second time then. Replies are taken for whole ones and get an end of turn,
    which training then teaches. A row may have ``chosen_complete`` or ``rejected_complete``, false
    where a length limit cut the reply.

    Args:
        heldout_path: File of the prompts to evaluate on, whose rows need no pair; null holds some
            of the pairs out.
        shared: Those of :class:`iqstar.data.PromptDataModule`.
    """

    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("prompt", "chosen", "rejected"),
        ("messages", "chosen", "rejected"),
        ("chosen", "rejected"),
    )

    def __init__(self, heldout_path: str | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        self.heldout_path = heldout_path

    def heldout_rows(self) -> Iterator[Row] | None:
        """The rows of ``heldout_path``."""
        if self.heldout_path is None:
            return None
        files = find_files(self.heldout_path, "data.heldout_path")
        return (row for file in files for row in read_file(file))

    def parse(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt with both replies; a row without them, as in ``heldout_path``, as by JSONL."""
        if row.get("chosen") is None and row.get("rejected") is None:
            return parse_row(row)
        (*before, chosen), (*other, rejected) = (_talk(row, side) for side in SIDES)
        asked = parse_messages(row) if has_prompt(row) else before
        if not asked:
            raise RowError("no prompt; give one, or conversations for chosen and rejected")
        if any(turns and turns != asked for turns in (before, other)):
            raise UnusableRowError("pair whose prompts differ")
        prompt = with_pair(make_prompt(asked), chosen.content, rejected.content)
        whole, rejected_whole = (is_complete(row, f"{side}_complete") for side in SIDES)
        return replace(prompt, complete=whole, rejected_complete=rejected_whole)


def _talk(row: Mapping[str, Any], side: str) -> list[Message]:
    """A side's reply, last, and before it what stands there of the prompt, as TRL has it."""
    match row.get(side):
        case str(text):
            return [Message(role="assistant", content=text)]
        case [*_, {"role": "assistant"}] as turns:
            return parse_messages({"messages": turns})
        case other:
            raise RowError(
                f"{side} must be text, or messages up to one of the assistant, found {other!r:.60}"
            )
