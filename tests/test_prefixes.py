"""What sequences begin with in common is read once, and nothing changes but rounding."""

import pytest
import torch

from iqstar.mdp import Prompt, make_rollout, pack
from iqstar.prefixes import KeyValues, common_prefix, hidden_states
from tiny import tiny_model

RESPONSES = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
SAME_START = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7], [1, 2, 3, 4, 5, 6, 7]]
TWO_PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5, 6, 7, 8], [4, 5, 6, 7, 8]]
BOTH = [[1, 2, 3], [1, 2, 3], [1, 2, 6, 7, 8], [1, 2, 6, 7, 8]]
NOTHING = [[1, 2], [2, 3], [3, 4], [4, 5]]
APART = [[1, 2, 3, 4], [2, 3], [3, 4, 5, 6, 7, 8], [4, 5, 6]]


def packed(contexts):
    rollout = make_rollout([Prompt(messages=())] * 4, RESPONSES, [True] * 4)
    return pack(contexts, rollout, pad_id=0)


class Counting(torch.nn.Module):
    """Counts the tokens that a model reads."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.tokens = model, model.config, []

    def forward(self, input_ids, **arguments):
        self.tokens.append(input_ids.numel())
        return self.model(input_ids=input_ids, **arguments)


def whole(model, sequences):
    states = model(input_ids=sequences.input_ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1)[sequences.predictors]


@pytest.mark.parametrize("contexts", [SAME_START, TWO_PROMPTS, BOTH, NOTHING])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_states_and_gradients_are_those_of_a_whole_pass(contexts, attention):
    model = tiny_model(torch.float64, attn_implementation=attention).model
    sequences = packed(contexts)
    found = []
    for states in (whole(model, sequences), hidden_states(model, sequences, worth=1)[0]):
        model.zero_grad()
        (states * torch.linspace(-1, 1, states.numel()).view_as(states).double()).sum().backward()
        found.append([states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    ours, theirs = found
    exact = 1e-12 if attention == "sdpa" else 1e-6  # eager's softmax is in float32
    torch.testing.assert_close(ours[0], theirs[0], atol=exact, rtol=exact)
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        # Llama's norms compute in float32, and sums over rows come before or after them.
        assert (one - other).norm() <= 1e-6 * one.norm()


def test_a_shared_beginning_is_read_once():
    model = Counting(tiny_model().model)
    hidden_states(model, packed(SAME_START), worth=1)
    assert model.tokens == [2, 4 * (7 + 4 - 2)]  # the stem, then four rows of the longest rest
    model.tokens.clear()
    hidden_states(model, packed(BOTH), worth=1)
    # The stem, two prompts without it and without their last token, four rows of it and a response.
    assert model.tokens == [2, 2 * 2, 4 * (1 + 4)]


def test_one_more_pass_has_to_pay():
    model = Counting(tiny_model().model)
    hidden_states(model, packed(SAME_START), worth=7)  # 2 tokens of 3 rows are 6
    assert len(model.tokens) == 1


@pytest.mark.parametrize("contexts", [SAME_START, BOTH, NOTHING, APART])
def test_another_context_goes_on_where_it_differs(contexts):
    counting = Counting(tiny_model(torch.float64).model)
    told = packed([[*c[:-1], 20, 21, c[-1]] for c in contexts])
    with torch.no_grad():
        _, known = hidden_states(counting, packed(contexts), worth=1)
        counting.tokens.clear()
        states, _ = hidden_states(counting, told, worth=1, known=known)
        torch.testing.assert_close(states, whole(counting.model, told), atol=1e-12, rtol=1e-12)
    assert sum(counting.tokens) <= told.input_ids.numel()
    if contexts is APART:  # nothing else is shared: three tokens of a context, and a response
        assert counting.tokens == [4 * (3 + 4)]


def test_common_prefix_leaves_every_row_a_token_that_predicts():
    assert common_prefix(SAME_START) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1, 2], [1]]) == 0
    assert common_prefix([[4], [4]]) == 0


def test_first_tokens_are_padded_on_the_right():
    values = torch.arange(8.0).view(2, 1, 4, 1)
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    first = KeyValues(layers=((values, -values),), mask=mask, padded=True).first([1, 2])
    keys, negated = first.layers[0]
    assert first.padded
    assert first.mask.tolist() == [[True, False], [True, True]]
    assert keys[0, 0, 0].item() == 0
    assert keys[1, 0, :, 0].tolist() == [4, 6]
    assert torch.equal(negated, -keys)
