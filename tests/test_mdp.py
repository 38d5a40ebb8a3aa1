"""The one shift by one and the one mask: properties of packing, over random shapes."""

import random

import pytest
import torch

from fitting import ask
from iqstar.mdp import Prompt, PromptBatch, TokenCredits, concatenate, make_rollout, pack
from iqstar.scoring import token_positions

EOS = PAD = 1  # the hard case: the same id


def cases(number=40):
    """Random contexts and responses; some responses end with EOS, some hold it, some are empty."""
    draw = random.Random(0)
    for _ in range(number):
        rows = draw.randint(1, 5)
        contexts = [[draw.randint(0, 9) for _ in range(draw.randint(1, 6))] for _ in range(rows)]
        responses = [[draw.randint(0, 9) for _ in range(draw.randint(0, 7))] for _ in range(rows)]
        ended = [draw.random() < 0.5 for _ in range(rows)]
        responses = [r + [EOS] * e for r, e in zip(responses, ended, strict=True)]
        truncated = [not e for e in ended]
        yield contexts, make_rollout([ask("a")] * rows, responses, truncated, PAD), responses


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 3])
def test_every_response_token_is_predicted_by_the_position_before_it(side, extra):
    for contexts, rollout, responses in cases():
        packed = pack(contexts, rollout, PAD, side, extra)
        flat, seq = packed.input_ids.flatten(), packed.input_ids.shape[1]
        assert flat[packed.predictors + 1].tolist() == [a for r in responses for a in r]
        assert flat[packed.predictors + 1].tolist() == rollout.actions.tolist()
        for i, (context, response) in enumerate(zip(contexts, responses, strict=True)):
            real = packed.attention_mask[i]
            assert packed.input_ids[i][real].tolist() == context + response
            assert packed.position_ids[i][real].tolist() == list(range(len(context + response)))
            mine = [int(p) - i * seq for p in packed.predictors if p // seq == i]
            # From the context's last token on: no prompt token is ever predicted.
            first = int(real.nonzero()[0]) + len(context) - 1
            assert mine == list(range(first, first + len(response)))
            gap = seq - int(real.sum())
            assert real.tolist() == (
                [False] * gap + [True] * (seq - gap)
                if side == "left"
                else [True] * (seq - gap) + [False] * gap
            )


def test_masks_come_from_lengths_also_where_pad_is_eos():
    rollout = make_rollout([ask("a")] * 3, [[5, EOS], [EOS], [5, 6, 7]], [False, False, True], PAD)
    assert rollout.response_mask.tolist() == [
        [True, True, False],
        [True, False, False],
        [True, True, True],
    ]
    assert rollout.actions.tolist() == [5, EOS, EOS, 5, 6, 7]
    assert rollout.lengths.tolist() == [2, 1, 3]
    assert token_positions(rollout).tolist() == [0, 1, 0, 0, 1, 2]


def test_rows_cut_the_padding_they_do_not_need_and_together_are_all():
    for _, rollout, responses in cases():
        parts = [rollout.rows(i, i + 2) for i in range(0, len(rollout), 2)]
        assert [r for p in parts for r in p.lengths.tolist()] == [len(r) for r in responses]
        assert torch.equal(torch.cat([p.actions for p in parts]), rollout.actions)
        assert all(p.response_ids.shape[1] == max(int(p.lengths.max()), 1) for p in parts)
        whole = concatenate(parts, PAD)
        assert torch.equal(whole.response_ids, rollout.response_ids)
        assert torch.equal(whole.response_mask, rollout.response_mask)
        assert torch.equal(whole.truncated, rollout.truncated)


def test_masked_out_responses_keep_their_row_and_lose_every_token():
    rollout = make_rollout([ask("a")] * 2, [[5, 6], [7, EOS]], [True, False], PAD)
    kept = rollout.without_truncated()
    assert kept.lengths.tolist() == [0, 2]
    assert rollout.lengths.tolist() == [2, 2]  # the argument is left alone
    packed = pack([[2, 3], [2]], kept, PAD)
    assert packed.input_ids.tolist() == [[2, 3, PAD], [2, 7, EOS]]
    assert packed.predictors.tolist() == [3, 4]


def test_a_context_without_tokens_is_refused():
    rollout = make_rollout([ask("a")], [[5]], [True])
    with pytest.raises(ValueError, match="BOS"):
        pack([[]], rollout, PAD)


def test_credits_are_indexed_together():
    n = torch.arange(4.0)
    tokens = TokenCredits(
        actions=n.long(), reference=n, credit=n + 1, weight=n + 2, behaviour=n + 3
    )
    part = tokens[torch.tensor([3, 1])]
    assert len(part) == 2
    assert [part.actions[0], part.reference[0], part.credit[0], part.weight[0]] == [3, 3, 4, 5]
    assert part.behaviour.tolist() == [6, 4]
    assert tokens[1:3].credit.tolist() == [2, 3]


def test_batches_of_prompts_compare_by_value():
    batch = PromptBatch(prompts=(ask("a"),), step=1, steps=2)
    assert batch == PromptBatch(prompts=(ask("a"),), step=1, steps=2)
    assert batch != PromptBatch(prompts=(ask("a"),), step=0, steps=2)
    assert batch != Prompt(messages=())
