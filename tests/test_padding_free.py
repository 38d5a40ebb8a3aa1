"""Rows of unequal length are read as one line of tokens, and nothing changes but rounding."""

import copy

import pytest
import torch

from iqstar import attention
from iqstar.admission import can_drop_padding
from iqstar.chat import ChatFormat
from iqstar.loading import load_policy
from iqstar.mdp import Prompt, make_rollout, pack
from iqstar.padding_free import LEAST, Group, Line, Rows, grouped
from iqstar.policy import CausalLM, PolicySpec
from iqstar.prefixes import hidden_states
from test_prefixes import APART, BOTH, NOTHING, SAME_START, TWO_PROMPTS, Counting, packed, whole
from tiny import tiny_folder, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def grouped_model(**settings):
    attention.register()
    return tiny_model(torch.float64, attn_implementation="grouped", **settings)


def gradients(model, states):
    model.zero_grad()
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    (states * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_tokens_in_rows():
    """Two rows, of two tokens and of one, with one head of size 1."""
    rows = Rows.of([2, 1], CPU)
    padded = rows.apart(torch.tensor([[[5.0]], [[6.0]], [[7.0]]]))
    assert padded.tolist() == [[[[5.0], [6.0]]], [[[7.0], [0.0]]]]
    assert rows.together(padded).flatten().tolist() == [5.0, 6.0, 7.0]


def test_gradient_of_rows():
    rows = Rows.of([2, 0, 3], CPU)
    tokens = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rows.apart, tokens)
    assert torch.autograd.gradcheck(rows.together, padded)


def test_a_token_sees_real_ones_before_it():
    """The rows have two tokens and one, after two known ones and one."""
    hidden = Group([0, 1], [2, 1], [2, 1], CPU).mask == LEAST
    assert hidden[0, 0].int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert hidden[1, 0].int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert len(Group([0, 1], [2, 1], [2, 2], CPU).mask) == 1


def test_rows_of_similar_length_are_attended_to_together():
    assert grouped([2, 10, 8, 0, 9], [0] * 5) == [[1, 4, 2, 0]]
    # 2·300·300 scores, 290·290 + 300·300 of them real; with 10·10 more there are 3·300·300.
    assert grouped([10, 290, 300], [0] * 3) == [[2, 1], [0]]
    assert grouped([200, 200], [0, 800]) == [[1], [0]]  # what was read before counts
    assert grouped([1024] * 2, [0] * 2) == [[0], [1]]  # many scores
    assert grouped([512] * 3, [0] * 3) == [[0, 1], [2]]


def test_places_in_a_line():
    line = Line([1, 10, 9], CPU, [2, 0, 0])
    assert line.rows.row.tolist() == [1] * 10 + [2] * 9 + [0]
    assert line.rows.column.tolist() == [*range(10), *range(9), 0]
    assert line.positions.tolist() == [*range(10), *range(9), 2]
    assert line.starts.tolist() == [19, 0, 10]


@pytest.mark.parametrize("contexts", [SAME_START, TWO_PROMPTS, BOTH, NOTHING])
@pytest.mark.parametrize("worth", [1, 1000])
def test_states_and_gradients_are_those_of_padded_rows(contexts, worth):
    """With beginnings that are read once, and without."""
    model = grouped_model().model
    sequences = packed(contexts)
    ours = hidden_states(model, sequences, worth, padding_free=True)[0]
    theirs = whole(model, sequences)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # norms are in float32
    one, other = gradients(model, ours), gradients(model, theirs)
    assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("contexts", [SAME_START, BOTH, NOTHING, APART])
def test_another_context_goes_on_from_a_line(contexts):
    """The told rows differ in length, and what they go on from does too."""
    model = Counting(grouped_model().model)
    told = [[*c[:-1], *range(20, 21 + i), c[-1]] for i, c in enumerate(contexts)]
    with torch.no_grad():
        _, known = hidden_states(model, packed(contexts), 1, padding_free=True)
        model.tokens.clear()
        ours, _ = hidden_states(model, packed(told), 1, known, padding_free=True)
        torch.testing.assert_close(ours, whole(model.model, packed(told)), atol=1e-6, rtol=1e-6)
    if contexts is APART:  # what is told, the last token of a context, and a response
        assert model.tokens == [(1 + 2 + 3 + 4) + 4 + (3 + 1 + 2 + 4)]


@pytest.mark.parametrize("contexts", [SAME_START, TWO_PROMPTS, BOTH, NOTHING])
def test_under_autocast(contexts):
    """A cache holds keys of another dtype than attention computes in."""
    attention.register()
    model = tiny_model(torch.float32, attn_implementation="grouped").model
    found = []
    for free in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            states = hidden_states(model, packed(contexts), 1, padding_free=free)[0]
        found.append((states, gradients(model, states)))
    (ours, mine), (theirs, others) = found
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)
    assert (mine - others).norm() <= 0.05 * others.norm()


def test_a_mask_does_not_depend_on_the_default_dtype():
    """Lightning's 16-true changes it."""
    torch.set_default_dtype(torch.float16)
    try:
        assert Group([0, 1], [2, 1], [2, 1], CPU).mask.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_keys_and_values_are_kept_where_they_are_wanted():
    model = grouped_model().model
    with torch.no_grad():
        for keep in (True, False):
            _, known = hidden_states(model, packed(APART), 1, padding_free=True, keep=keep)
            assert len(known.keys.layers) == (2 if keep else 0)


def test_a_layer_that_saw_no_line_is_an_error():
    model = grouped_model().model
    model.layers[1].self_attn.config = copy.copy(model.config)
    model.layers[1].self_attn.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="1 of 2 layers"):
        hidden_states(model, packed(NOTHING), 1, padding_free=True)


def test_no_padding_is_read():
    model = Counting(grouped_model().model)
    contexts = [[1], [1, 2, 3, 4, 5]]
    rollout = make_rollout([Prompt(messages=())] * 2, [[6, 7], [8]], [True] * 2)
    sequences = pack(contexts, rollout, pad_id=0)
    hidden_states(model, sequences, worth=100, padding_free=True)
    hidden_states(model, sequences, worth=100)
    assert model.tokens == [3 + 6, 2 * 6]


def test_what_lies_in_padding_never_matters():
    model, contexts = grouped_model().model, NOTHING
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
    assert can_drop_padding(CausalLM(grouped_model(), chat))
    assert not can_drop_padding(CausalLM(tiny_model(attn_implementation="sdpa"), chat))
    windowed = grouped_model()
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

    model = grouped_model()
    model.model = Closed(model.model)
    assert not can_drop_padding(CausalLM(model, ChatFormat(tiny_tokenizer())))
