"""Forward passes that read once what several sequences begin with.

The rows of a batch share a chat template's system message, the responses to one prompt share that
prompt, and a conversation told a principle shares its beginning with the same one told nothing.
Keys and values of such a beginning are computed once and continued from. Policy and reference take
the same route through the same rows, so that equal weights still give equal bits; gradients flow
through the keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iqstar.mdp import TokenSequences, length_mask
from iqstar.padding_free import Line

WORTH = 128
"""Tokens that must be saved for one more forward pass to pay on a CPU."""
WORTH_ON_GPU = 4096
"""The same on a GPU, where a pass over few tokens is all latency; an estimate, not measured."""

TokenIds = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Keys and values of the first tokens of each row, at every layer.

    Args:
        layers: Keys and values, ``(rows, groups, width, size)`` each.
        mask: True at real tokens.
        padded: Whether the mask may be False anywhere; known without asking the device.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Bool[Tensor, "rows width"]
    padded: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def rows(self, index: Sequence[int]) -> KeyValues:
        """Those of other rows, in the order of ``index``; of a single row, without a copy."""
        if len(self.mask) == 1:
            size = (len(index), -1, -1, -1)
            layers = tuple((k.expand(size), v.expand(size)) for k, v in self.layers)
            return KeyValues(
                layers=layers, mask=self.mask.expand(len(index), -1), padded=self.padded
            )
        rows = torch.tensor(index, device=self.mask.device)
        layers = tuple((k[rows], v[rows]) for k, v in self.layers)
        return KeyValues(layers=layers, mask=self.mask[rows], padded=self.padded)

    def first(self, counts: Sequence[int]) -> KeyValues:
        """Those of the first tokens of each row, ``counts[i]`` of row i, padded on the right."""
        width = max(counts)
        wanted = torch.tensor(counts, device=self.mask.device)[:, None]
        order = (~self.mask).long().argsort(dim=1, stable=True)[:, :width]
        rows = torch.arange(len(order), device=order.device)[:, None]
        # Indexing with the heads in between gives (rows, width, groups, size).
        layers = tuple(
            (k[rows, :, order].transpose(1, 2), v[rows, :, order].transpose(1, 2))
            for k, v in self.layers
        )
        mask = torch.arange(width, device=order.device)[None] < wanted
        return KeyValues(layers=layers, mask=mask, padded=min(counts) < width)


@dataclass(frozen=True, kw_only=True)
class KnownContexts:
    """What a frozen model computed for contexts that others may begin with.

    Args:
        contexts: Their token ids.
        keys: Keys and values of these tokens, and of more.
    """

    contexts: tuple[tuple[int, ...], ...]
    keys: KeyValues

    def shared(self, contexts: Sequence[TokenIds]) -> list[int]:
        """Leading tokens that each context has in common with ours, short of its last one."""
        return [
            min(_common(ours, theirs), len(theirs) - 1)
            for ours, theirs in zip(self.contexts, contexts, strict=True)
        ]


def hidden_states(
    model: Any,
    sequences: TokenSequences,
    worth: int = WORTH,
    known: KnownContexts | None = None,
    padding_free: bool = False,
    keep: bool = True,
) -> tuple[Float[Tensor, "tokens dim"], KnownContexts]:
    """Hidden states that predict the response tokens, flattened row by row.

    Naive equivalent: a forward pass over every sequence as a whole.

    Args:
        model: The transformer below the head, with a cache of keys and values.
        sequences: Packed inputs, padded on the right, with their contexts.
        worth: Tokens that must be saved for one more forward pass.
        known: What the same model, frozen, computed for other contexts of the same rows.
        padding_free: Whether the model takes rows as a line (:mod:`iqstar.padding_free`).
        keep: Whether other contexts will go on from these.

    Returns:
        The states, and what is now known of these contexts, if it is kept.
    """
    contexts = sequences.contexts
    past, counts = _beginning(model, sequences, worth, padding_free)
    if known is not None:
        shared = known.shared(contexts)
        if sum(shared) > sum(counts) + worth:
            past, counts = known.keys.first(shared), shared
    states, keys = _rest(model, sequences, past, counts, padding_free, keep)
    return states, KnownContexts(contexts=contexts, keys=keys)


def _beginning(
    model: Any, sequences: TokenSequences, worth: int, padding_free: bool
) -> tuple[KeyValues | None, list[int]]:
    """Keys and values of what is shared inside the batch, and how many tokens of each row.

    Every row keeps the last token of its context: that predicts its first response token.
    """
    contexts = sequences.contexts
    stem = common_prefix(contexts)
    if stem * (len(contexts) - 1) < worth:
        stem = 0
    counts = [stem] * len(contexts)
    twigs = list(dict.fromkeys(contexts))
    rests = [len(c) - 1 - stem for c in contexts]
    branches = sum(rests) - sum(len(t) - 1 - stem for t in twigs) >= worth
    device = sequences.input_ids.device
    past = None
    if stem:
        ids = torch.tensor([contexts[0][:stem]], device=device)
        *_, past = _read(model, ids, [stem], None, [0], padding_free)
    if branches:
        lengths = [len(t) - 1 - stem for t in twigs]
        mask = length_mask(lengths, max(lengths)).to(device)
        ids = torch.zeros_like(mask, dtype=torch.long)
        ids[mask] = torch.tensor([i for t in twigs for i in t[stem:-1]], device=device)
        before = past.rows([0] * len(twigs)) if past else None
        *_, past = _read(model, ids, lengths, before, [stem] * len(twigs), padding_free)
        counts = [len(c) - 1 for c in contexts]
        return past.rows([twigs.index(c) for c in contexts]), counts
    return (past.rows([0] * len(contexts)) if past else None), counts


def _rest(
    model: Any,
    sequences: TokenSequences,
    past: KeyValues | None,
    counts: Sequence[int],
    padding_free: bool,
    keep: bool,
) -> tuple[Float[Tensor, "tokens dim"], KeyValues]:
    """Reads each row from its ``counts[i]``-th token on."""
    ids, seq = sequences.input_ids, sequences.input_ids.shape[1]
    done = torch.tensor(counts, device=ids.device)
    lengths = [n - c for n, c in zip(sequences.lengths, counts, strict=True)]
    columns = done[:, None] + torch.arange(max(lengths), device=ids.device)
    rest = ids.gather(1, columns.clamp(max=seq - 1))
    states, starts, keys = _read(model, rest, lengths, past, counts, padding_free, keep)
    row = sequences.predictors // seq
    return states[sequences.predictors - row * seq - done[row] + starts[row]], keys


def _read(
    model: Any,
    ids: Int[Tensor, "rows width"],
    lengths: Sequence[int],
    past: KeyValues | None,
    counts: Sequence[int],
    padding_free: bool,
    keep: bool = True,
) -> tuple[Float[Tensor, "tokens dim"], Int[Tensor, " rows"], KeyValues]:
    """One forward pass after ``past``, which has ``counts``, of rows padded on the right.

    Padding after the last real token needs no mask in a causal model, padding between does.

    Returns:
        The states row by row, where each row starts in them, and keys and values.
    """
    from transformers import DynamicCache

    rows, width = ids.shape
    mask = length_mask(lengths, width).to(ids.device)
    seen = mask[:, :0] if past is None else past.mask
    whole = torch.cat([seen, mask], dim=1)
    if padding_free and len(set(zip(lengths, counts, strict=True))) > 1:
        layers = () if past is None else past.layers
        line = Line(lengths, ids.device, counts, layers, keep)
        states = line.states(model, ids)
        layers = tuple(line.kept[number] for number in sorted(line.kept))
        return states, line.starts, KeyValues(layers=layers, mask=whole, padded=True)
    output = model(
        input_ids=ids,
        attention_mask=whole.long() if past is not None and past.padded else None,
        position_ids=seen.sum(dim=1, keepdim=True) + torch.arange(width, device=ids.device),
        past_key_values=DynamicCache() if past is None else DynamicCache(past.layers),
        use_cache=True,
    )
    layers = tuple((layer.keys, layer.values) for layer in output.past_key_values.layers)
    keys = KeyValues(layers=layers, mask=whole, padded=rows > 1)
    starts = torch.arange(rows, device=ids.device) * width
    return output.last_hidden_state.flatten(0, 1), starts, keys


def common_prefix(contexts: Sequence[TokenIds]) -> int:
    """Leading tokens that all contexts have in common, short of the last token of any."""
    first = contexts[0]
    return min(min(_common(first, c), len(c) - 1) for c in contexts)


def _common(one: TokenIds, other: TokenIds) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
