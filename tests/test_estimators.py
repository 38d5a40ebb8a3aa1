"""Estimators of the optimal policy against naive full forwards, and the controls."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from fitting import LORA, PROMPTS, ask, attach, contrast, fit, make_module
from iqstar.attention import NAME as GROUPED
from iqstar.chat import PLACEMENTS, ChatFormat, place_principle
from iqstar.distributions import HeadDistributions, LogLinear, Reindexed
from iqstar.errors import InputError
from iqstar.estimators import (
    PLACEBOS,
    AlignedPairEstimator,
    ContrastiveEstimator,
    MixtureEstimator,
    NullEstimator,
    PlaceboEstimator,
    PrincipleEstimator,
    ResponseEstimator,
    ShuffledEstimator,
    placebo,
)
from iqstar.estimators.response import CANDIDATES
from iqstar.loading import load_frozen
from iqstar.policy import PolicySpec
from iqstar.rollouts import DatasetRollout, GenerateRollout, rollout_seed
from iqstar.scoring import RolloutScorer
from tiny import tiny_folder, tiny_model, tiny_tokenizer

KIND, RUDE = "Be kind to all.", "Be rude!"
TEMPERATURE = 0.8
SPEC = PolicySpec(dtype="float64")
"""How the policy is loaded, and any model beside it."""


@pytest.fixture(scope="module")
def scored(tiny):
    """A float64 policy, a rollout of it in two micro-batches, and its scorer."""
    module = attach(make_module(tiny, spec={"dtype": "float64"}), "64-true")
    rollout = GenerateRollout(max_new_tokens=6).roll_out(module.policy, PROMPTS, 1.0, 5)
    scorer = RolloutScorer(module.policy, [rollout.rows(0, 3), rollout.rows(3, 4)], TEMPERATURE)
    return module, rollout, scorer


def naive(module, rollout, principle=None, placement="after_user"):
    """Every row alone, unpadded, through the model's own head, all logits at once."""
    model = module.policy.frozen.model
    return naive_of(model, module.chat, rollout, principle, placement)


def naive_of(model, chat, rollout, principle=None, placement="after_user"):
    """The same of any model."""
    rows = []
    for prompt, ids, mask in zip(
        rollout.prompts, rollout.response_ids, rollout.response_mask, strict=True
    ):
        messages = prompt.messages
        if principle:
            messages = place_principle(messages, principle, placement)
        context = chat.prompt_ids(messages)
        full = torch.tensor([context + ids[mask].tolist()])
        with torch.no_grad():
            logits = model(full).logits[0, len(context) - 1 : -1, : chat.vocab_size]
        rows.append((logits / TEMPERATURE).log_softmax(-1))
    return torch.cat(rows)


def every(distributions):
    return distributions.logprobs(torch.arange(len(distributions)))


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


def test_the_reference_sees_the_unmodified_prompt(scored):
    module, rollout, scorer = scored
    reference = scorer.reference()
    assert len(reference) == scorer.tokens == len(rollout.actions)
    close(every(reference), naive(module, rollout))
    at = naive(module, rollout).gather(1, rollout.actions[:, None])[:, 0]
    close(reference.at(rollout.actions), at)
    close(scorer.behaviour(), at)


@pytest.mark.parametrize("placement", [*PLACEMENTS, "{principle}: {prompt}"])
def test_the_principle_estimator_is_the_reference_told_the_principle(scored, placement):
    module, rollout, scorer = scored
    estimate = PrincipleEstimator(KIND, placement).estimate(scorer, scorer.reference(), 0)
    expected = naive(module, rollout, KIND, placement)
    close(every(estimate), expected)
    assert (expected - naive(module, rollout)).abs().max() > 0.1


