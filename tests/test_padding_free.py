"""Rows of unequal length are read as one line of tokens, and nothing changes but rounding."""

import pytest
import torch

from iqstar import attention
from iqstar.admission import can_drop_padding
from iqstar.chat import ChatFormat
from iqstar.loading import load_policy
from iqstar.mdp import Prompt, make_rollout, pack
from iqstar.padding_free import LEAST, Line
from iqstar.policy import CausalLM, PolicySpec
from iqstar.prefixes import hidden_states
from test_prefixes import BOTH, NOTHING, SAME_START, TWO_PROMPTS, Counting, packed, whole
from tiny import tiny_folder, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def grouped(**settings):
    attention.register()
    return tiny_model(torch.float64, attn_implementation="grouped", **settings)


def gradients(model, states):
    model.zero_grad()
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    (states * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_line_and_its_rows():
    """Two rows, of two tokens and of one, with one head of size 1."""
    line = Line([2, 1], CPU)
    rows = line.apart(torch.tensor([[[[5.0], [6.0], [7.0]]]]))
    assert rows.tolist() == [[[[5.0], [6.0]]], [[[7.0], [0.0]]]]
    assert line.together(rows).flatten().tolist() == [5.0, 6.0, 7.0]
    assert line.starts.tolist() == [0, 2]
    assert line.places(torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]  # 2 begins the second row
    longer = Line([1, 3], CPU)
    assert longer.places(torch.tensor([0, 3, 5])).tolist() == [0, 1, 3]


def test_a_token_sees_real_ones_before_it():
    """One token of the past is padding in the second row; rows have two tokens and one."""
    line = Line([2, 1], CPU)
    hidden = line._mask(torch.tensor([[True, True], [True, False]])) == LEAST
    assert hidden[0, 0].int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert hidden[1, 0].int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]


def test_gradient_of_rows_and_line():
    line = Line([2, 0, 3], CPU)
    states = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(line.apart, states)
    assert torch.autograd.gradcheck(line.together, rows)


@pytest.mark.parametrize("contexts", [SAME_START, TWO_PROMPTS, BOTH, NOTHING])
@pytest.mark.parametrize("worth", [1, 1000])
def test_states_and_gradients_are_those_of_padded_rows(contexts, worth):
    """With beginnings that are read once, and without."""
    model = grouped().model
    sequences = packed(contexts)
    ours = hidden_states(model, sequences, worth, padding_free=True)[0]
    theirs = whole(model, sequences)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # norms are in float32
    one, other = gradients(model, ours), gradients(model, theirs)
    assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("contexts", [SAME_START, BOTH, NOTHING])
def test_another_context_goes_on_from_a_line(contexts):
    """The told rows differ in length, and what they go on from does too."""
    model = grouped().model
    told = [[*c[:-1], *range(20, 21 + i), c[-1]] for i, c in enumerate(contexts)]
    with torch.no_grad():
        _, known = hidden_states(model, packed(contexts), 1, padding_free=True)
        ours, _ = hidden_states(model, packed(told), 0, known, padding_free=True)
        torch.testing.assert_close(ours, whole(model, packed(told)), atol=1e-6, rtol=1e-6)


def test_no_padding_is_read():
    model = Counting(grouped().model)
    contexts = [[1], [1, 2, 3, 4, 5]]
    rollout = make_rollout([Prompt(messages=())] * 2, [[6, 7], [8]], [True] * 2)
    sequences = pack(contexts, rollout, pad_id=0)
    hidden_states(model, sequences, worth=100, padding_free=True)
    hidden_states(model, sequences, worth=100)
    assert model.tokens == [3 + 6, 2 * 6]


def test_what_lies_in_padding_never_matters():
    model, contexts = grouped().model, NOTHING
    rollout = make_rollout([Prompt(messages=())] * 4, [[5, 6, 7], [8], [9, 10], [11]], [True] * 4)
    found = [
        hidden_states(model, pack(contexts, rollout, pad_id=pad), 100, padding_free=True)[0]
        for pad in (0, 13)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "settings",
    [
        {"share_prefixes": False},
        {"share_prefixes": False, "gradient_checkpointing": True},
        {"dtype": "bfloat16"},
    ],
)
def test_a_loaded_policy(tmp_path, settings):
    """States and gradients with and without padding; a frozen copy gives the policy's bits."""
    folder = str(tiny_folder(tmp_path))
    found = []
    for without in (True, False):
        spec = PolicySpec(
            model=folder, attn_implementation="grouped", padding_free=without, **settings
        )
        policy = load_policy(spec, spec.chat(), "32-true")
        assert policy.actor.padding_free == without
        policy.actor.train()
        states = policy.actor.hidden(packed(NOTHING))
        with policy.reference() as reference:
            assert reference.padding_free == without
            assert torch.equal(reference.hidden(packed(NOTHING)), states)
        found.append((states, gradients(policy.actor, states)))
    (ours, mine), (theirs, others) = found
    exact = 0.05 if "dtype" in settings else 1e-5
    torch.testing.assert_close(ours, theirs, atol=exact, rtol=exact)
    assert (mine - others).norm() <= exact * others.norm()


def test_other_models_keep_their_padding():
    attention.register()
    chat = ChatFormat(tiny_tokenizer())
    assert can_drop_padding(CausalLM(grouped(), chat))
    assert not can_drop_padding(CausalLM(tiny_model(attn_implementation="sdpa"), chat))
    windowed = grouped()
    windowed.config.sliding_window = 4
    assert not can_drop_padding(CausalLM(windowed, chat))


def test_a_model_that_hands_attention_nothing_keeps_its_padding():
    """Some architectures do not pass on what they do not know."""

    class Closed(torch.nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.config = body, body.config

        def forward(self, input_ids, attention_mask=None, position_ids=None, **more):
            kept = {k: v for k, v in more.items() if k != "line"}
            return self.body(input_ids, attention_mask, position_ids, **kept)

    model = grouped()
    model.model = Closed(model.model)
    assert not can_drop_padding(CausalLM(model, ChatFormat(tiny_tokenizer())))
