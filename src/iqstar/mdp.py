"""The token MDP: its batch types, its one mask convention and its one shift by one.

A state is a prompt followed by the response so far, an action is the next token (method §1).
Shapes, used in every annotation of this package::

    batch   rows, one response each         time    response positions, right-padded
    seq     prompt and response positions   tokens  valid response tokens, flattened row by row
    vocab   the policy's vocabulary         dim     hidden size

``response_mask`` is True where a token is an action of the policy. It is built from lengths, never
from token values: an end-of-sequence token that ended the response counts, padding that happens to
have the same id does not, and prompt tokens never do. Everything downstream of the models works on
the flat ``tokens`` axis, so that padding cannot reach a loss, a metric or a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that waits for the assistant's reply.

    Args:
        messages: The turns, oldest first; the last one is the user's.
        response: The data set's own reply, for off-policy replay only; None where it has none.
        complete: Whether ``response`` ended by itself (False: it was cut by its source).
        rejected: Of a pair, the reply that was liked less than ``response``; DPO alone reads it.
        rejected_complete: Whether ``rejected`` ended by itself.
    """

    messages: tuple[Message, ...]
    response: str | None = None
    complete: bool = True
    rejected: str | None = None
    rejected_complete: bool = True

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages as plain JSON values, as chat templates and files have them."""
        return [{"role": m.role, "content": m.content} for m in self.messages]


class PromptBatch:
    """What a data loader yields: prompts, and which training step on them this is.

    No dataclass: Lightning's half and double precisions walk through those in a batch, and fail
    at frozen ones.

    Args:
        prompts: The prompts of one rollout on this rank.
        step: 0 for the first training step on these prompts (a fresh rollout is made), 1, 2, …
            for the further micro-batches of the same rollout.
        steps: Number of training steps on these prompts.
        last: Whether no further prompts follow in this epoch.
    """

    __slots__ = ("last", "prompts", "step", "steps")

    def __init__(
        self, *, prompts: tuple[Prompt, ...], step: int = 0, steps: int = 1, last: bool = False
    ) -> None:
        self.prompts = prompts
        self.step = step
        self.steps = steps
        self.last = last

    @property
    def used_up(self) -> bool:
        """Whether this is the last training step on its prompts."""
        return self.step + 1 >= self.steps

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PromptBatch):
            return NotImplemented
        return all(getattr(self, n) == getattr(other, n) for n in self.__slots__)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Responses to prompts, one row each.

    Args:
        prompts: The prompt of every row.
        response_ids: Token ids, right-padded.
        response_mask: True at the policy's actions (see the module's docstring).
        truncated: True where the length limit, not an end token, ended the response.
    """

    prompts: tuple[Prompt, ...]
    response_ids: Int[Tensor, "batch time"]
    response_mask: Bool[Tensor, "batch time"]
    truncated: Bool[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of response tokens in every row."""
        return self.response_mask.sum(dim=1)

    @property
    def responses(self) -> list[list[int]]:
        """The token ids of every row's response."""
        rows = zip(self.response_ids, self.response_mask, strict=True)
        return [ids[mask].tolist() for ids, mask in rows]

    def spread(self, values: Shaped[Tensor, " batch"]) -> Shaped[Tensor, " tokens"]:
        """A value of each row, at each of the row's tokens."""
        return torch.repeat_interleave(values, self.lengths)

    @property
    def actions(self) -> Int[Tensor, " tokens"]:
        """The response tokens, flattened row by row."""
        return self.response_ids[self.response_mask]

    def rows(self, start: int, stop: int) -> Rollout:
        """Rows ``start`` to ``stop``, with the padding that they no longer need cut off."""
        mask = self.response_mask[start:stop]
        width = max(int(mask.sum(dim=1).max()), 1) if len(mask) else 1
        return Rollout(
            prompts=self.prompts[start:stop],
            response_ids=self.response_ids[start:stop, :width],
            response_mask=mask[:, :width],
            truncated=self.truncated[start:stop],
        )

    def take(self, order: Sequence[int]) -> Rollout:
        """The rows of these numbers, in this order."""
        index = torch.tensor(order, device=self.response_ids.device)
        return Rollout(
            prompts=tuple(self.prompts[row] for row in order),
            response_ids=self.response_ids[index],
            response_mask=self.response_mask[index],
            truncated=self.truncated[index],
        )

    def to(self, device: torch.device) -> Rollout:
        """The same rollout with its tensors on a device."""
        return replace(
            self,
            response_ids=self.response_ids.to(device),
            response_mask=self.response_mask.to(device),
            truncated=self.truncated.to(device),
        )

    def without_truncated(self) -> Rollout:
        """The same rows with every truncated response masked out whole."""
        return replace(self, response_mask=self.response_mask & ~self.truncated[:, None])


@dataclass(frozen=True, kw_only=True)
class TokenSequences:
    """Packed model inputs for scoring responses in a context.

    Args:
        input_ids: Context and response, padded.
        attention_mask: True at real tokens.
        position_ids: 0, 1, 2, … from each row's first real token, whatever the padding side.
        predictors: Flat indices into (batch · seq) of the positions whose output distribution
            is that of a response token: the position *before* it. This is the shift by one.
        contexts: The token ids of each row's context; empty where rows are padded on the left.
        lengths: Number of tokens of each row.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"]
    predictors: Int[Tensor, " tokens"]
    contexts: tuple[tuple[int, ...], ...] = ()
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenCredits:
    """What is known of each response token before the policy is updated.

    Args:
        actions: The response tokens.
        reference: log π_ref of the actions, in nats.
        credit: log π̂* − log π_ref of the actions, that is A*/β (4), after transforms.
        weight: Weight of the token in the loss, 1 without transforms.
        behaviour: log π_θ of the actions at the rollout's weights by our own scoring; None where
            no loss needs it.
    """

    actions: Int[Tensor, " tokens"]
    reference: Float[Tensor, " tokens"]
    credit: Float[Tensor, " tokens"]
    weight: Float[Tensor, " tokens"]
    behaviour: Float[Tensor, " tokens"] | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, index: Int[Tensor, " chunk"] | slice) -> TokenCredits:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: v[index] for n, v in parts.items() if v is not None})


def length_mask(lengths: Sequence[int], width: int) -> Bool[Tensor, "batch time"]:
    """True at the first ``lengths[i]`` positions of row i."""
    return torch.arange(width)[None, :] < torch.tensor(lengths, dtype=torch.long)[:, None]


def make_rollout(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[int]],
    truncated: Sequence[bool],
    pad_id: int = 0,
) -> Rollout:
    """Pads responses, given as lists of token ids, into a :class:`Rollout`."""
    lengths = [len(r) for r in responses]
    width = max([1, *lengths])
    ids = torch.full((len(responses), width), pad_id, dtype=torch.long)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(list(response), dtype=torch.long)
    return Rollout(
        prompts=tuple(prompts),
        response_ids=ids,
        response_mask=length_mask(lengths, width),
        truncated=torch.tensor(list(truncated), dtype=torch.bool),
    )


def concatenate(rollouts: Sequence[Rollout], pad_id: int = 0) -> Rollout:
    """Stacks the rows of several rollouts."""
    stacked = make_rollout(
        [p for r in rollouts for p in r.prompts],
        [response for r in rollouts for response in r.responses],
        [bool(t) for r in rollouts for t in r.truncated],
        pad_id,
    )
    return stacked.to(rollouts[0].response_ids.device)


def pack(
    contexts: Sequence[Sequence[int]],
    rollout: Rollout,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    extra: int = 0,
) -> TokenSequences:
    """Joins each row's context and response into model inputs.

    Args:
        contexts: Token ids of the context of each row, at least one token long.
        rollout: The responses.
        pad_id: Id written at padded places; it is never attended to nor scored.
        side: Where the padding goes. Right padding needs no attention mask in a causal model.
        extra: Further columns of padding (tests: padding changes nothing).

    Raises:
        ValueError: If a context is empty: its first response token would have no predictor.
    """
    ids, mask = rollout.response_ids.cpu(), rollout.response_mask.cpu()
    if any(len(c) == 0 for c in contexts):
        raise ValueError("pack: a context has no tokens; add a BOS token or a chat template")
    # A masked-out row keeps its context only; no position of it is scored.
    rows = [
        torch.cat([torch.as_tensor(list(c), dtype=torch.long), r[m]])
        for c, r, m in zip(contexts, ids, mask, strict=True)
    ]
    seq = max(len(row) for row in rows) + extra
    input_ids = torch.full((len(rows), seq), pad_id, dtype=torch.long)
    attention = torch.zeros((len(rows), seq), dtype=torch.bool)
    predictors = []
    for i, (row, context) in enumerate(zip(rows, contexts, strict=True)):
        start = seq - len(row) if side == "left" else 0
        input_ids[i, start : start + len(row)] = row
        attention[i, start : start + len(row)] = True
        first = i * seq + start + len(context) - 1
        predictors.append(torch.arange(first, first + len(row) - len(context)))
    device = rollout.response_ids.device
    return TokenSequences(
        input_ids=input_ids.to(device),
        attention_mask=attention.to(device),
        position_ids=(attention.long().cumsum(dim=1) - 1).clamp(min=0).to(device),
        predictors=torch.cat(predictors).to(device),
        contexts=tuple(tuple(c) for c in contexts) if side == "right" else (),
        lengths=tuple(len(row) for row in rows),
    )
