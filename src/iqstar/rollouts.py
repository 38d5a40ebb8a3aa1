"""Where responses come from: the policy, the reference, the data set, or a mixture (method §5)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from iqstar.engine import RolloutEngine
from iqstar.errors import InputError
from iqstar.mdp import Prompt, Rollout, concatenate, make_rollout
from iqstar.policy import CausalLM, Policy
from iqstar.ranks import even_spans, global_max
from iqstar.sampling import CategoricalSampler, uniform_numbers

KEY = "model.rollout.init_args"


class GenerateRollout(RolloutEngine):
    """Samples token by token with the model itself.

    Only these settings count: what a checkpoint's generation config says about sampling is
    ignored, its end-of-sequence ids are kept.

    Args:
        max_new_tokens: Length limit of a response; one that reaches it is *truncated*.
        responses_per_prompt: Responses to each prompt of a batch.
        source: ``policy`` (on-policy), or ``reference``.
        stop_strings: Texts that end a response besides the end-of-sequence ids; null for those of
            the chat format (``hh``: the next human turn).
        top_p: Nucleus sampling; below 1 it biases the expected gradient (7), with a warning.
        top_k: Top-k sampling; above 0 it does likewise.
        batch_size: Responses generated at once; null for all.
    """

    def __init__(
        self,
        max_new_tokens: int = 64,
        responses_per_prompt: int = 1,
        source: Literal["policy", "reference"] = "policy",
        stop_strings: list[str] | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_size: int | None = None,
    ) -> None:
        for name, value in (
            ("max_new_tokens", max_new_tokens),
            ("responses_per_prompt", responses_per_prompt),
            ("batch_size", 1 if batch_size is None else batch_size),
        ):
            if value < 1:
                raise InputError(f"{KEY}.{name}: must be at least 1, got {value}")
        if not 0 < top_p <= 1:
            raise InputError(f"{KEY}.top_p: must be above 0 and at most 1, got {top_p}")
        if top_k < 0:
            raise InputError(f"{KEY}.top_k: must be at least 0, which is all tokens, got {top_k}")
        if top_p < 1 or top_k > 0:
            warnings.warn(
                f"{KEY}: top_p < 1 or top_k > 0 samples from another distribution than the one "
                "that is scored, which biases the expected gradient (method (7))",
                stacklevel=2,
            )
        self.max_new_tokens = max_new_tokens
        self.responses_per_prompt = responses_per_prompt
        self.source = source
        self.on_policy = source == "policy"
        self.stop_strings = stop_strings
        self.top_p = top_p
        self.top_k = top_k
        self.batch_size = batch_size

    def roll_out(
        self, policy: Policy, prompts: Sequence[Prompt], temperature: float, seed: int
    ) -> Rollout:
        """See :meth:`RolloutEngine.roll_out`."""
        if self.source == "policy":
            return self.sample(policy.actor, prompts, temperature, seed)
        with policy.reference() as model:
            return self.sample(model, prompts, temperature, seed)

    def sample(
        self, model: CausalLM, prompts: Sequence[Prompt], temperature: float, seed: int
    ) -> Rollout:
        """Responses of one model; arguments as :meth:`RolloutEngine.roll_out`."""
        if temperature <= 0:
            raise InputError(f"model.temperature: must be positive, got {temperature}")
        rows = [p for p in prompts for _ in range(self.responses_per_prompt)]
        contexts = self._contexts(model, rows)
        sampler = CategoricalSampler(
            temperature=temperature,
            vocab_size=model.chat.vocab_size,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        device, limit, chat = model.device, self.max_new_tokens, model.chat
        stops = chat.stop_strings if self.stop_strings is None else tuple(self.stop_strings)
        decode = chat.tokenizer.decode
        uniform = uniform_numbers(len(rows), limit, seed, device)
        order = sorted(range(len(rows)), key=lambda row: len(contexts[row]))
        made: dict[int, tuple[list[int], bool]] = {}
        for start, stop in even_spans(len(rows), self.batch_size or len(rows), device, empty=True):
            # A rank without rows takes part in vain, for the sake of sharded models.
            span = order[start:stop] or order[:1]
            responses = model.generate(
                [contexts[row] for row in span],
                limit,
                sampler,
                uniform[span],
                lambda row: _complete(row, chat.eos_ids, stops, decode),
            )
            for row, response in zip(span, responses, strict=True):
                made[row] = _ended(response, chat.eos_ids, limit, stops, decode)
        ids, truncated = zip(*(made[row] for row in range(len(rows))), strict=True)
        return make_rollout(rows, ids, truncated, chat.pad_id).to(device)

    def _contexts(self, model: CausalLM, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the prompts, which must leave room for a response."""
        contexts = [model.chat.prompt_ids(p.messages) for p in prompts]
        width = max(map(len, contexts))
        if model.max_tokens is not None and width + self.max_new_tokens > model.max_tokens:
            raise InputError(
                f"data.max_prompt_tokens: a prompt of {width} tokens and {self.max_new_tokens} new "
                f"ones exceed the model's {model.max_tokens} positions; lower "
                f"data.max_prompt_tokens or {KEY}.max_new_tokens"
            )
        return contexts


