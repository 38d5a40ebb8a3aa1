"""Rows of unequal length as one line of tokens, so that nothing is computed for padding.

All layers but attention treat each token by itself. They are given the real tokens of all rows one
after another, as a batch of one row. Attention takes rows of similar length together, in groups,
and puts its output into the line again (docs/decisions/023-padding-free.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from iqstar.mdp import length_mask

WASTED = 2**14
"""Scores of padding in a group, at most: they cost about what one more group does."""
SCORES = 2**19
"""Queries times keys of one head, at most, in a group of several rows: few megabytes."""
LEAST = torch.finfo(torch.bfloat16).min
"""Added to the score of a key that a query may not see."""

KeysAndValues = tuple[Tensor, Tensor]
"""Of a layer, each ``(rows, groups, tokens, size)``."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(queries, keys, values, mask) of rows → the output, ``(rows, heads, queries, size)``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Where tokens lie in rows that are padded on the right.

    Args:
        count: Number of rows.
        width: Tokens of the longest one.
        row: Of each token, its row.
        column: Of each token, its place there.
    """

    count: int
    width: int
    row: Int[Tensor, " tokens"]
    column: Int[Tensor, " tokens"]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Rows:
        """Those of so many tokens each, row by row."""
        width = max(lengths)
        row, column = length_mask(lengths, width).nonzero().to(device).unbind(1)
        return cls(count=len(lengths), width=width, row=row, column=column)

    def apart(
        self, states: Float[Tensor, "tokens heads size"]
    ) -> Float[Tensor, "count heads width size"]:
        """What belongs to the tokens, in rows, with zeros at padding."""
        rows: Tensor = _Apart.apply(states, self)
        return rows

    def together(
        self, states: Float[Tensor, "count heads width size"]
    ) -> Float[Tensor, "tokens heads size"]:
        """What belongs to the tokens, out of rows."""
        tokens: Tensor = _Together.apply(states, self)
        return tokens


class Group:
    """Rows that attention takes together.

    Args:
        numbers: Which of all rows.
        lengths: Number of tokens of each.
        done: Number of tokens before these of each.
        device: Where the model computes.

    Attributes:
        rows: Where the tokens lie in the group's rows.
        past: Tokens before these, padded.
        mask: What is added to the scores, so that tokens see real ones before them only;
            ``(rows or 1, 1, width, past + width)``.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        lengths: Sequence[int],
        done: Sequence[int],
        device: torch.device,
    ) -> None:
        self.numbers = torch.tensor(numbers, device=device)
        self.rows = Rows.of(lengths, device)
        self.past = max(done)
        width, keys = self.rows.width, self.past + self.rows.width
        known = torch.tensor(done if len(set(done)) > 1 else done[:1], device=device)
        mask = torch.full((width, keys), LEAST, dtype=torch.float32, device=device)
        mask = mask.triu(self.past + 1)
        self.mask: Tensor = mask.repeat(len(known), 1, 1, 1)
        missing = torch.arange(self.past, device=device) >= known[:, None]
        self.mask[..., : self.past].masked_fill_(missing[:, None, None], LEAST)


