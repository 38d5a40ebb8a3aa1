"""BeaverTails: questions, answers, and whether the answer is safe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from iqstar.data.base import PromptDataModule
from iqstar.data.report import quantiles
from iqstar.data.turns import RowError, make_prompt
from iqstar.mdp import Message, Prompt


def audit_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over (prompt, response, is_safe, category) rows.

    ``duplicates`` are rows whose (prompt, response) stood in an earlier row; a row is ``usable``
    if it is none of them and its response is not empty. ``no_label`` are those whose is_safe is
    neither true nor false, such as text.
    """
    seen: set[tuple[str, str]] = set()
    usable = 0
    harms: Counter[str] = Counter()
    for row in rows:
        key = (str(row["prompt"]), str(row["response"]))
        usable += key not in seen and bool(key[1].strip())
        seen.add(key)
        categories = row.get("category")
        if isinstance(categories, Mapping):
            harms.update(name for name, present in categories.items() if present)
    return {
        "rows": len(rows),
        "usable": usable,
        "prompts": len({prompt.strip() for prompt, _ in seen}),
        "duplicates": len(rows) - len(seen),
        "safe": sum(row["is_safe"] is True for row in rows),
        "details": {
            "harm_categories": dict(harms.most_common()),
            "no_label": sum(not isinstance(row["is_safe"], bool) for row in rows),
            "empty_response": sum(not str(row["response"]).strip() for row in rows),
            "response_chars": quantiles([len(response) for _, response in seen]) if seen else {},
        },
    }


class BeaverTails(PromptDataModule):
    """BeaverTails (hub: PKU-Alignment/BeaverTails): rows of prompt, response, category, is_safe.

    Every prompt comes with several responses; it is used once. Safety labels are only audited.
    """

    hub_id: ClassVar[str | None] = "PKU-Alignment/BeaverTails"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "response", "is_safe"),)

    def hub_options(self) -> dict[str, Any]:
        """The split that ``subset`` names."""
        return {"split": self.subset or "30k_train"}

    def parse(self, row: Mapping[str, Any]) -> Prompt:
        """The question, with the row's answer for replay."""
        prompt, response = row["prompt"], row["response"]
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise RowError("prompt and response must be text")
        return make_prompt([Message(role="user", content=prompt.strip())], response.strip())

    def summarize(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See :func:`audit_answers`."""
        return audit_answers(rows)
