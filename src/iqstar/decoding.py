"""Responses token by token: the prompts are read once, and rows leave the batch when they end.

transformers' ``generate`` serves any model and any way of generating. Here is only what a rollout
needs, and what costs time in it is left out: prompts are read in groups of about equal length,
what they have in common once; keys and values are never copied; the batch shrinks as responses end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, StoppingCriteriaList

from iqstar.kv_cache import RolloutCache, holds, reading_cache
from iqstar.sampling import ForcedDraws

READ_AT_ONCE = 8192
"""Prompt tokens in one forward pass, padding included."""
UNEVEN = 0.75
"""A prompt shorter than this part of the longest one beside it starts a group of its own."""
SHORT_PREFIX = 8
"""Fewer common tokens than this are not worth a forward pass."""

Draw = Callable[[Tensor, list[int], int], Tensor]
"""(last logits of some rows, the rows' numbers, step) → a token for each."""


def fits(model: Any, length: int) -> bool:
    """Whether :func:`decode` serves a transformers model; others need its ``generate``.

    Args:
        model: A causal language model, without PEFT's wrapper.
        length: Tokens of the longest prompt and response.
    """
    needed = {"past_key_values", "position_ids", "attention_mask", "logits_to_keep"}
    plain = GenerationMixin.prepare_inputs_for_generation
    return (
        type(model).prepare_inputs_for_generation is plain
        and not getattr(model, "_is_stateful", False)
        and needed <= set(inspect.signature(model.forward).parameters)
        and holds(model.config, length)
    )


@dataclass
class Context:
    """What the model knows of the rows that still grow.

    Args:
        cache: Keys and values.
        mask: Which of them are no padding, with room for the response.
        positions: Of the next token of each row.
        logits: Of that token.
    """

    cache: RolloutCache
    mask: Int[Tensor, "batch length"]
    positions: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch vocab"]


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limit: int,
    draw: Draw,
    ended: Callable[[list[int]], bool],
    device: torch.device,
) -> list[list[int]]:
    """A response to each prompt, in their order.

    Args:
        model: A transformers model in evaluation mode that :func:`fits`.
        prompts: Token ids.
        limit: Most tokens of a response.
        draw: Draws tokens.
        ended: Whether a response is complete.
        device: Where the model computes.
    """
    context = read(model, prompts, limit - 1, device)  # the last token is not read
    responses: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for step in range(limit):
        tokens = draw(context.logits, live, step)
        for row, token in zip(live, tokens.tolist(), strict=True):
            responses[row].append(token)
        going = [not ended(responses[row]) for row in live]
        if step + 1 == limit or not any(going):
            break
        if not all(going):
            # The last rows move to where others ended.
            rest = sum(going)
            target = [i for i in range(rest) if not going[i]]
            source = [i for i in range(rest, len(live)) if going[i]]
            context.cache.keep(rest, source, target)
            for tensor in (tokens, context.mask, context.positions):
                tensor[target] = tensor[source]
            for t, s in zip(target, source, strict=True):
                live[t] = live[s]
            del live[rest:]
            tokens = tokens[:rest]
        context = advance(model, context, tokens)
    return responses


