"""What a model is tried out on before it is used: an architecture that differs is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from iqstar import attention
from iqstar.errors import InputError
from iqstar.kv_cache import local_window
from iqstar.mdp import Prompt, TokenSequences, make_rollout, pack
from iqstar.policy import CausalLM
from iqstar.prefixes import KnownContexts, hidden_states
from iqstar.sampling import CategoricalSampler, uniform_numbers

KNOWN = ("eager", "sdpa", attention.NAME)
"""Attention that runs everywhere, in every dtype."""
UNLIKE = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError)
"""What a model raises that does not work as those that we know."""
SAMPLED = 3
"""Tokens of the responses that a model is tried out on."""
NOISE = ("dropout", "pdrop", "layerdrop", "jitter")
"""Words in the names of a module's settings that make it random while it trains."""


def silence(model: nn.Module) -> None:
    """Sets all dropout and noise of a model to 0: scoring and sampling must agree."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and any(word in name for word in NOISE):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@torch.no_grad()
def check_head(lm: CausalLM, key: str) -> None:
    """Our head on the model's hidden states must give the model's own logits, in either mode.

    Args:
        lm: The model.
        key: The YAML key that named it, for messages.

    Raises:
        InputError: If it does not, or a weight is not finite.
    """
    ids = torch.tensor([[1, 2, 3]]) % lm.chat.vocab_size
    sequences = TokenSequences(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        position_ids=torch.arange(3)[None],
        predictors=torch.arange(3),
    )
    name = type(lm.model).__name__
    try:
        with _mode(lm, training=True):
            trained = lm.hidden(sequences)
        with _mode(lm, training=False):
            states = lm.hidden(sequences)
            theirs = lm.model(input_ids=ids).logits[0, :, : lm.chat.vocab_size]
        ours = lm.head().prepared().logits(states)
    except UNLIKE as error:
        raise InputError(
            f"{key}: the forward pass of {name} is not that of a plain causal language model "
            f"({_reason(error)}); this architecture is not supported yet"
        ) from error
    if not torch.isfinite(theirs).all():
        raise InputError(
            f"{key}: the model's output is not finite, so its weights are damaged (or overflow in "
            "their dtype); give another copy of it, or a checkpoint from before they diverged"
        )
    if not torch.allclose(ours, theirs.to(ours), atol=1e-2, rtol=1e-2):
        raise InputError(
            f"{key}: the output head of {name} is not a plain linear map of "
            "its last hidden state (scale and soft-capping are known); this architecture is not "
            "supported yet"
        )
    if not torch.allclose(trained, states, atol=1e-4, rtol=1e-4):
        raise InputError(
            f"{key}: {name} computes something else while it trains (noise, or random routing), "
            "so its credits would be those of another model; this architecture is not "
            "supported yet"
        )


@torch.no_grad()
def check_sampling(lm: CausalLM, key: str) -> None:
    """A response must be drawn from the probabilities that it is scored with (method §5).

    Prompts of unequal length that begin alike take every way through a rollout: what they have in
    common, padding, keys and values.

    Args:
        lm: The model.
        key: The YAML key that named it, for messages.

    Raises:
        InputError: If it is drawn from others.
    """
    prompts = [[i % lm.chat.vocab_size for i in [*range(1, 11), *more]] for more in ([11], [])]
    sampler = _RecordingSampler(lm.chat.vocab_size)
    numbers = uniform_numbers(len(prompts), SAMPLED, 0, lm.device)
    name, why = type(lm.model).__name__, ""
    try:
        responses = lm.generate(prompts, SAMPLED, sampler, numbers, lambda row: False)
        rollout = make_rollout([Prompt(messages=())] * len(prompts), responses, [False] * 2)
        with _mode(lm, training=False):
            states = lm.hidden(pack(prompts, rollout, 0))
        scored = lm.head().prepared().logits(states).softmax(dim=-1, dtype=torch.float32)
        drawn = torch.stack(sampler.seen, dim=1).flatten(0, 1)
        distance = float((scored - drawn).abs().sum(dim=-1).max() / 2)
    except UNLIKE as error:
        distance, why = 1.0, f" ({_reason(error)})"
    wide = next(lm.parameters()).dtype in (torch.float32, torch.float64)
    if distance > (1e-2 if wide else 0.1):
        raise InputError(
            f"{key}: {name} does not sample from the probabilities that one forward pass over "
            f"prompt and response gives{why or f' (total variation {distance:.2g})'}; this "
            "architecture is not supported yet"
        )


def can_share(lm: CausalLM) -> bool:
    """Whether going on from keys and values of a beginning gives the states of a whole pass.

    Tried out, because architectures keep more than keys and values (a window, a running state).
    """
    return _attention_in(lm, KNOWN) and _agree(
        lm, lambda sequences, known: hidden_states(lm.body, sequences, 1, known)
    )


def can_drop_padding(lm: CausalLM) -> bool:
    """Whether a line of tokens gives the states of padded rows (:mod:`iqstar.padding_free`)."""

    def line(sequences: TokenSequences, known: KnownContexts | None) -> Found:
        return hidden_states(lm.body, sequences, 1, known, padding_free=True)

    return _attention_in(lm, (attention.NAME,)) and _agree(lm, line)


Found = tuple[Tensor, KnownContexts]
"""States, and what is now known of these contexts."""


def _attention_in(lm: CausalLM, names: tuple[str, ...]) -> bool:
    """Whether all layers see all tokens, by one of these implementations."""
    config = lm.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", 1)
    known = config._attn_implementation in names
    return known and not (sliding or local_window(config)) and kinds == {"full_attention"}


@torch.no_grad()
def _agree(lm: CausalLM, read: Callable[[TokenSequences, KnownContexts | None], Found]) -> bool:
    """Whether ``read`` gives the states of whole passes over unequal rows that begin alike."""
    a, b, c, d, e, f, g = (torch.arange(1, 8) % lm.chat.vocab_size).tolist()
    rollout = make_rollout([Prompt(messages=())] * 4, [[e, f], [g], [f, e, a], [g]], [True] * 4)
    alike = [[a, b, c, d], [a, b, c, d], [a, e, d], [a, f]]
    apart = [[a, b, c, d], [b, c, d], [c, a], [d]]  # read at once, and gone on from as they are
    try:
        with _mode(lm, training=False):
            for contexts in (alike, apart):
                sequences = pack(contexts, rollout, 0)
                told = pack([[*context[:-1], g] for context in contexts], rollout, 0)
                states, known = read(sequences, None)
                again, _ = read(told, known)
                for x, y in ((lm.hidden(sequences), states), (lm.hidden(told), again)):
                    if not torch.allclose(x, y, atol=1e-2, rtol=1e-2):
                        return False
            return True
    except UNLIKE:
        return False  # it has another kind of cache, or takes no line


class _RecordingSampler(CategoricalSampler):
    """Remembers the probabilities that it drew from."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(temperature=1.0, vocab_size=vocab_size)
        self.seen: list[Float[Tensor, "batch vocab"]] = []

    def draw(
        self, logits: Float[Tensor, "batch rows"], uniform: Float[Tensor, " batch"]
    ) -> Int[Tensor, " batch"]:
        """One token a row."""
        self.seen.append(logits[:, : self.vocab_size].softmax(dim=-1, dtype=torch.float32))
        return super().draw(logits, uniform)


@contextmanager
def _mode(lm: CausalLM, *, training: bool) -> Iterator[None]:
    before = lm.training
    lm.train(training)
    try:
        yield
    finally:
        lm.train(before)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