class Line:
    """The tokens of several rows, group by group.

    Args:
        lengths: Number of tokens of each row.
        device: Where the model computes.
        done: Number of tokens before these of each row; null for none.
        past: Their keys and values at every layer, padded on the right.
        keep: Whether to keep all keys and values.

    Attributes:
        starts: Place in the line of each row's first token.
        kept: If asked for, keys and values of the past and the line by layer, in rows.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        done: Sequence[int] | None = None,
        past: Sequence[KeysAndValues] = (),
        keep: bool = False,
    ) -> None:
        done = done or [0] * len(lengths)
        chosen = grouped(lengths, done)
        self.groups = [
            Group(rows, [lengths[r] for r in rows], [done[r] for r in rows], device)
            for rows in chosen
        ]
        order = [row for rows in chosen for row in rows]
        starts = dict(zip(order, accumulate((lengths[r] for r in order), initial=0), strict=False))
        self.starts = torch.tensor([starts.get(r, 0) for r in range(len(lengths))], device=device)
        self.rows = Rows(
            count=len(lengths),
            width=max(lengths),
            row=torch.cat([group.numbers[group.rows.row] for group in self.groups]),
            column=torch.cat([group.rows.column for group in self.groups]),
        )
        self.positions = torch.tensor(done, device=device)[self.rows.row] + self.rows.column
        self.kept: dict[int, KeysAndValues] = {}
        self._past, self._keep = past, keep
        self._attended: set[int] = set()

    def states(self, model: Any, ids: Int[Tensor, "rows width"]) -> Float[Tensor, "tokens dim"]:
        """Hidden states of the line's tokens.

        Args:
            model: The transformer below the head, with the attention ``grouped``.
            ids: Token ids in rows.

        Raises:
            RuntimeError: If a layer attended to something else.
        """
        output = model(
            input_ids=ids[self.rows.row, self.rows.column][None],
            attention_mask=ids.new_ones(1, 1, 1, 1),  # so that transformers makes none
            position_ids=self.positions[None],
            use_cache=False,
            line=self,
        )
        layers = model.config.get_text_config().num_hidden_layers
        if len(self._attended) != layers:
            seen = f"{len(self._attended)} of {layers} layers"
            raise RuntimeError(f"{type(model).__name__}: the line of tokens came to {seen}")
        states: Tensor = output.last_hidden_state[0]
        return states

    def attend(
        self,
        layer: Any,
        attend: Attend,
        query: Float[Tensor, "1 heads tokens size"],
        key: Float[Tensor, "1 groups tokens size"],
        value: Float[Tensor, "1 groups tokens size"],
    ) -> Float[Tensor, "1 tokens heads size"]:
        """An attention layer's output.

        Args:
            layer: The layer; its number tells what of the past is its own.
            attend: Computes it for rows.
            query: Queries of the line.
            key: Its keys.
            value: Its values.
        """
        number: int = layer.layer_idx
        self._attended.add(number)
        past = self._past[number] if self._past else None
        states = [x[0].transpose(0, 1) for x in (query, key, value)]
        if self._keep:
            keys, values = (self.rows.apart(x) for x in states[1:])
            self.kept[number] = _joined(past, (keys, values))
        sizes = [len(group.rows.row) for group in self.groups]
        outputs = []
        for group, *parts in zip(self.groups, *(x.split(sizes) for x in states), strict=True):
            queries, keys, values = (group.rows.apart(part) for part in parts)
            before = None
            if past is not None and group.past:
                before = tuple(x[group.numbers, :, : group.past] for x in past)
            keys, values = _joined(before, (keys, values))
            outputs.append(group.rows.together(attend(queries, keys, values, group.mask)))
        return torch.cat(outputs)[None]


def grouped(lengths: Sequence[int], done: Sequence[int]) -> list[list[int]]:
    """Rows in groups of similar length, whose scores are few, and little padding among them.

    Args:
        lengths: Number of tokens of each row.
        done: Number of tokens before these of each row.
    """
    found: list[list[int]] = []
    some = (row for row, length in enumerate(lengths) if length > 0)
    for row in sorted(some, key=lambda r: (lengths[r], done[r]), reverse=True):
        both = [*found[-1], row] if found else []
        width = max((lengths[r] for r in both), default=0)
        whole = len(both) * width * (width + max((done[r] for r in both), default=0))
        real = sum(lengths[r] * (lengths[r] + done[r]) for r in both)
        if both and whole <= SCORES and whole - real <= WASTED:
            found[-1] = both
        else:
            found.append([row])
    return found


def _joined(past: Any, new: KeysAndValues) -> KeysAndValues:
    """In the dtype of the new ones, which is autocast's; those of a cache may have another."""
    if past is None:
        return new
    keys, values = (torch.cat([x.to(y.dtype), y], dim=2) for x, y in zip(past, new, strict=True))
    return keys, values


class _Apart(torch.autograd.Function):
    """See :meth:`Rows.apart`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _apart(states, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _together(grad, ctx.rows), None


class _Together(torch.autograd.Function):
    """See :meth:`Rows.together`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _together(states, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apart(grad, ctx.rows), None


def _apart(states: Tensor, rows: Rows) -> Tensor:
    found = states.new_zeros(rows.count, states.shape[1], rows.width, states.shape[2])
    found[rows.row, :, rows.column] = states
    return found


def _together(states: Tensor, rows: Rows) -> Tensor:
    return states[rows.row, :, rows.column]
