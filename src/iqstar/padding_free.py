"""Rows of unequal length as one line of tokens, so that no product is taken of padding.

All layers but attention treat each token by itself. They are given the real tokens of all rows one
after another, as a batch of one row; attention puts queries, keys and values back into rows, and
its output into the line again (docs/decisions/023-padding-free.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = torch.finfo(torch.bfloat16).min
"""Added to the score of a key that a query may not see."""


class Line:
    """Where the tokens of a line lie in its rows.

    Args:
        lengths: Number of tokens of each row, 1 at least.
        device: Where the model computes.
        past: Keys and values before these tokens at every layer, ``(rows, groups, past, size)``.
        keep: Whether to keep all keys and values.

    Attributes:
        starts: Place of each row's first token in the line.
        kept: Keys and values of the past and the line at each layer, zero at padding.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        past: Sequence[tuple[Tensor, Tensor]] = (),
        keep: bool = False,
    ) -> None:
        places = [(row, column) for row, n in enumerate(lengths) for column in range(n)]
        self.rows, self.width = len(lengths), max(lengths)
        self.row, self.column = torch.tensor(places, device=device).unbind(1)
        self.starts = torch.tensor([0, *accumulate(lengths)][:-1], device=device)
        self.past = past
        self.kept: tuple[tuple[Tensor, Tensor], ...] = ()
        self._keep = keep

    def states(
        self,
        model: Any,
        ids: Int[Tensor, "rows width"],
        seen: Bool[Tensor, "rows past"],
    ) -> Float[Tensor, "tokens dim"]:
        """Hidden states of the line's tokens.

        Args:
            model: The transformer below the head, with the attention ``grouped``.
            ids: Token ids, padded on the right.
            seen: Which of the past are real tokens.
        """
        first = seen.sum(dim=1)[self.row]
        output = model(
            input_ids=ids[self.row, self.column][None],
            attention_mask=self._mask(seen),
            position_ids=(first + self.column)[None],
            use_cache=False,
            line=self,
        )
        states: Tensor = output.last_hidden_state[0]
        return states

    def places(self, places: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        """Where in the line tokens lie, given their places in the rows laid end to end."""
        return self.starts[places // self.width] + places % self.width

    def apart(
        self, states: Float[Tensor, "1 heads tokens size"]
    ) -> Float[Tensor, "rows heads width size"]:
        """Queries, keys or values in rows, zero at padding."""
        rows: Tensor = _Apart.apply(states[0].transpose(0, 1), self)
        return rows

    def keys_and_values(
        self,
        layer: Any,
        keys: Float[Tensor, "1 groups tokens size"],
        values: Float[Tensor, "1 groups tokens size"],
    ) -> tuple[Float[Tensor, "rows groups seen size"], Float[Tensor, "rows groups seen size"]]:
        """All that the queries of an attention layer may see: the past, then the line."""
        new = self.apart(keys), self.apart(values)
        if self.past:
            old = self.past[layer.layer_idx]
            new = torch.cat([old[0], new[0]], dim=2), torch.cat([old[1], new[1]], dim=2)
        if self._keep:
            self.kept += (new,)
        return new

    def together(
        self, output: Float[Tensor, "rows heads width size"]
    ) -> Float[Tensor, "1 tokens heads size"]:
        """An attention layer's output in the line."""
        tokens: Tensor = _Together.apply(output, self)
        return tokens.unsqueeze(0)

    def _mask(self, seen: Bool[Tensor, "rows past"]) -> Float[Tensor, "rows 1 width keys"]:
        """What is added to the scores, so that tokens see real ones before them only."""
        rows, past = seen.shape
        mask = torch.zeros(rows, 1, self.width, past + self.width, device=seen.device)
        mask[..., :past].masked_fill_(~seen[:, None, None], LEAST)
        mask[..., past:] = torch.full_like(mask[0, 0, :, past:], LEAST).triu(1)
        return mask


class _Apart(torch.autograd.Function):
    """From a line into rows."""

    @staticmethod
    def forward(
        ctx: Any, states: Float[Tensor, "tokens heads size"], line: Line
    ) -> Float[Tensor, "rows heads width size"]:
        ctx.line = line
        return _apart(states, line)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _together(grad, ctx.line), None


class _Together(torch.autograd.Function):
    """From rows into a line."""

    @staticmethod
    def forward(
        ctx: Any, states: Float[Tensor, "rows heads width size"], line: Line
    ) -> Float[Tensor, "tokens heads size"]:
        ctx.line = line
        return _together(states, line)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apart(grad, ctx.line), None


def _apart(states: Tensor, line: Line) -> Tensor:
    rows = states.new_zeros(line.rows, states.shape[1], line.width, states.shape[2])
    rows[line.row, :, line.column] = states
    return rows


def _together(states: Tensor, line: Line) -> Tensor:
    return states[line.row, :, line.column]
