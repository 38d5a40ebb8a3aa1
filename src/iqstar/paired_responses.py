"""Responses of policy and reference to the same prompts with the same random numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iqstar.atomic import written_beside
from iqstar.chat import ChatFormat, place_principle
from iqstar.evaluation import divergences, evaluation_engine
from iqstar.mdp import Message, Prompt, Rollout
from iqstar.policy import CausalLM, Policy
from iqstar.rollouts import RolloutEngine, rollout_seed


@dataclass(frozen=True, kw_only=True)
class Response:
    """A sampled response.

    Args:
        text: Without special tokens.
        tokens: Its length, the end token included.
        truncated: Whether the length limit ended it.
        kl: Σ over its tokens of KL(π_θ‖π_ref), exact, in nats at T = 1; None for the reference's.
    """

    text: str
    tokens: int
    truncated: bool
    kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The policy's and the reference's response to a prompt.

    Args:
        number: Of the prompt among the held-out ones, from 0.
        sample: Which response to this prompt, from 0.
        seed: With which its batch was sampled, on both sides.
        messages: The prompt's.
        policy: Of the policy.
        reference: Of the reference.
    """

    number: int
    sample: int
    seed: int
    messages: tuple[Message, ...]
    policy: Response
    reference: Response

    @property
    def prompt(self) -> Prompt:
        """The prompt without the data set's own response, which no judge is to see."""
        return Prompt(messages=self.messages)


@dataclass(frozen=True, kw_only=True)
class Telling:
    """A principle that the policy is told in every prompt, as an estimator tells it.

    Args:
        principle: Its text.
        placement: Where it goes (:meth:`iqstar.chat.ChatFormat.prompt_ids`).
    """

    principle: str
    placement: str

    def tell(self, prompt: Prompt, chat: ChatFormat) -> Prompt:
        """The prompt with the principle in it.

        Raises:
            InputError: If the chat template drops it.
        """
        chat.prompt_ids(prompt.messages, self.principle, self.placement)
        messages = place_principle(prompt.messages, self.principle.strip(), self.placement)
        return replace(prompt, messages=tuple(messages))


def sample_pairs(
    policy: Policy,
    batches: Iterable[Sequence[Prompt]],
    *,
    like: RolloutEngine,
    samples: int,
    seed: int,
    telling: Telling | None = None,
) -> Iterator[Pair]:
    """Samples both sides as the fixed evaluation does (:mod:`iqstar.evaluation`).

    Where the policy is the reference, and at equal weights, both responses of a pair are equal.

    Args:
        policy: The policy and its reference.
        batches: Held-out prompts; the batches are those of ``iqstar validate``, as are the seeds.
        like: The engine whose length limit, stop strings and batch size are taken over.
        samples: Responses to each prompt.
        seed: The run's.
        telling: What the policy is told, and the reference never.
    """
    engine, first = evaluation_engine(like, samples), 0
    for batch, prompts in enumerate(batches):
        own = rollout_seed(seed, batch, 0)
        chat = policy.actor.chat
        asked = [telling.tell(prompt, chat) for prompt in prompts] if telling else prompts
        ours = theirs = engine.sample(policy.actor, asked, 1.0, own)
        if telling or policy.frozen is not policy.actor:
            with policy.reference() as model:
                theirs = engine.sample(model, prompts, 1.0, own)
        kl = divergences(policy, ours, theirs.prompts)["kl"].double().split(ours.lengths.tolist())
        sides = zip(
            responses(engine, policy.actor, ours, [float(part.sum()) for part in kl]),
            responses(engine, policy.actor, theirs),
            strict=True,
        )
        for row, (mine, other) in enumerate(sides):
            yield Pair(
                number=first + row // samples,
                sample=row % samples,
                seed=own,
                messages=theirs.prompts[row].messages,
                policy=mine,
                reference=other,
            )
        first += len(prompts)


def responses(
    engine: RolloutEngine, model: CausalLM, rollout: Rollout, kl: Sequence[float] | None = None
) -> list[Response]:
    """The rows of a rollout as texts.

    Args:
        engine: What sampled them.
        model: For its chat format.
        rollout: The responses.
        kl: Of every response, if measured.
    """
    texts = engine.texts(model.chat, rollout)
    rows = zip(texts, rollout.lengths.tolist(), rollout.truncated, strict=True)
    return [
        Response(
            text=text,
            tokens=tokens,
            truncated=bool(cut),
            kl=None if kl is None else kl[row],
        )
        for row, (text, tokens, cut) in enumerate(rows)
    ]


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Writes pairs as JSON lines; the file is there when it is whole."""
    with written_beside(path) as part, part.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")


def read_pairs(path: Path) -> list[Pair]:
    """Reads what :func:`write_pairs` wrote."""
    with path.open(encoding="utf-8") as file:
        return [_pair(json.loads(line)) for line in file]


def _pair(row: dict[str, Any]) -> Pair:
    messages = tuple(Message(**message) for message in row.pop("messages"))
    mine, other = (Response(**row.pop(side)) for side in ("policy", "reference"))
    return Pair(messages=messages, policy=mine, reference=other, **row)