def test_keys_and_values_are_kept_of_few_micro_batches(scored, monkeypatch):
    """Two of four here; the others are read anew, and nothing changes but rounding."""
    module, rollout, _ = scored
    rows = [rollout.rows(i, i + 1) for i in range(4)]
    found = []
    for most, kept in ((2**30, [True] * 4), (0, [True, True, False, False])):
        monkeypatch.setattr("iqstar.scoring.KEPT", 2)
        monkeypatch.setattr("iqstar.scoring.KEPT_BYTES", most)
        monkeypatch.setattr("iqstar.policy.WORTH", 1)
        scorer = RolloutScorer(module.policy, rows)
        scorer.reference()
        assert [known is not None for known in scorer._known] == kept
        told = scorer.conditioned(KIND, "after_user")
        found.append(told.logprobs(torch.arange(len(told))))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_the_contrastive_estimator_is_its_formula_with_the_normaliser(scored, strength):
    module, rollout, scorer = scored
    estimate = contrast(strength).estimate(scorer, scorer.reference(), 0)
    ref, plus, minus = (naive(module, rollout, c) for c in (None, KIND, RUDE))
    raw = ref + strength * (plus - minus)
    normaliser = raw.logsumexp(-1, keepdim=True)
    if strength:
        assert normaliser.abs().max() > 0.01  # leaving it out would show
    close(every(estimate), raw - normaliser)
    at = (raw - normaliser).gather(1, rollout.actions[:, None])[:, 0]
    close(estimate.at(rollout.actions), at)


def test_every_estimate_is_a_distribution(scored):
    _, _, scorer = scored
    reference = scorer.reference()
    for estimator in (PrincipleEstimator(KIND), contrast(3.0), ShuffledEstimator(contrast())):
        mass = every(estimator.estimate(scorer, reference, 1)).exp().sum(-1)
        close(mass, torch.ones_like(mass))


def test_another_frozen_model_can_be_told(scored, tmp_path):
    module, rollout, scorer = scored
    other = tiny_folder(tmp_path / "other", seed=3, dtype=torch.float64)
    estimator = PrincipleEstimator(KIND, model=str(other))
    estimator.setup(SPEC, module.chat, "64-true")
    ours = every(estimator.estimate(scorer, scorer.reference(), 0))
    expected = naive_of(tiny_model(torch.float64, seed=3), module.chat, rollout, KIND)
    close(ours, expected)
    assert not any(p.requires_grad for p in estimator.parameters())


def test_another_model_is_loaded_as_the_policy_is(tiny, tmp_path):
    """One numeric path and one way to write prompts; adapters, revision and code stay apart."""
    base = tiny_folder(tmp_path / "base", chat_template=False)
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    spec = PolicySpec(
        model=str(tiny),
        lora=LORA,
        dtype="bfloat16",
        attn_implementation="grouped",
        share_prefixes=False,
        chat_template=str(file),
        revision="of the policy's",
        trust_remote_code=True,
    )
    chat = replace(spec, revision=None).chat()
    model = load_frozen(str(base), spec, chat, "32-true", "key")
    assert model.chat.prompt_ids(PROMPTS[0].messages) == chat.prompt_ids(PROMPTS[0].messages)
    assert model.model.dtype == torch.bfloat16
    assert model.model.config._attn_implementation == GROUPED
    assert not model.sharing
    assert not hasattr(model.model, "peft_config")


def test_a_base_model_without_a_template_takes_the_policys_own(tiny, tmp_path):
    base = tiny_folder(tmp_path / "base", chat_template=False)
    module = make_module(tiny)
    model = load_frozen(str(base), module.spec, module.chat, "32-true", "key")
    assert model.chat.prompt_ids(PROMPTS[1].messages) == module.chat.prompt_ids(PROMPTS[1].messages)
    own = tiny_folder(tmp_path / "own")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(own)
    model = load_frozen(str(own), module.spec, module.chat, "32-true", "key")
    assert model.chat.prompt_ids(PROMPTS[1].messages) != module.chat.prompt_ids(PROMPTS[1].messages)


def test_another_vocabulary_is_refused(scored, tmp_path):
    other = tiny_folder(tmp_path / "other", pad="own")
    estimator = PrincipleEstimator(KIND, model=str(other))
    with pytest.raises(InputError, match=r"estimator.*model: the vocabulary .* differs"):
        estimator.setup(SPEC, scored[0].chat, "32-true")


def test_null_is_the_reference_itself(scored):
    reference = scored[2].reference()
    assert NullEstimator().estimate(scored[2], reference, 0) is reference