def advance(model: Any, context: Context, tokens: Int[Tensor, " batch"]) -> Context:
    """The context after another token of the first rows, as many as there are tokens."""
    rows, filled = len(tokens), context.cache.get_seq_length()
    mask, positions = context.mask[:rows], context.positions[:rows]
    output = model(
        input_ids=tokens[:, None],
        attention_mask=mask[:, : filled + 1],
        position_ids=positions[:, None],
        past_key_values=context.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Context(context.cache, mask, positions + 1, output.logits[:, -1])


def read(model: Any, prompts: Sequence[Sequence[int]], room: int, device: torch.device) -> Context:
    """Reads all prompts: each once, and their common beginning once.

    Args:
        model: A transformers model.
        prompts: Token ids; equal prompts share the work.
        room: Tokens that will follow.
        device: Where the model computes.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(row)
    unique = sorted(rows_of, key=len, reverse=True)
    prefix = _common(unique)
    width = len(unique[0])
    first = _forward(model, [unique[0][:prefix]], None, device)[1] if prefix else None
    cache = logits = None
    for group in _groups(unique, prefix):
        last, states = _forward(model, [p[prefix:] for p in group], first, device)
        source = [i for i, prompt in enumerate(group) for _ in rows_of[prompt]]
        rows = [row for prompt in group for row in rows_of[prompt]]
        if cache is None or logits is None:
            cache = RolloutCache(states, len(prompts), width + room)
            logits = last.new_empty((len(prompts), last.shape[1]))
        cache.store(states, source, rows, prefix, width)
        logits[rows] = last[source]
    assert cache is not None
    assert logits is not None
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    slots = torch.arange(width + room, device=device)
    padding = (slots >= prefix) & (slots < (prefix + width - lengths)[:, None])
    return Context(cache, (~padding).long(), lengths, logits)


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that several prompts begin with; each keeps one of its own."""
    if len(prompts) < 2:
        return 0
    least, most = min(prompts), max(prompts)
    same = 0
    while same < min(map(len, prompts)) - 1 and least[same] == most[same]:
        same += 1
    return same if same >= SHORT_PREFIX else 0


def _groups(prompts: Sequence[tuple[int, ...]], prefix: int) -> list[list[tuple[int, ...]]]:
    """Prompts, longest first, in groups that need little padding."""
    groups: list[list[tuple[int, ...]]] = []
    for prompt in prompts:
        longest = len(groups[-1][0]) - prefix if groups else 0
        small = groups and (len(groups[-1]) + 1) * longest <= READ_AT_ONCE
        if small and len(prompt) - prefix >= UNEVEN * longest:
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return groups


def _forward(
    model: Any,
    prompts: Sequence[Sequence[int]],
    before: DynamicCache | None,
    device: torch.device,
) -> tuple[Tensor, DynamicCache]:
    """The last logits, and the cache, of prompts padded on the left.

    Args:
        model: A transformers model.
        prompts: Token ids.
        before: The cache of one row that all of them continue.
        device: Where the model computes.
    """
    ids, mask = _padded(prompts, device)
    known, cache = 0, reading_cache(model.config)
    if before is not None:
        known, rows = before.get_seq_length(), len(prompts)
        mask = torch.cat([mask.new_ones(rows, known), mask], dim=1)
        for number, (keys, values, *_) in enumerate(before):
            cache.update(*(x.expand(rows, -1, -1, -1) for x in (keys, values)), number)
    output = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, known:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], cache


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limit: int,
    forced: ForcedDraws,
    ended: Callable[[list[int]], bool],
    device: torch.device,
    synced_gpus: bool = False,
) -> list[list[int]]:
    """Responses by transformers' ``generate``, for models and shardings that need it.

    The checkpoint's own settings are put aside: those of sampling (temperature, top-k, penalties)
    would bias the rollout (method §5), and transformers fills what is left unset from them.

    Args:
        model: A transformers model in evaluation mode.
        prompts: Token ids.
        limit: Most tokens of a response.
        forced: Draws tokens.
        ended: Whether a response is complete; others may make rows longer than that.
        device: Where the model computes.
        synced_gpus: Whether all ranks must make equally many forward passes.
    """

    def complete(ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        done = [ended(row) for row in ids[:, width:].tolist()]
        return torch.tensor(done, device=ids.device)

    ids, mask = _padded(prompts, device)
    width = ids.shape[1]
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=limit),
            logits_processor=[forced],
            stopping_criteria=StoppingCriteriaList([complete]),
            synced_gpus=synced_gpus,
        )
    finally:
        model.generation_config = own
    return output[:, width:].tolist()


def _padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "prompts seq"], Bool[Tensor, "prompts seq"]]:
    """Token ids padded on the left, and which are no padding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= (width - lengths)[:, None]
