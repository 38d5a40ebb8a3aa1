"""Draws tokens from logits, reproducibly and faster than ``torch.multinomial`` does."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iqstar.errors import InputError, NonFiniteLossError

BLOCK = 256
"""Tokens whose probabilities are summed before one of them is looked for."""


def uniform_numbers(
    rows: int, steps: int, seed: int, device: torch.device
) -> Float[Tensor, "batch time"]:
    """A uniform number in [0, 1) for every token that may be drawn.

    Since each row has its own, what is drawn for it depends neither on the rows beside it nor on
    the device. The global random state is not touched.

    Raises:
        InputError: If the device has no float64.
    """
    if device.type == "mps":
        raise InputError(
            "trainer.accelerator: Apple's GPUs have no float64, which sampling needs; set it to cpu"
        )
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(rows, steps, dtype=torch.float64, generator=generator)
    return numbers.to(device)


class CategoricalSampler:
    """Draws each row's next token: inverts the cumulative distribution with a uniform number.

    Naive equivalent: ``torch.searchsorted(p.double().cumsum(-1), uniform, right=True)`` with
    ``p = softmax(logits / temperature)``; but a block of tokens is found first, then the token in
    it, so that few sums are kept. ``torch.multinomial`` draws an exponential number for every entry
    of the vocabulary on one thread. Sums are in float64: in float32, tokens below 6e-8 would never
    be drawn.

    Args:
        temperature: Divisor of the logits.
        vocab_size: Entries beyond are padding of the output layer and never drawn.
        top_k: Keep only the k most probable tokens; 0 for all.
        top_p: Keep only the smallest set of tokens with this probability; 1 for all.
    """

    def __init__(
        self, *, temperature: float, vocab_size: int, top_k: int = 0, top_p: float = 1.0
    ) -> None:
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.temperature = temperature
        self.vocab_size = vocab_size
        self.warpers: list[Any] = [
            *([TopKLogitsWarper(top_k)] if top_k > 0 else []),
            *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
        ]

    def draw(
        self, logits: Float[Tensor, "batch rows"], uniform: Float[Tensor, " batch"]
    ) -> Int[Tensor, " batch"]:
        """One token a row; −1 where a logit is NaN or +∞, which :func:`checked` tells of.

        Args:
            logits: The model's, of the last position.
            uniform: A number in [0, 1) for each row.
        """
        logits = logits[:, : self.vocab_size]
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.temperature != 1 or self.warpers:
            logits = logits.to(wide) / self.temperature
        for warper in self.warpers:
            logits = warper(None, logits)
        return _inverse(logits.softmax(dim=-1, dtype=wide), uniform)


def checked(tokens: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The tokens drawn, if there is one for every row.

    Raises:
        NonFiniteLossError: If some logits were not finite.
    """
    if (tokens < 0).any():
        raise NonFiniteLossError(
            "the logits that a response is drawn from are not finite: the weights diverged, or "
            "overflow in float16; checkpoints saved before, if any, are untouched. Lower "
            "model.optimizer.init_args.lr, set trainer.gradient_clip_val, or use "
            "trainer.precision: 32-true"
        )
    return tokens


def _inverse(
    mass: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The first token at which the cumulated mass exceeds that share of the total."""
    rows, size = mass.shape
    whole = size // BLOCK * BLOCK
    parts = [mass[:, :whole].view(rows, -1, BLOCK).sum(dim=-1, dtype=torch.float64)]
    if whole < size:
        parts.append(mass[:, whole:].sum(dim=-1, keepdim=True, dtype=torch.float64))
    blocks = torch.cat(parts, dim=1).cumsum(dim=-1)
    wanted = uniform[:, None].to(torch.float64) * blocks[:, -1:]
    block = _first_above(blocks, wanted)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    tokens = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = mass.gather(1, tokens.clamp(max=size - 1)).double().masked_fill(tokens >= size, 0.0)
    token = _first_above(inside.cumsum(dim=-1), wanted - before)
    return (block * BLOCK + token)[:, 0].masked_fill(~torch.isfinite(blocks[:, -1]), -1)


def _first_above(
    sums: Float[Tensor, "batch entries"], wanted: Float[Tensor, "batch one"]
) -> Int[Tensor, "batch one"]:
    """Index of the first sum above a number, which rounding must not lift over the last one."""
    last = sums[:, -1:]
    wanted = torch.minimum(wanted, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(sums, wanted, right=True)


class ForcedDraws:
    """A logits processor of transformers' ``generate`` that leaves only the token drawn.

    ``generate`` then takes the arg-max.

    Args:
        sampler: Draws.
        uniform: Numbers for every row and step.
    """

    def __init__(self, sampler: CategoricalSampler, uniform: Float[Tensor, "batch time"]) -> None:
        self.sampler = sampler
        self.uniform = uniform
        self.step = 0

    def __call__(
        self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch rows"]:
        """Scores that are 0 at the token drawn and −∞ elsewhere."""
        drawn = checked(self.sampler.draw(scores, self.uniform[:, self.step]))
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn[:, None], 0.0)