def _complete(
    row: list[int], eos_ids: Sequence[int], stops: Sequence[str], decode: Callable[[list[int]], Any]
) -> bool:
    """Whether the last token of a growing response ended it.

    A stop string is looked for in the last tokens first: it has no more tokens than bytes.
    """
    if row[-1] in eos_ids:
        return True
    tails = {stop: decode(row[-len(stop.encode()) - 8 :]) for stop in stops}
    return any(stop in tail and stop in decode(row) for stop, tail in tails.items())


def _ended(
    row: list[int],
    eos_ids: Sequence[int],
    limit: int,
    stops: Sequence[str],
    decode: Callable[[list[int]], Any],
) -> tuple[list[int], bool]:
    """A response up to and including what ended it, and whether the length limit did."""
    length = next((i + 1 for i, token in enumerate(row) if token in eos_ids), None)
    for stop in stops:
        text_end = length or len(row)
        if stop in decode(row[:text_end]):
            first = next(n for n in range(1, text_end + 1) if stop in decode(row[:n]))
            length = first
    if length is not None:
        return row[:length], False
    return row[:limit], True


class DatasetRollout(RolloutEngine):
    """Replays the data set's own responses (off-policy).

    A complete response gets the chat template's end of turn, inside the mask; one that is cut at
    the limit does not, and counts as truncated.

    Args:
        max_new_tokens: Length limit of a response.
    """

    needs_responses = True

    def __init__(self, max_new_tokens: int = 64) -> None:
        if max_new_tokens < 1:
            raise InputError(f"{KEY}.max_new_tokens: must be at least 1, got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens

    def roll_out(
        self, policy: Policy, prompts: Sequence[Prompt], temperature: float, seed: int
    ) -> Rollout:
        """See :meth:`RolloutEngine.roll_out`.

        Raises:
            InputError: If a prompt has no response.
        """
        chat = policy.actor.chat
        ids, truncated = [], []
        for prompt in prompts:
            if not prompt.response:
                raise InputError(
                    "model.rollout: DatasetRollout needs a response to every prompt, but "
                    f"{prompt.messages[-1].content[:60]!r} has none; use GenerateRollout, or data "
                    "with responses"
                )
            response = chat.response_ids(prompt.response, prompt.complete)
            ids.append(response[: self.max_new_tokens])
            truncated.append(len(response) > self.max_new_tokens or not prompt.complete)
        rollout = make_rollout(list(prompts), ids, truncated, chat.pad_id)
        return rollout.to(policy.actor.device)


class MixtureRollout(RolloutEngine):
    """Draws each prompt's source from several engines with given weights.

    Args:
        engines: The sources.
        weights: How often each is drawn; they are normalised.
    """

    def __init__(self, engines: list[RolloutEngine], weights: list[float]) -> None:
        if len(engines) != len(weights) or not engines:
            raise InputError(
                f"{KEY}.weights: {len(weights)} weights for {len(engines)} engines; give one each"
            )
        if min(weights) < 0 or sum(weights) <= 0:
            raise InputError(f"{KEY}.weights: must not be negative nor all zero, got {weights}")
        sampling = [e for e in engines if not isinstance(e, DatasetRollout)]
        stops = {None if e.stop_strings is None else tuple(e.stop_strings) for e in sampling}
        if len(stops) > 1:
            raise InputError(
                f"{KEY}.engines: stop_strings must agree, since a text is cut off at them "
                f"whichever engine it came from; got {' and '.join(sorted(map(repr, stops)))}"
            )
        counts = {e.responses_per_prompt for e in engines}
        if len(counts) > 1:
            raise InputError(
                f"{KEY}.engines: responses_per_prompt must agree, got {sorted(counts)}"
            )
        self.engines = engines
        self.weights = [w / sum(weights) for w in weights]
        self.responses_per_prompt = counts.pop()
        self.on_policy = all(e.on_policy for e in engines)
        self.needs_responses = any(e.needs_responses for e in engines)
        self.max_new_tokens = max(e.max_new_tokens for e in engines)
        self.stop_strings = next((e.stop_strings for e in sampling), None)
        self.batch_size = min((e.batch_size for e in engines if e.batch_size), default=None)

    def roll_out(
        self, policy: Policy, prompts: Sequence[Prompt], temperature: float, seed: int
    ) -> Rollout:
        """See :meth:`RolloutEngine.roll_out`; responses come in the order of their prompts."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.tensor(self.weights, dtype=torch.float32)  # also under bf16-true
        drawn = torch.multinomial(
            weights, len(prompts), replacement=True, generator=generator
        ).tolist()
        groups: dict[int, Iterator[Rollout]] = {}
        for number, engine in enumerate(self.engines):
            chosen = [p for p, d in zip(prompts, drawn, strict=True) if d == number]
            if global_max(len(chosen), policy.actor.device):
                # Sharded models need every rank; one without such a prompt takes part in vain.
                own_seed = rollout_seed(seed, number)
                part = engine.roll_out(policy, chosen or prompts[:1], temperature, own_seed)
                groups[number] = _groups(part, self.responses_per_prompt)
        # Not source by source: each optimiser step of a rollout is to see all of them.
        return concatenate([next(groups[number]) for number in drawn], policy.actor.chat.pad_id)


def _groups(rollout: Rollout, size: int) -> Iterator[Rollout]:
    return (rollout.rows(start, start + size) for start in range(0, len(rollout), size))


def rollout_seed(*parts: int) -> int:
    """One well-mixed seed from several numbers, such as the run's seed, the step and the rank."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
