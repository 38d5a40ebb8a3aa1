"""Rollouts: ends and masks (identity 7), the engine's own log-probs (9), seeds, reuse."""

import math

import pytest
import torch

from fitting import PROMPTS, ask, attach, fit, make_module
from iqstar import decoding
from iqstar.baselines import GRPO
from iqstar.chat import ChatFormat
from iqstar.errors import InputError
from iqstar.estimators import NullEstimator
from iqstar.evaluation import evaluation_engine, sample_and_score
from iqstar.judges import Judge
from iqstar.loading import load_policy
from iqstar.losses import TokenPolicyGradientLoss
from iqstar.mdp import PromptBatch
from iqstar.paired_responses import sample_pairs
from iqstar.policy import PolicySpec
from iqstar.rollouts import (
    DatasetRollout,
    GenerateRollout,
    MixtureRollout,
    RolloutEngine,
    _ended,
    rollout_seed,
)
from iqstar.sampling import CategoricalSampler, uniform_numbers
from iqstar.scoring import RolloutScorer
from tiny import EOS, tiny_folder, tiny_model, tiny_tokenizer


def load(folder, precision="32-true", **spec):
    spec = PolicySpec(model=str(folder), **spec)
    return load_policy(spec, spec.chat(), precision)


@pytest.fixture(scope="module")
def policy(tiny):
    return load(tiny)


def responses(rollout):
    return [
        row[mask].tolist()
        for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]


#: So many end-of-sequence ids that a random model meets one about every seventh token.
ENDS = (1, *range(100, 140))


def stopping(folder, **options):
    """A model whose generation config names all of ``ENDS``."""
    tiny_folder(folder, **options)
    settings = tiny_model().generation_config
    settings.eos_token_id = list(ENDS)
    settings.save_pretrained(folder)
    return folder


# ---- identity 7: the token that ended a response is an action


@pytest.mark.parametrize("pad", ["eos", "own", None])
def test_the_end_is_inside_the_mask_and_only_there(tmp_path, pad):
    policy = load(stopping(tmp_path / "model", pad=pad))
    assert set(policy.actor.chat.eos_ids) == set(ENDS) | {policy.actor.chat.tokenizer.eos_token_id}
    engine = GenerateRollout(max_new_tokens=12, responses_per_prompt=8)
    rollout = engine.roll_out(policy, PROMPTS, 1.0, 0)
    ends = set()
    for row, cut, mask in zip(
        responses(rollout), rollout.truncated.tolist(), rollout.response_mask, strict=True
    ):
        assert mask.tolist() == [True] * len(row) + [False] * (len(mask) - len(row))
        assert not set(ENDS) & set(row[:-1])
        assert cut == (row[-1] not in ENDS)
        assert len(row) == 12 if cut else len(row) <= 12
        ends |= {row[-1]} & set(ENDS)
    assert len(ends) > 3  # several of them did end a response
    assert 0 < rollout.truncated.sum() < len(rollout)


