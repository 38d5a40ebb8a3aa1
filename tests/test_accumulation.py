"""Micro-batches of one optimiser step hold rows of similar length; other steps keep their rows."""

import pytest
import torch

from fitting import ask, fit, make_module
from iqstar.accumulation import by_length
from iqstar.mdp import make_rollout
from iqstar.module import InverseQStar
from iqstar.rollouts import DatasetRollout


def rows(lengths, prompts=None):
    """A row of each length whose tokens tell its number."""
    responses = [[number] * n for number, n in enumerate(lengths)]
    prompts = prompts or [ask(str(number)) for number in range(len(lengths))]
    return make_rollout(prompts, responses, [n > 5 for n in lengths])


@pytest.mark.parametrize(
    ("size", "accumulate", "batches", "order"),
    [
        (2, 4, 24, [1, 3, 5, 7, 6, 4, 2, 0]),
        (2, 2, 24, [1, 3, 2, 0, 5, 7, 6, 4]),  # two optimiser steps, each with its own rows
        (2, 1, 24, range(8)),  # each micro-batch is one
        (2, 3, 24, range(8)),  # a window would begin in one epoch and end in the next
        (2, 2, 23, range(8)),  # the last window is cut: not to its shortest rows
        (2, 2, float("inf"), range(8)),
        (8, 4, 24, range(8)),
    ],
)
def test_rows_stay_in_their_optimiser_step(size, accumulate, batches, order):
    lengths = [9, 1, 7, 2, 6, 3, 5, 4]
    found = by_length(rows(lengths), lambda _: 3, size, accumulate, batches)
    assert found.response_ids[:, 0].tolist() == list(order)
    assert found.lengths.tolist() == [lengths[row] for row in order]
    assert found.truncated.tolist() == [lengths[row] > 5 for row in order]


def test_responses_to_one_prompt_stay_together():
    """By the longest of them, with the prompt's tokens."""
    long, short = ask("a b c d"), ask("a")
    found = by_length(
        rows([1, 2, 3, 6], [long, long, short, short]),
        lambda prompt: 9 if prompt == long else 1,
        size=2,
        accumulate=2,
        batches=24,
    )
    assert found.prompts == (short, short, long, long)


class Watched(InverseQStar):
    """Remembers the widths of micro-batches."""

    def assign(self, *arguments, **options):
        parts = super().assign(*arguments, **options)
        self.widths = [part.sequences.input_ids.shape[1] for part in parts]
        return parts


def test_short_conversations_are_trained_on_together(tiny):
    """Prompts alternate in length; the gradient is that of the rows as they came."""
    texts = (
        "Hi",
        "Why is it so, and is the inner ring on?",
        "Go",
        "And you, is it so on the ring?",
    )
    prompts = tuple(ask(text, response="Yes.") for text in texts)
    found = {}
    for accumulate in (1, 2):
        module = make_module(
            tiny,
            kind=Watched,
            spec={"dtype": "float64"},
            rollout=DatasetRollout(max_new_tokens=5),
            micro_batch_size=2 if accumulate == 2 else None,
        )
        options = {"accumulate_grad_batches": accumulate, "precision": "64-true"}
        run = fit(module, prompts, max_steps=1, **options)
        found[accumulate] = module.widths, run.gradients[0]
    (whole,), one = found[1]
    (short, long), two = found[2]
    assert short < long == whole
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
