"""Prompts of one's own, from JSON lines (or parquet)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, get_args

from iqstar.data.base import PromptDataModule
from iqstar.data.turns import RowError, has_same_role, make_prompt
from iqstar.mdp import Message, Prompt, Role


def parse_row(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row of ``prompt``, ``prompt`` + ``response``, or ``messages``.

    A prompt may be a list of messages too. A final assistant message is the response. Where a
    length limit cut it, ``complete`` is false: it gets no end of turn then.

    Raises:
        RowError: If a value has another type, a role is unknown, the prompt is empty, or there are
            two responses.
    """
    messages, response = parse_messages(row), row.get("response")
    if response is not None and not isinstance(response, str):
        raise RowError(f"response must be text, found {type(response).__name__}")
    if messages and messages[-1].role == "assistant":
        *messages, last = messages
        if response and response.strip() != last.content:
            raise RowError("the messages end with another response than response; keep one of them")
        response = last.content
    prompt = make_prompt(messages, (response or "").strip())
    return replace(prompt, complete=is_complete(row, "complete"))


def is_complete(row: Mapping[str, Any], column: str) -> bool:
    """Whether a reply ended by itself, as all do that do not say otherwise.

    Raises:
        RowError: If the column holds anything but true, false or null.
    """
    value = row.get(column)
    if value is not None and not isinstance(value, bool):
        raise RowError(f"{column} must be true or false, found {value!r}")
    return value is not False


def has_prompt(row: Mapping[str, Any]) -> bool:
    """Whether a row has its prompt apart from its replies."""
    return row.get("prompt") is not None or row.get("messages") is not None


def parse_messages(row: Mapping[str, Any]) -> list[Message]:
    """The turns as written, whichever layout the row has."""
    name = "prompt" if row.get("messages") is None else "messages"
    turns = row.get(name)
    if name == "prompt" and isinstance(turns, str):
        return [Message(role="user", content=turns.strip())]
    if turns is None:
        raise RowError(f"no prompt; the row has {', '.join(map(repr, row)) or 'no columns'}")
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        text = "text or " if name == "prompt" else ""
        raise RowError(f"{name} must be {text}a list of {{role, content}}")
    messages = []
    for turn in turns:
        role, content = turn.get("role"), turn.get("content")
        if role not in get_args(Role):
            raise RowError(f"unknown role {role!r}; use {', '.join(get_args(Role))}")
        if not isinstance(content, str):
            raise RowError(f"the content of a {role} message must be text")
        messages.append(Message(role=role, content=content.strip()))
    return messages


def audit_prompts(
    rows: Sequence[Mapping[str, Any]], parse: Callable[[Mapping[str, Any]], Prompt] = parse_row
) -> dict[str, Any]:
    """Counts over rows of prompts; a row is ``usable`` if a prompt can be made of it.

    ``duplicates`` are rows whose prompt and replies stood in an earlier row.

    Args:
        rows: As they stand in the file.
        parse: Makes the prompt of a row.
    """
    usable, malformed = [], 0
    multi_turn = same_role = 0
    for row in rows:
        try:
            prompt = parse(row)
        except ValueError:
            malformed += 1
            continue
        usable.append(prompt)
        turns = parse_messages(row) if has_prompt(row) else prompt.messages
        multi_turn += sum(m.role == "user" for m in turns) > 1
        same_role += has_same_role(turns)
    return {
        "rows": len(rows),
        "usable": len(usable),
        "prompts": len({p.messages for p in usable}),
        "multi_turn": multi_turn,
        "same_role": same_role,
        "duplicates": len(usable) - len({(p.messages, p.response, p.rejected) for p in usable}),
        "details": {
            "unusable": malformed,
            "with_response": sum(p.response is not None for p in usable),
        },
    }


class JSONL(PromptDataModule):
    """Your own prompts: rows of prompt, of prompt and response, or of messages.

    messages is a list of {role, content} with the roles system, user and assistant, and so may
    prompt be; a final assistant message is the response, which only data-set replay uses. It is
    taken for a whole one and gets an end of turn, unless the row has ``complete: false``.
    """

    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt",), ("messages",))

    def parse(self, row: Mapping[str, Any]) -> Prompt:
        """See :func:`parse_row`."""
        return parse_row(row)

    def summarize(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See :func:`audit_prompts`."""
        return audit_prompts(rows, self.parse)