def words_only():
    """A chat format whose tokens are words, which real tokenizers come close to."""
    backend = Tokenizer(WordLevel({"<eos>": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="?")
    return ChatFormat(tokenizer, template="hh")


@pytest.mark.parametrize("text", [KIND, "Kind.", "Be gentle and honest with them. " * 12])
def test_a_placebo_is_another_text_of_the_same_length(text):
    chat = words_only()
    estimator = PlaceboEstimator(ContrastiveEstimator(text, text + " Not!"))
    estimator.setup(SPEC, chat, "64-true")
    told = estimator.estimator.texts
    assert told["principle"] != told["antiprinciple"]
    for name, original in (("principle", text), ("antiprinciple", text + " Not!")):
        assert chat.count(told[name]) == chat.count(original)
        assert "kind" not in told[name].lower()
    again = dict(told)
    estimator.setup(SPEC, chat, "64-true")  # a second set-up replaces nothing
    assert estimator.estimator.texts == again


def test_each_text_gets_a_placebo_of_its_own():
    """As many as the shipped mixture has; what they were before stays, to the letter."""
    shipped = Path(__file__).parents[1] / "configs" / "estimator" / "mixture.yaml"
    arguments = yaml.safe_load(shipped.read_text())["init_args"]
    parts = [ContrastiveEstimator(**part["init_args"]) for part in arguments["estimators"]]
    wanted = [text for part in parts for text in part.texts.values()]
    chat = words_only()
    PlaceboEstimator(MixtureEstimator(parts, arguments["weights"])).setup(SPEC, chat, "64-true")
    told = [text for part in parts for text in part.texts.values()]
    assert [chat.count(text) for text in told] == [chat.count(text) for text in wanted]
    assert len(set(told)) == len(told) == len(PLACEBOS) == 4
    assert told == [placebo(*pair, chat) for pair in zip(wanted, PLACEBOS, strict=True)]
    assert [hashlib.sha256(text.encode()).hexdigest()[:8] for text in PLACEBOS[:2]] == [
        "6f560bd7",
        "f1ba4eac",
    ]


def test_more_texts_than_placebos_are_refused():
    parts = [contrast(), contrast(), PrincipleEstimator(KIND)]
    estimator = PlaceboEstimator(MixtureEstimator(parts, [1.0, 1.0, 1.0]))
    with pytest.raises(InputError, match=r"estimator\.init_args\.estimator: .* 4 unrelated texts"):
        estimator.setup(SPEC, words_only(), "64-true")


def test_a_placebo_estimates_what_its_text_says(scored):
    module, rollout, scorer = scored
    estimator = PlaceboEstimator(PrincipleEstimator(KIND))
    estimator.setup(SPEC, module.chat, "64-true")
    text = estimator.estimator.texts["principle"]
    close(every(estimator.estimate(scorer, scorer.reference(), 0)), naive(module, rollout, text))


@pytest.mark.parametrize("source", PLACEBOS)
def test_a_placebo_in_small_tokens_is_as_long_to_half_a_word(source):
    """Words are never cut: with a token a letter, the nearest whole word decides."""
    chat = ChatFormat(tiny_tokenizer())
    longest = max(chat.count(" " + word) for word in source.split())
    for n in range(1, 8):
        text = " ".join(["moss", "a", "hill", "under", "seventeen", "of", "you"][:n])
        gap = abs(chat.count(placebo(text, source, chat)) - chat.count(text))
        assert gap <= longest / 2


def test_shuffled_credit_is_the_same_at_other_tokens(scored):
    """The log-ratio vectors of all tokens, each used once, dealt to others and renormalised."""
    _, _, scorer = scored
    reference = scorer.reference()
    ref, target = every(reference), every(contrast().estimate(scorer, reference, 4))
    ours = every(ShuffledEstimator(contrast()).estimate(scorer, reference, 4))
    order = torch.randperm(len(ref), generator=torch.Generator().manual_seed(4))
    assert sorted(order.tolist()) == list(range(len(ref)))
    assert (order != torch.arange(len(ref))).any()
    close(ours, (ref + (target - ref)[order]).log_softmax(-1))
    # Up to the normaliser of each state, the ratio vectors are those of the estimate.
    ratios = ours - ref
    for i, j in enumerate(order.tolist()):
        gap = ratios[i] - (target - ref)[j]
        close(gap, gap[:1].expand_as(gap))


def test_each_rollout_is_shuffled_anew_and_repeatably(scored):
    _, _, scorer = scored
    reference = scorer.reference()
    first, again, other = (
        every(ShuffledEstimator(contrast()).estimate(scorer, reference, s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_controls_nest(scored):
    """Shuffled over placebo: the texts are replaced through the wrapper."""
    estimator = PlaceboEstimator(ShuffledEstimator(contrast()))
    estimator.setup(SPEC, scored[0].chat, "64-true")
    assert estimator.estimator.estimator.texts["principle"] != KIND


def test_windows_and_reindexing_name_the_same_tokens(scored):
    _, rollout, scorer = scored
    reference = scorer.reference()
    whole, actions = every(reference), rollout.actions
    mixed = LogLinear([(0.5, reference), (0.5, Reindexed(reference, torch.arange(len(whole))))])
    for base in (reference, mixed):
        part = base.window(2, 6)
        assert len(part) == 4
        close(every(part), whole[2:6])
        close(part.at(actions[2:6]), whole[2:6].gather(1, actions[2:6, None])[:, 0])
    assert isinstance(reference.window(0, 2), HeadDistributions)
    back = Reindexed(reference, torch.arange(len(whole)).flip(0))
    close(every(back), whole.flip(0))


def test_a_distribution_that_occurs_twice_is_computed_once(scored):
    """With r the reference: r + ½·a − ½·r + ½·(r + a − r) − ½·r = a."""
    _, _, scorer = scored
    reference = scorer.reference()
    aligned = scorer.conditioned("Be kind.", "system")
    nested = LogLinear([(1.0, reference), (1.0, aligned), (-1.0, reference)])
    mixed = LogLinear(
        [(1.0, reference), (0.5, aligned), (-0.5, reference), (0.5, nested), (-0.5, reference)]
    )
    assert nested.terms == ((1.0, aligned),)
    assert mixed.terms == ((1.0, aligned),)
    assert torch.equal(every(mixed), every(aligned))
    sharper = LogLinear([(0.5, nested), (1.5, aligned), (-1.0, reference)])
    assert sharper.terms == ((2.0, aligned), (-1.0, reference))
    close(every(sharper), (2 * every(aligned) - every(reference)).log_softmax(-1))


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_estimator_without_a_principle_says_so(text):
    with pytest.raises(InputError, match=r"principle: PrincipleEstimator needs a text"):
        PrincipleEstimator(text)
    with pytest.raises(InputError, match=r"antiprinciple: ContrastiveEstimator needs a text"):
        ContrastiveEstimator(KIND, text)


def test_a_principle_over_its_budget_is_an_error_and_never_cut(scored):
    estimator = PrincipleEstimator("Be kind. " * 50, max_principle_tokens=20)
    with pytest.raises(InputError, match=r"max_principle_tokens"):
        estimator.setup(SPEC, scored[0].chat, "32-true")


def test_an_unknown_placement_is_an_error():
    with pytest.raises(InputError, match="after_user"):
        PrincipleEstimator(KIND, placement="somewhere")


def test_a_placebo_of_no_principle_is_an_error(scored):
    with pytest.raises(InputError, match="NullEstimator has no principle"):
        PlaceboEstimator(NullEstimator()).setup(SPEC, scored[0].chat, "32-true")


def test_a_told_prompt_over_the_models_positions_is_an_error(tmp_path):
    folder = tiny_folder(tmp_path / "short", max_position_embeddings=60)
    module = attach(make_module(folder, PrincipleEstimator(KIND * 3)))
    with pytest.raises(InputError, match="with its principle"):
        module.collect((ask("Hi"),), 0)


# -- other models, several estimators, exemplars ------------------------------------------------


def other(folder, seed):
    """The policy's tokenizer with another model's weights."""
    return str(tiny_folder(folder, seed=seed))


def test_an_aligned_pair_lends_what_aligning_changed(scored, tmp_path):
    module, rollout, scorer = scored
    names = other(tmp_path / "aligned", 1), other(tmp_path / "base", 2)
    estimator = AlignedPairEstimator(*names, temperature=0.5)
    estimator.setup(SPEC, module.chat, "64-true")
    assert estimator.own_models() == names
    aligned, base = (
        naive_of(m.model, module.chat, rollout)
        for m in (estimator.aligned_model, estimator.base_model)
    )
    expected = (naive(module, rollout) + 2.0 * (aligned - base)).log_softmax(-1)
    close(every(estimator.estimate(scorer, scorer.reference(), 0)), expected)
    assert not any(p.requires_grad for p in estimator.parameters())


def test_one_aligned_model_of_the_policys_own_reference(scored, tmp_path):
    """τ = 1 and base = the reference: π̂* is the aligned model itself."""
    module, rollout, scorer = scored
    estimator = AlignedPairEstimator(other(tmp_path / "aligned", 1))
    estimator.setup(SPEC, module.chat, "64-true")
    found = every(estimator.estimate(scorer, scorer.reference(), 0))
    close(found, naive_of(estimator.aligned_model.model, module.chat, rollout))


def test_a_pair_of_another_vocabulary_is_refused(tiny, tmp_path):
    other_tokens = tiny_folder(tmp_path, pad="own")
    estimator = AlignedPairEstimator(str(other_tokens))
    chat = make_module(tiny).chat
    with pytest.raises(InputError, match=r"init_args\.aligned: the vocabulary of"):
        estimator.setup(SPEC, chat, "32-true")


def test_a_mixture_sums_credits(scored):
    scorer = scored[2]
    reference = scorer.reference()
    told = PrincipleEstimator(KIND), contrast(1.5)
    mixture = MixtureEstimator(list(told), [0.7, -0.2])
    parts = [every(part.estimate(scorer, reference, 0)) for part in told]
    plain = every(reference)
    expected = plain + 0.7 * (parts[0] - plain) - 0.2 * (parts[1] - plain)
    close(every(mixture.estimate(scorer, reference, 0)), expected.log_softmax(-1))


def test_a_mixture_of_one_is_that_one_and_of_nothing_the_reference(scored):
    scorer = scored[2]
    reference = scorer.reference()
    one = MixtureEstimator([PrincipleEstimator(KIND)], [1.0])
    told = PrincipleEstimator(KIND).estimate(scorer, reference, 0)
    close(every(one.estimate(scorer, reference, 0)), every(told))
    none = MixtureEstimator([PrincipleEstimator(KIND)], [0.0])
    close(every(none.estimate(scorer, reference, 0)), every(reference))


def test_a_mixture_is_a_mixture_of_placebos_too(scored):
    mixture = MixtureEstimator([PrincipleEstimator(KIND)], [1.0])
    placebos = PlaceboEstimator(mixture)
    placebos.setup(SPEC, scored[0].chat, "64-true")
    (part,) = mixture.estimators
    assert part.texts["principle"] != KIND


def test_a_response_estimator_shows_each_prompt_its_own_best_response(scored):
    """Ranked by brute force: the mean of log π_ref(·|c⁺) − log π_ref(·|c⁻) over its tokens."""
    module, rollout, scorer = scored
    estimator = ResponseEstimator(KIND, RUDE, candidates=3, max_new_tokens=4)
    found = every(estimator.estimate(scorer, scorer.reference(), 9))
    prompts = list(dict.fromkeys(rollout.prompts))
    seed = rollout_seed(9, CANDIDATES)
    candidates = estimator.engine.roll_out(module.policy, prompts, TEMPERATURE, seed)
    gap = naive(module, candidates, KIND) - naive(module, candidates, RUDE)
    gaps = gap.gather(1, candidates.actions[:, None])[:, 0].split(candidates.lengths.tolist())
    texts = {}
    for number, prompt in enumerate(prompts):
        best = max(range(3 * number, 3 * number + 3), key=lambda row: gaps[row].mean().item())
        ids = candidates.response_ids[best][candidates.response_mask[best]]
        texts[prompt] = module.chat.decode(ids.tolist())
    parts = []
    for row, prompt in enumerate(rollout.prompts):
        shown = estimator.exemplar.replace("{response}", texts[prompt])
        parts.append(naive(module, rollout.rows(row, row + 1), shown))
    close(found, torch.cat(parts))


def test_both_responses_to_a_prompt_are_shown_the_same_one(scored):
    """A prompt is its messages: in a pair each side brings its own response along."""
    module, _, _ = scored
    pair = [ask("Why?", "So."), ask("Why?", "For no reason.")]
    rollout = DatasetRollout(4).roll_out(module.policy, pair, TEMPERATURE, 9)
    estimator, shown = ResponseEstimator(KIND, RUDE, candidates=3, max_new_tokens=4), []
    scorer = RolloutScorer(module.policy, [rollout], TEMPERATURE)
    scorer.conditioned = lambda texts, *rest: shown.extend(texts)
    estimator.estimate(scorer, scorer.reference(), 9)
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("placement", "joined"), [("after_user", 2), ("Do mind this: {principle}. {prompt}", 12)]
)
def test_what_a_placement_writes_takes_room_too(scored, placement, joined):
    chat = scored[0].chat
    exact = PrincipleEstimator(KIND, placement, max_principle_tokens=chat.count(KIND))
    assert exact.added_tokens(chat) == chat.count(KIND) + joined
    beyond = PrincipleEstimator(KIND, placement, max_principle_tokens=chat.count(KIND) - 3)
    assert beyond.added_tokens(chat) == chat.count(KIND) + joined - 3  # setup refuses it


def test_candidates_are_scored_in_as_many_rows_as_responses(scored, monkeypatch):
    """So that a run whose micro-batches fit does not run out of memory over its candidates."""
    module, seen = scored[0], []
    rollout = GenerateRollout(4).roll_out(module.policy, PROMPTS, TEMPERATURE, 9)
    parts = [rollout.rows(start, start + 2) for start in range(0, len(rollout), 2)]
    scorer = RolloutScorer(module.policy, parts, TEMPERATURE)
    estimator = ResponseEstimator(KIND, RUDE, candidates=3, max_new_tokens=4, batch_size=2)
    hidden = type(module.actor).hidden_and_keys

    def spied(model, packed, *rest):
        seen.append(len(packed.lengths))
        return hidden(model, packed, *rest)

    monkeypatch.setattr(type(module.actor), "hidden_and_keys", spied)
    estimator.estimate(scorer, scorer.reference(), 9)
    assert len(seen) > 2 * 3 * len(PROMPTS) // 2
    assert max(seen) == 2


def test_candidates_are_drawn_apart_from_the_responses_that_are_scored(scored):
    """One seed goes to both; at equal weights equal numbers would show a response to itself."""
    module, seen = scored[0], []
    rollout = GenerateRollout(4, responses_per_prompt=2).roll_out(
        module.policy, PROMPTS, TEMPERATURE, 9
    )
    scorer = RolloutScorer(module.policy, [rollout], TEMPERATURE)
    estimator = ResponseEstimator(KIND, RUDE, candidates=2, max_new_tokens=4)
    sample = estimator.engine.sample
    estimator.engine.sample = lambda *given: seen.append(sample(*given)) or seen[-1]
    estimator.estimate(scorer, scorer.reference(), 9)
    (candidates,) = seen
    assert candidates.prompts == rollout.prompts
    pairs = zip(candidates.responses, rollout.responses, strict=True)
    assert not any(ours == theirs for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AlignedPairEstimator("x", temperature=0.0), "temperature: must be a positive"),
        (lambda: MixtureEstimator([], []), "0 weights for 0 estimators"),
        (lambda: MixtureEstimator([NullEstimator()], [1.0, 2.0]), "2 weights for 1 estimators"),
        (lambda: ResponseEstimator(KIND, RUDE, candidates=0), "candidates: must be at least 1"),
        (lambda: ResponseEstimator(KIND, RUDE, exemplar="x"), "must hold"),
    ],
)
def test_senseless_estimators_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_training_with_an_aligned_pair_learns_it(tiny, tmp_path):
    """The estimator's models are loaded, frozen, and left out of checkpoints."""
    estimator = AlignedPairEstimator(other(tmp_path / "aligned", 1))
    module = make_module(tiny, estimator)
    done = fit(module, PROMPTS, max_steps=30)
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert not any("estimator" in name for name in module.state_dict())


def test_a_principle_that_just_fits_has_a_placebo(scored):
    """Which may be a token longer: the budget is that of what the user wrote."""
    chat = scored[0].chat
    text = next(
        t
        for n in range(1, 20)
        if chat.count(placebo(t := "Be kind" + " and kind" * n, PLACEBOS[0], chat)) > chat.count(t)
    )
    PlaceboEstimator(PrincipleEstimator(text, max_principle_tokens=chat.count(text))).setup(
        SPEC, chat, "32-true"
    )


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_contrast_has_a_finite_strength(strength):
    with pytest.raises(InputError, match=r"model\.estimator.*\.strength: must be a finite number"):
        ContrastiveEstimator("Be kind.", "Be rude.", strength)


def test_another_number_of_output_rows_is_refused(tiny, tmp_path):
    """Equal tokenizers, but one model was resized for a token, the other was not."""
    chat = PolicySpec(model=str(tiny)).chat()
    smaller = tiny_folder(tmp_path / "smaller", vocab_size=len(chat.tokenizer) - 4)
    with pytest.raises(InputError, match=r"rows of output for its vocabulary, the policy"):
        load_frozen(str(smaller), PolicySpec(model=str(tiny)), chat, "32-true", "model.estimator")