def test_a_response_that_ends_at_the_limit_is_not_truncated():
    chat = ChatFormat(tiny_tokenizer())
    assert _ended([5, 6, 1], [1], 3, (), chat.decode) == ([5, 6, 1], False)
    assert _ended([5, 6, 7], [1], 3, (), chat.decode) == ([5, 6, 7], True)
    assert _ended([5, 1, 1], [1], 3, (), chat.decode) == ([5, 1], False)  # pad = EOS behind it
    assert _ended([1, 1, 1], [1], 3, (), chat.decode) == ([1], False)


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("Yes.\n\nHuman: And?", ["\n\nHuman:"], "Yes.\n\nHuman:"),
        ("the ring and the sand", ["and", "ring"], "the ring"),
        ("the ring", ["and"], None),
    ],
)
def test_a_stop_string_ends_a_response_where_it_is_complete(text, stops, kept):
    """The tokens that complete it are actions, like an EOS token; what follows is not."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    row, cut = _ended(ids, [1], len(ids), stops, tokenizer.decode)
    assert cut == (kept is None)
    assert tokenizer.decode(row) == (kept or text)
    if kept:
        assert not any(stop in tokenizer.decode(row[:-1]) for stop in stops)


def test_an_end_before_the_stop_string_comes_first():
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer("the")["input_ids"], 1, *tokenizer(" stop")["input_ids"]]
    row, cut = _ended(ids, [1], len(ids), ["stop"], tokenizer.decode)
    assert (row[-1], cut) == (1, False)


def test_generation_stops_at_stop_strings(policy):
    """Any letter stops: then every reply is short, and not truncated."""
    engine = GenerateRollout(max_new_tokens=40, stop_strings=list("abcdefghijklmnopqrstuvwxyz"))
    rollout = engine.roll_out(policy, PROMPTS, 1.0, 0)
    for row, cut in zip(responses(rollout), rollout.truncated.tolist(), strict=True):
        letters = [any(c.islower() for c in policy.actor.chat.tokenizer.decode([i])) for i in row]
        assert cut or letters[-1]
        assert not any(letters[:-1])
    assert not rollout.truncated.all()


def test_texts_end_where_the_engines_stop_string_begins(tiny):
    module = attach(make_module(tiny))
    chat, data = module.chat, DatasetRollout(40)
    prompts = (ask("a", "the ring and the sand", complete=False), ask("a", "you"))
    rollout = data.roll_out(module.policy, prompts, 1.0, 0)
    assert data.texts(chat, rollout) == ["the ring and the sand", "you"]
    engine = GenerateRollout(stop_strings=["sand", "and", "zzz"])
    assert engine.texts(chat, rollout) == ["the ring ", "you"]
    assert evaluation_engine(engine, 2).texts(chat, rollout) == ["the ring ", "you"]
    hh = ChatFormat(tiny_tokenizer(), template="hh")
    ids = hh.response_ids("Yes.\n\nHuman: And", complete=False)
    assert hh.decode(ids) == "Yes."
    assert hh.decode(ids, ["s."]) == "Ye"
    assert hh.decode(ids, []) == "Yes.\n\nHuman: And"


class Letters(Judge):
    """Keeps what it was shown."""

    name, version = "letters", "1"

    def __init__(self):
        self.seen = []

    def score(self, prompts, responses):
        self.seen += responses
        return [0.5] * len(responses)


def test_nobody_is_shown_a_stop_string(tiny):
    """Any vowel stops: then no text has one, wherever it is decoded."""
    engine = GenerateRollout(12, responses_per_prompt=2, stop_strings=list("aeiou"))
    judge = Letters()
    module = attach(GRPO(PolicySpec(model=str(tiny)), judge, rollout=engine, judge=judge))
    texts = [row["response"] for row in module.predict_step(PromptBatch(prompts=PROMPTS), 0)]
    module.collect(PROMPTS, 0)  # the reward is asked
    records, _ = sample_and_score(module.policy, PROMPTS, judge, like=engine, samples=2, seed=0)
    texts += [record.response for record in records]
    pairs = list(sample_pairs(module.policy, [PROMPTS], like=engine, samples=2, seed=0))
    texts += [side.text for pair in pairs for side in (pair.policy, pair.reference)]
    assert len(judge.seen) == 16
    for text in [*texts, *judge.seen]:
        assert not set("aeiou") & set(text)


def test_truncated_responses_can_be_left_out(tmp_path):
    folder = stopping(tmp_path / "model")
    engine = GenerateRollout(max_new_tokens=8, responses_per_prompt=8)
    both = [
        attach(make_module(folder, rollout=engine, mask_truncated=masked)).collect(PROMPTS, 0)[0]
        for masked in (False, True)
    ]
    cut = both[0].rollout.truncated
    assert 0 < cut.sum() < len(cut)
    assert both[1].rollout.lengths.tolist() == [
        0 if c else n for n, c in zip(both[0].rollout.lengths.tolist(), cut.tolist(), strict=True)
    ]
    assert torch.equal(both[1].rollout.truncated, cut)  # still counted
    keep = (~cut).repeat_interleave(both[0].rollout.lengths)
    assert torch.equal(both[1].tokens.actions, both[0].tokens.actions[keep])
    torch.testing.assert_close(both[1].tokens.credit, both[0].tokens.credit[keep])


# ---- identity 9: what the engine thought of its samples is what we think of them


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-5), ("bf16-mixed", 0.15)])
@pytest.mark.parametrize("attention", [None, "grouped"])
@pytest.mark.parametrize("own", [True, False], ids=["decode", "generate"])
def test_our_scoring_agrees_with_the_engine(
    tmp_path, monkeypatch, precision, bound, attention, own
):
    """Cached, left-padded decoding, step by step, against one packed forward.

    Every row and step has its own uniform number, so that it tells whose logits the sampler saw.
    """
    folder = stopping(tmp_path / "model")
    module = attach(make_module(folder, spec={"attn_implementation": attention}), precision)
    policy, temperature, limit = module.policy, 0.7, 10
    seen, draw = {}, CategoricalSampler.draw

    def spy(self, logits, uniform):
        seen.update(zip(uniform.tolist(), logits.float(), strict=True))
        return draw(self, logits, uniform)

    monkeypatch.setattr(CategoricalSampler, "draw", spy)
    if not own:
        monkeypatch.setattr(decoding, "fits", lambda *_: False)
    engine = GenerateRollout(max_new_tokens=limit, responses_per_prompt=3)
    with module.trainer.precision_plugin.forward_context():
        rollout = engine.roll_out(policy, PROMPTS, temperature, 0)
        ours = RolloutScorer(policy, [rollout], temperature).behaviour()
    numbers = uniform_numbers(len(rollout), limit, 0, torch.device("cpu"))
    numbers = numbers[:, : rollout.response_ids.shape[1]][rollout.response_mask]
    logits = torch.stack([seen[number] for number in numbers.tolist()])
    theirs = (logits[:, : policy.actor.chat.vocab_size] / temperature).log_softmax(-1)
    gap = (ours - theirs.gather(1, rollout.actions[:, None])[:, 0]).abs()
    print(f"engine gap, {precision}: mean {gap.mean():.2g}, largest {gap.max():.2g} nats")
    assert len(set(rollout.lengths.tolist())) > 1
    assert gap.max() < bound


# ---- sampling


def test_the_sampler_draws_from_the_distribution():
    """10,000 draws at T = 2; every frequency within 5 standard deviations."""
    logits = torch.tensor([0.0, 1.0, 2.0, -3.0, 9.0])  # the last one is padding
    sampler = CategoricalSampler(temperature=2.0, vocab_size=4)
    number = 10_000
    uniform = uniform_numbers(number, 1, 0, torch.device("cpu"))[:, 0]
    drawn = sampler.draw(logits.expand(number, 5), uniform)
    expected = (logits[:4] / 2).softmax(-1)
    found = torch.bincount(drawn, minlength=5)[:5] / number
    assert found[4] == 0
    assert ((found[:4] - expected).abs() < 5 * (expected * (1 - expected) / number).sqrt()).all()


def test_padded_rows_of_the_vocabulary_are_never_sampled(policy):
    engine = GenerateRollout(max_new_tokens=20, responses_per_prompt=10)
    rollout = engine.roll_out(policy, PROMPTS, 50.0, 0)  # nearly uniform
    assert policy.actor.chat.vocab_size < 320
    assert rollout.actions.max() < policy.actor.chat.vocab_size
    assert len(set(rollout.actions.tolist())) > 150


def test_responses_of_one_prompt_stand_side_by_side(policy):
    rollout = GenerateRollout(max_new_tokens=4, responses_per_prompt=3).roll_out(
        policy, PROMPTS, 1.0, 0
    )
    assert rollout.prompts == tuple(p for p in PROMPTS for _ in range(3))
    assert len({tuple(r) for r in responses(rollout)}) > len(PROMPTS)


def test_a_seed_fixes_the_responses_and_nothing_else(policy):
    engine = GenerateRollout(max_new_tokens=8)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = engine.roll_out(policy, PROMPTS, 1.0, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert responses(engine.roll_out(policy, PROMPTS, 1.0, 3)) == responses(first)
    assert responses(engine.roll_out(policy, PROMPTS, 1.0, 4)) != responses(first)


def test_every_run_step_and_rank_has_a_seed_of_its_own():
    seeds = {
        rollout_seed(run, step, rank) for run in range(5) for step in range(20) for rank in range(4)
    }
    assert len(seeds) == 5 * 20 * 4
    assert rollout_seed(1, 2, 3) == rollout_seed(1, 2, 3)


@pytest.mark.parametrize("own", [True, False], ids=["decode", "generate"])
def test_the_size_of_batches_changes_no_response(tmp_path, monkeypatch, own):
    """Every row has uniform numbers of its own, and results come in the order of the prompts."""
    policy = load(stopping(tmp_path / "model"), dtype="float64")
    if not own:
        monkeypatch.setattr(decoding, "fits", lambda *_: False)
    whole, *parts = (
        GenerateRollout(max_new_tokens=12, responses_per_prompt=3, batch_size=size).roll_out(
            policy, PROMPTS, 1.0, 0
        )
        for size in (None, 1, 5)
    )
    assert len(whole) == 3 * len(PROMPTS)
    assert len(set(whole.lengths.tolist())) > 2
    for part in parts:
        assert part.prompts == whole.prompts
        assert responses(part) == responses(whole)
        assert torch.equal(part.truncated, whole.truncated)


def test_a_checkpoints_own_sampling_settings_are_ignored(tiny, tmp_path):
    """top_k = 1, a temperature of 0.1 and a penalty would all change what is drawn."""
    folder = tiny_folder(tmp_path / "model")
    model = tiny_model()
    for name, value in {
        "do_sample": True,
        "top_k": 1,
        "temperature": 0.1,
        "repetition_penalty": 2.0,
        "min_new_tokens": 3,
    }.items():
        setattr(model.generation_config, name, value)
    model.generation_config.save_pretrained(folder)
    engine = GenerateRollout(max_new_tokens=8, responses_per_prompt=4)
    own, plain = (engine.roll_out(load(f), PROMPTS, 1.0, 0) for f in (folder, tiny))
    assert responses(own) == responses(plain)
    assert len({tuple(r) for r in responses(own)[:4]}) > 1


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5}])
def test_truncated_sampling_works_and_warns(policy, options):
    with pytest.warns(UserWarning, match="biases the expected gradient"):
        engine = GenerateRollout(max_new_tokens=4, **options)
    assert len(engine.roll_out(policy, PROMPTS, 1.0, 0)) == len(PROMPTS)


def test_top_k_of_one_is_greedy(policy):
    with pytest.warns(UserWarning, match="biases"):
        engine = GenerateRollout(max_new_tokens=6, top_k=1)
    assert responses(engine.roll_out(policy, PROMPTS, 1.0, 0)) == responses(
        engine.roll_out(policy, PROMPTS, 1.0, 1)
    )


def test_the_reference_can_be_the_source(tiny):
    policy = load(tiny)
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours, theirs = (
        GenerateRollout(max_new_tokens=8, source=source) for source in ("policy", "reference")
    )
    assert ours.on_policy
    assert not theirs.on_policy
    plain = ours.roll_out(load(tiny), PROMPTS, 1.0, 0)
    assert responses(theirs.roll_out(policy, PROMPTS, 1.0, 0)) == responses(plain)
    assert responses(ours.roll_out(policy, PROMPTS, 1.0, 0)) != responses(plain)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"responses_per_prompt": 0}, {"batch_size": -1}]
)
def test_senseless_numbers_are_refused(options):
    with pytest.raises(InputError, match=f"model.rollout.init_args.{next(iter(options))}"):
        GenerateRollout(**options)


def test_sampling_needs_a_positive_temperature(policy):
    with pytest.raises(InputError, match=r"model\.temperature"):
        GenerateRollout().roll_out(policy, PROMPTS, 0.0, 0)


def test_a_prompt_over_the_models_positions_is_an_error(tmp_path):
    policy = load(tiny_folder(tmp_path / "short", max_position_embeddings=40))
    with pytest.raises(InputError, match="40 positions"):
        GenerateRollout(max_new_tokens=30).roll_out(policy, PROMPTS, 1.0, 0)


# ---- the data set's own responses


def test_a_complete_reply_ends_its_turn_inside_the_mask_and_a_cut_one_does_not(policy):
    chat = policy.actor.chat
    (end,) = chat.end_of_turn
    assert end == chat.tokenizer.convert_tokens_to_ids(EOS)
    prompts = (ask("a", "the ring"), ask("a", "the ring", complete=False), ask("a", "the ring" * 9))
    whole, cut, long = responses(rollout := DatasetRollout(20).roll_out(policy, prompts, 1.0, 0))
    assert whole == [*cut, end]
    assert chat.decode(whole) == chat.decode(cut) == "the ring"
    assert len(long) == 20
    assert end not in long
    assert rollout.truncated.tolist() == [False, True, True]
    assert not DatasetRollout(20).on_policy


def test_a_reply_cannot_end_itself_early(policy):
    """The name of a special token inside a reply is text."""
    (row,) = responses(DatasetRollout(99).roll_out(policy, (ask("a", f"x{EOS}y"),), 1.0, 0))
    assert row.count(1) == 1
    assert row[-1] == 1


@pytest.mark.parametrize("response", [None, ""])
def test_a_prompt_without_a_reply_is_an_error(policy, response):
    with pytest.raises(InputError, match="'Where is it' has none"):
        DatasetRollout().roll_out(policy, (ask("Where is it", response),), 1.0, 0)


# ---- mixtures


def mixed(weights):
    return MixtureRollout([GenerateRollout(max_new_tokens=3), DatasetRollout(9)], weights)


def test_a_mixture_draws_its_sources_with_their_weights(policy):
    """400 prompts, ¼ from the data set: 100 ± 5 · √(400 · ¼ · ¾) ≈ 100 ± 43."""

    class Named(RolloutEngine):
        max_new_tokens = 3

        def __init__(self, name):
            self.name, self.on_policy = name, name == "a"

        def roll_out(self, policy, prompts, temperature, seed):
            seen[self.name] += len(prompts)
            return DatasetRollout(3).roll_out(policy, prompts, temperature, seed)

    seen = {"a": 0, "b": 0}
    prompts = [ask(str(i), "a") for i in range(400)]
    mixture = MixtureRollout([Named("a"), Named("b")], [3.0, 1.0])
    rollout = mixture.roll_out(policy, prompts, 1.0, 0)
    assert sorted(p.messages[0].content for p in rollout.prompts) == sorted(
        p.messages[0].content for p in prompts
    )
    assert sum(seen.values()) == 400
    assert abs(seen["b"] - 100) < 43
    assert not mixture.on_policy


def test_responses_of_a_mixture_are_in_the_order_of_their_prompts(policy):
    """Else the first optimiser steps of a rollout would be of one source, the last of another."""
    prompts = [ask(str(i), "a" * (1 + i % 5)) for i in range(12)]
    given = DatasetRollout(9).roll_out(policy, prompts, 1.0, 0)
    rollout = mixed([1.0, 1.0]).roll_out(policy, prompts, 1.0, 0)
    assert rollout.prompts == given.prompts
    same = [a == b for a, b in zip(rollout.responses, given.responses, strict=True)]
    assert any(same)
    assert not all(same)
    assert same != sorted(same)
    assert same != sorted(same, reverse=True)

    both = [GenerateRollout(max_new_tokens=3, responses_per_prompt=2) for _ in range(2)]
    twice = MixtureRollout(both, [1.0, 1.0]).roll_out(policy, prompts, 1.0, 0)
    assert twice.prompts == tuple(prompt for prompt in prompts for _ in range(2))


def test_a_mixture_of_one_is_that_one(policy):
    prompts = [ask("Hi", "the ring"), ask("Go on.", "a")]
    assert responses(mixed([0.0, 1.0]).roll_out(policy, prompts, 1.0, 0)) == responses(
        DatasetRollout(9).roll_out(policy, prompts, 1.0, 0)
    )
    assert mixed([1.0, 1.0]).max_new_tokens == 9


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_senseless_weights_are_refused(weights):
    with pytest.raises(InputError, match=r"model\.rollout\.init_args\.weights"):
        mixed(weights)


def test_engines_of_a_mixture_agree_on_responses_per_prompt():
    with pytest.raises(InputError, match="responses_per_prompt must agree"):
        MixtureRollout([GenerateRollout(responses_per_prompt=2), DatasetRollout()], [1.0, 1.0])


# ---- several optimiser steps per rollout


class Counted(GenerateRollout):
    """Counts what is asked of it."""

    def roll_out(self, policy, prompts, temperature, seed):
        self.seeds = [*getattr(self, "seeds", []), seed]
        return super().roll_out(policy, prompts, temperature, seed)


def test_a_rollout_is_used_for_several_steps_and_then_replaced(tiny):
    """4 prompts in micro-batches of 2, 3 passes: 6 steps a rollout, each micro-batch 3 times."""
    engine, used = Counted(max_new_tokens=4), []
    module = make_module(
        tiny,
        loss=TokenPolicyGradientLoss(),
        rollout=engine,
        micro_batch_size=2,
        epochs_per_rollout=3,
    )
    losses = module.losses

    def spy(micro):
        tokens = micro.tokens
        used.append((tokens.actions.clone(), tokens.behaviour.clone(), tokens.credit.clone()))
        return losses(micro)

    module.losses = spy
    run = fit(module, max_steps=12)
    assert len(engine.seeds) == 2
    assert engine.seeds[0] != engine.seeds[1]
    assert len(used) == len(run.losses) == 12
    for start in (0, 6):  # each rollout
        first = used[start : start + 2]
        for step in range(6):
            for ours, original in zip(used[start + step], first[step % 2], strict=True):
                assert torch.equal(ours, original)  # frozen at the rollout, behaviour included
    assert not torch.equal(used[0][1], used[6][1])
    # The weights have moved since, so the ratio to the frozen log-probs is no longer 1.
    assert run.curves[0]["train/kl"] == pytest.approx(0, abs=1e-6)
    assert run.curves[5]["train/kl"] > 1e-4


def test_an_accumulation_window_that_does_not_fit_the_rollout_is_an_error(tiny):
    module = make_module(tiny, micro_batch_size=1)
    with pytest.raises(InputError, match=r"trainer\.accumulate_grad_batches"):
        fit(module, PROMPTS * 2, accumulate_grad_batches=3)


def test_the_policy_gradient_refuses_responses_that_are_not_its_own(tiny):
    for rollout in (DatasetRollout(), GenerateRollout(source="reference"), mixed([1.0, 1.0])):
        with pytest.raises(InputError, match=r"model\.loss: TokenPolicyGradientLoss needs"):
            make_module(tiny, NullEstimator(), loss=TokenPolicyGradientLoss(), rollout=rollout)


def test_the_loss_at_the_start_of_on_policy_training_is_that_of_the_formula(tiny):
    """Reverse KL at π_θ = π_ref is KL(π_ref‖π̂*), non-negative; credit's mean is its negative."""
    module = make_module(tiny, rollout=GenerateRollout(max_new_tokens=30, responses_per_prompt=20))
    run = fit(module, max_steps=1)
    assert run.losses[0] > 0
    assert run.curves[0]["train/credit"] == pytest.approx(-run.losses[0], rel=0.2)
    assert math.isclose(run.curves[0]["train/implied_reward"], 0, abs_tol=1e-6)


# ---- settings that say nothing


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 1.5), ("top_p", 0.0), ("top_p", -0.5), ("top_k", -1), ("batch_size", 0)],
)
def test_settings_outside_their_range_are_refused(name, value):
    with pytest.raises(InputError, match=rf"model\.rollout\.init_args\.{name}: must be .*{value}"):
        GenerateRollout(**{name: value})


def test_engines_of_a_mixture_agree_on_where_texts_end():
    """A text does not tell which engine it came from; given responses are not cut."""
    with pytest.raises(InputError, match="stop_strings must agree"):
        MixtureRollout([GenerateRollout(), GenerateRollout(stop_strings=["zz"])], [1.0, 1.0])
    given = MixtureRollout([DatasetRollout(), GenerateRollout(stop_strings=["zz"])], [1.0, 1.0])
    assert given.stop_strings == ["zz"]
