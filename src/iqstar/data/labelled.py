"""Responses with the labels that people gave them: for evaluation, no method trains on them.

Reads the files that ``iqstar probe`` and ``iqstar harm-judge`` take: pairs of a chosen and a
rejected reply (HH-RLHF), or answers that are safe or not (BeaverTails).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iqstar.data.hh_rlhf import parse_dialogue
from iqstar.data.reading import SUFFIXES, Row, find_files, read_file
from iqstar.data.turns import RowError, UnusableRowError, make_prompt, split_key
from iqstar.errors import InputError
from iqstar.mdp import Message, Prompt

Kind = Literal["pairs", "answers"]
LAYOUTS: dict[Kind, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "answers": ("prompt", "response", "is_safe"),
}
"""The columns by which each kind of row is known."""


@dataclass(frozen=True, kw_only=True)
class LabelledItem:
    """What is compared, drawn and dropped as one: a pair, or an answer.

    Args:
        responses: The chosen reply and the rejected one, or the one answer, each with its prompt.
        safe: Whether the answer is safe; None for a pair.
        harms: The categories of harm that the answer falls into.
    """

    responses: tuple[Prompt, ...]
    safe: bool | None = None
    harms: tuple[str, ...] = ()

    @property
    def key(self) -> bytes:
        """A hash of prompt and responses; which of two was chosen does not show in it."""
        turns = [[m.role, m.content] for m in self.responses[0].messages]
        text = json.dumps([turns, sorted(str(r.response) for r in self.responses)])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    @property
    def opening(self) -> bytes:
        """Equal for conversations that open alike; these resemble each other."""
        return split_key(self.responses[0], 0)


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """All items of some files.

    Args:
        kind: What they are.
        items: Distinct ones, in an order that depends on their texts and on no label.
        rows: Number of rows read.
        dropped: Why rows are no items, and how many.
    """

    kind: Kind
    items: tuple[LabelledItem, ...]
    rows: int
    dropped: Mapping[str, int]


def read_labelled(path: str) -> LabelledSet:
    """Reads labelled rows; their layout is known by the columns of the first.

    Args:
        path: A file of rows, or a folder of such files.

    Raises:
        InputError: If a file cannot be read, or a row is malformed or laid out otherwise.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"--data: no such file or folder: {path}; give labelled rows")
    if place.is_file() and not place.name.endswith(SUFFIXES):
        raise InputError(f"--data: cannot read {path}; give a file that ends in "
                         + ", ".join(SUFFIXES))  # fmt: skip
    kind: Kind | None = None
    items: dict[bytes, LabelledItem] = {}
    dropped: Counter[str] = Counter()
    rows = 0
    for row in (row for file in find_files(path, "--data") for row in read_file(file)):
        rows += 1
        found = _kind(row)
        if kind is not None and found != kind:
            raise InputError(f"{row.place}: this row has {' + '.join(LAYOUTS[found])}, those before"
                             " it have not; give one data set at a time to --data")  # fmt: skip
        kind = found
        try:
            item = pair(row.values) if kind == "pairs" else answer(row.values)
        except UnusableRowError as reason:
            dropped[str(reason)] += 1
        except RowError as error:
            raise InputError(f"{row.place}: {error}") from error
        else:
            dropped["repeats an earlier row"] += item.key in items
            items.setdefault(item.key, item)
    assert kind is not None, "read_file raises where there is no row"
    ordered = tuple(items[key] for key in sorted(items))
    counts = {reason: count for reason, count in sorted(dropped.items()) if count}
    return LabelledSet(kind=kind, items=ordered, rows=rows, dropped=counts)


def pair(row: Mapping[str, Any]) -> LabelledItem:
    """A pair of HH-RLHF whose two replies differ and answer the same conversation.

    Raises:
        RowError: If a side is no dialogue.
        UnusableRowError: If the two sides cannot be compared.
    """
    chosen, rejected = parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"])
    if chosen.turns != rejected.turns:
        raise UnusableRowError("the two prompts differ")
    if not (chosen.reply and rejected.reply):
        raise UnusableRowError("empty response")
    if chosen.reply == rejected.reply:
        raise UnusableRowError("equal sides")
    sides = (chosen, rejected)
    return LabelledItem(responses=tuple(make_prompt(side.turns, side.reply) for side in sides))


def answer(row: Mapping[str, Any]) -> LabelledItem:
    """An answer of BeaverTails, with its labels.

    Raises:
        RowError: If a value is of another type.
        UnusableRowError: If the answer or the question is empty.
    """
    prompt, response, safe = row["prompt"], row["response"], row["is_safe"]
    harms = row.get("category") or {}
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise RowError("prompt and response must be text")
    if not isinstance(safe, bool):
        raise RowError(f"is_safe must be true or false, found {safe!r}")
    if not isinstance(harms, Mapping):
        raise RowError("category must map the name of each harm to true or false")
    if not prompt.strip():
        raise UnusableRowError("empty question")
    if not response.strip():
        raise UnusableRowError("empty response")
    messages = [Message(role="user", content=prompt.strip())]
    return LabelledItem(
        responses=(make_prompt(messages, response.strip()),),
        safe=safe,
        harms=tuple(name for name, present in harms.items() if present),
    )


def _kind(row: Row) -> Kind:
    present = {name for name, value in row.values.items() if value is not None}
    for kind, layout in LAYOUTS.items():
        if present.issuperset(layout):
            return kind
    raise InputError(
        f"{row.place}: unknown column layout: found {', '.join(sorted(present)) or 'nothing'}; "
        f"--data expects {' or '.join(' + '.join(layout) for layout in LAYOUTS.values())}: rename "
        "the columns or give another file"
    )
