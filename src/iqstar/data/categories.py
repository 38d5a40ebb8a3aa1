"""Categories of harm of prompts: a report groups by them, no prompt is chosen by them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain

from iqstar.data.base import PromptDataModule
from iqstar.data.turns import RowError, UnusableRowError, first_turn
from iqstar.mdp import Message, Prompt


def categories_by_prompt(
    data: PromptDataModule, prompts: Collection[Prompt]
) -> dict[tuple[Message, ...], frozenset[str]]:
    """Looks prompts up in the data set's rows.

    BeaverTails labels answers, several to a prompt: a prompt's categories are those that any of
    its answers falls into.

    Args:
        data: The data module that the prompts are from.
        prompts: Which to look up.

    Returns:
        Messages → categories, maybe none, for every prompt; empty if no row of them has any
        ``category``.
    """
    found: dict[tuple[Message, ...], set[str]] = {p.messages: set() for p in prompts}
    labelled = False
    for row in chain(data.rows(), data.heldout_rows() or ()):
        category = row.values.get("category")
        if not isinstance(category, Mapping):
            continue
        try:
            prompt = data.parse(row.values)
            messages = (first_turn(prompt) if data.first_turn_only else prompt).messages
        except (RowError, UnusableRowError):
            continue
        if messages in found:
            labelled = True
            found[messages] |= {str(name) for name, present in category.items() if present}
    return {key: frozenset(names) for key, names in found.items()} if labelled else {}
