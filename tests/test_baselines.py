"""PPO, GRPO and DPO: hand-derived values, TRL's own losses on the same tensors, real runs."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from fitting import PROMPTS, SaveAt, adamw, ask, attach, copied, fit, same_bits, sgd, trained
from iqstar import PolicySpec
from iqstar.baselines import DPO, GRPO, PPO, AdaptiveKL, FixedKL
from iqstar.baselines.advantages import (
    clipped_value_loss,
    generalized_advantages,
    group_advantages,
    penalised_rewards,
)
from iqstar.baselines.dpo import dpo_losses
from iqstar.checkpoints import AtomicCheckpointIO
from iqstar.curves import micro_batch_sums
from iqstar.errors import InputError
from iqstar.losses import AssignedAdvantage, TokenPolicyGradientLoss
from iqstar.mdp import PromptBatch, TokenCredits
from iqstar.optim import Constant
from iqstar.rollouts import DatasetRollout, GenerateRollout
from judging import Broken, Gaps, Tiring, Vowels
from tiny import tiny_folder, tiny_tokenizer

NAN = float("nan")
PAIRS = tuple(
    replace(
        ask(f"What about {i}{'?' * i}", "Yes, you and the others." + "!" * i),
        rejected="No" + "o" * (4 - i),
    )
    for i in range(4)
)


class Half(GenerateRollout):
    """Takes every second response, or all, for one that was cut."""

    def __init__(self, limit, responses_per_prompt, every=2):
        super().__init__(limit, responses_per_prompt)
        self.every = every

    def roll_out(self, policy, prompts, temperature, seed):
        rollout = super().roll_out(policy, prompts, temperature, seed)
        rows = torch.arange(len(rollout))
        return replace(rollout, truncated=rows % self.every == self.every - 1)


class Silent(Vowels):
    """Gives no number."""

    def score(self, prompts, responses):
        return [NAN] * len(responses)


def build(kind, folder, **options):
    defaults = {"rollout": GenerateRollout(5), "schedule": Constant(), "optimizer": sgd(0.1)}
    if kind is GRPO:
        defaults["rollout"] = GenerateRollout(5, responses_per_prompt=2)
    if kind is not DPO:
        defaults["reward"] = Vowels()
    return kind(PolicySpec(model=str(folder)), **(defaults | options))


# -- rewards, advantages, losses: by hand -----------------------------------------------------


def test_rewards_are_the_score_at_the_end_and_a_price_at_every_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ratio = torch.tensor([[0.5, -1.0, 0.0], [0.0, 2.0, 1.0]])
    rewards = penalised_rewards(torch.tensor([3.0, -1.0]), ratio, mask, 0.1)
    expected = [[-0.05, 3.0 + 0.1, 0.0], [0.0, -0.2, -1.0 - 0.1]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_generalized_advantages_by_hand():
    """γ = ½, λ = ½: δ = (1 + ½·2 − 1, 0 + ½·0 − 2, …); A_1 = δ_1 + ¼·δ_2."""
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    values = torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    found = generalized_advantages(rewards, values, 0.5, 0.5)
    first = [1.0 + 0.25 * -2.0, -2.0, 0.0]
    second = [-0.5 + 0.25 * (-0.5 + 0.25 * 3.0), -0.5 + 0.25 * 3.0, 3.0]
    torch.testing.assert_close(found, torch.tensor([first, second]))


def test_lambda_of_one_gives_the_return_and_padding_changes_nothing():
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    found = generalized_advantages(rewards, values, 1.0, 1.0)
    returns = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found, returns - values)
    pad = torch.nn.functional.pad
    wider = generalized_advantages(pad(rewards, (0, 2)), pad(values, (0, 2)), 0.9, 0.7)
    assert torch.equal(wider[:, :5], generalized_advantages(rewards, values, 0.9, 0.7))


def test_a_value_gains_nothing_from_leaving_its_range():
    values, before = torch.tensor([0.5, 0.5, -1.0]), torch.zeros(3)
    returns = torch.tensor([1.0, 0.0, 0.0])
    # Clipped to 0.2: farther from the return (first), nearer (second); the larger error counts.
    expected = torch.tensor([0.5 * 0.8**2, 0.5 * 0.5**2, 0.5 * 1.0])
    torch.testing.assert_close(clipped_value_loss(values, before, returns, 0.2), expected)
    plain = clipped_value_loss(values, before, returns, None)
    torch.testing.assert_close(plain, 0.5 * (values - returns) ** 2)


def test_group_advantages_by_hand():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, NAN, 5.0, 1.0, NAN])
    plain = group_advantages(scores, 2, scale=False)
    assert plain.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    scaled = group_advantages(torch.tensor([1.0, 3.0, NAN, 2.0]), 4)
    torch.testing.assert_close(scaled, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (1 + 1e-4))


def test_a_clipped_ratio_that_overflows_has_no_gradient():
    """e^100 is inf in float32, and the slope of what is not chosen there would be 0·inf."""
    logits = torch.tensor([[100.0, 0.0]], requires_grad=True)
    tokens = TokenCredits(
        actions=torch.tensor([0]),
        reference=torch.zeros(1),
        credit=torch.ones(1),
        weight=torch.ones(1),
        behaviour=torch.tensor([-100.0]),
    )
    loss, metrics = TokenPolicyGradientLoss(0.2, AssignedAdvantage()).per_token(
        logits, tokens, None
    )
    assert loss.item() == pytest.approx(-1.2)
    assert metrics["clip_fraction"] == 1
    assert torch.autograd.grad(loss.sum(), logits)[0].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("separate", [False, True], ids=["shared trunk", "own trunk"])
def test_ppo_reads_a_rollout_once(tiny, separate):
    """Log-probs and values at the rollout's weights come from the same states."""
    module = attach(build(PPO, tiny, separate_value_model=separate))
    read = []
    module.actor.hidden = lambda packed, plain=module.actor.hidden: (
        read.append(packed) or plain(packed)
    )
    (micro,) = module.collect(PROMPTS, seed=0)
    assert len(read) == 1
    assert micro.tokens.behaviour.shape == micro.tokens.values.shape
    with torch.no_grad():
        states = module.actor.hidden(micro.sequences)
        torch.testing.assert_close(micro.tokens.values, module.value_head(states, micro.sequences))


def test_dpo_losses_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    found = dpo_losses(chosen, rejected, 0.5)
    expected = [math.log1p(math.exp(-0.5)), math.log(2)]
    torch.testing.assert_close(found, torch.tensor(expected))
    smooth = dpo_losses(chosen, rejected, 0.5, 0.1)
    margin = 0.5 * (chosen - rejected)
    torch.testing.assert_close(smooth, -0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin))


def test_the_price_of_the_kl_follows_its_target():
    kl = AdaptiveKL(target=0.1, coefficient=0.05, horizon=100)
    kl.update(0.2, 50)  # far over: a fifth for a whole horizon
    assert kl.coefficient == pytest.approx(0.05 * 1.1)
    kl.update(0.09, 100)  # a tenth under
    assert kl.coefficient == pytest.approx(0.05 * 1.1 * 0.9)
    fixed = FixedKL(0.3)
    fixed.update(9.0, 1000)
    assert fixed.coefficient == 0.3


def test_a_rollout_over_the_horizon_changes_the_price_by_a_fifth_at_most():
    kl = AdaptiveKL(target=0.1, coefficient=0.05, horizon=10)
    kl.update(0.0, 60)  # six horizons: a factor of 1 - 0.2 * 6 would be below 0
    assert kl.coefficient == pytest.approx(0.05 * 0.8)
    kl.update(9.0, 60)
    assert kl.coefficient == pytest.approx(0.05 * 0.8 * 1.2)


# -- TRL's losses, on the same tensors ---------------------------------------------------------


def moved(module):
    """Takes the policy away from its reference, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.actor.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return module


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def padded(micro, values):
    """Flat values of tokens as (batch, time)."""
    mask = micro.rollout.response_mask
    return torch.zeros(mask.shape).masked_scatter(mask, values)


@pytest.fixture(scope="module")
def unpadded(tmp_path_factory):
    """A tiny model whose vocabulary has no padding, which TRL would count as tokens."""
    folder = tmp_path_factory.mktemp("unpadded")
    return tiny_folder(folder, vocab_size=len(tiny_tokenizer()))


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quiet")
def test_dpo_equals_trls(unpadded, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = moved(attach(build(DPO, unpadded, beta=0.3, rollout=GenerateRollout(40))))
    (micro,) = module.collect(PAIRS, 0)
    total, sums = module.losses(micro)
    (total / len(PAIRS)).backward()
    ours = gradient(module.actor)

    model, reference = (AutoModelForCausalLM.from_pretrained(unpadded) for _ in range(2))
    model.load_state_dict(module.actor.model.state_dict())
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    options = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False}
    trainer = trl.DPOTrainer(
        model,
        reference,
        trl.DPOConfig(**options, beta=0.3, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([row]),
        processing_class=AutoTokenizer.from_pretrained(unpadded),
    )
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # theirs: all chosen, then all rejected
    sequences = micro.sequences
    completion = torch.zeros(sequences.input_ids.numel(), dtype=torch.long)
    completion[sequences.predictors + 1] = 1
    batch = {
        "input_ids": sequences.input_ids[order],
        "attention_mask": sequences.attention_mask.long()[order],
        "completion_mask": completion.view_as(sequences.input_ids)[order],
    }
    model.train()
    theirs = trainer.compute_loss(model, batch)
    theirs.backward()
    assert (total / len(PAIRS)).item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(ours, gradient(model), rtol=1e-4, atol=1e-5)
    (right, pairs), (margin, _) = sums["accuracy"], sums["margin"]
    assert right / pairs == pytest.approx(trainer._metrics["train"]["rewards/accuracies"][-1])
    margins = trainer._metrics["train"]["rewards/margins"][-1]
    assert margin / pairs == pytest.approx(margins, rel=1e-4)


@pytest.mark.usefixtures("quiet")
def test_grpo_equals_trls(unpadded, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = attach(
        build(GRPO, unpadded, kl=0.3, rollout=GenerateRollout(6, responses_per_prompt=4))
    )
    moved(module)
    (micro,) = module.collect(PROMPTS[:1], 0)
    assert micro.tokens.credit.abs().max() > 0.1
    moved(module)  # the ratio is no longer 1 everywhere
    total, sums = module.losses(micro)
    (total / len(micro.tokens)).backward()
    ours = gradient(module.actor)
    assert 0 < sums["clip_fraction"] < len(micro.tokens)

    model = AutoModelForCausalLM.from_pretrained(unpadded)
    model.load_state_dict(module.actor.model.state_dict())
    options = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False}
    trainer = trl.GRPOTrainer(
        model,
        lambda completions, **rest: [0.0] * len(completions),
        trl.GRPOConfig(
            **options,
            beta=0.3,
            loss_type="bnpo",
            use_bias_correction_kl=False,  # of a later paper; ours is GRPO's own
            num_generations=4,
            per_device_train_batch_size=4,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(unpadded),
    )
    trainer.current_gradient_accumulation_steps = 1
    mask, context = micro.rollout.response_mask, len(micro.sequences.contexts[0])
    batch = {
        "prompt_ids": micro.sequences.input_ids[:, :context],
        "prompt_mask": torch.ones(4, context, dtype=torch.long),
        "completion_ids": micro.rollout.response_ids,
        "completion_mask": mask.long(),
        "advantages": group_advantages(micro.scores, 4),
        "old_per_token_logps": padded(micro, micro.tokens.behaviour),
        "ref_per_token_logps": padded(micro, micro.tokens.reference),
        "num_items_in_batch": mask.sum(),
    }
    model.train()
    theirs = trainer._compute_loss(model, batch)
    theirs.backward()
    assert (total / len(micro.tokens)).item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(ours, gradient(model), rtol=1e-4, atol=1e-5)


# -- runs -----------------------------------------------------------------------------------------


def mean_vowels(module):
    rollout = GenerateRollout(5, responses_per_prompt=64).sample(module.actor, PROMPTS, 1.0, 7)
    texts = [
        module.chat.decode(row[mask].tolist())
        for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    return sum(Vowels().score((), texts)) / len(texts)


@pytest.mark.parametrize("separate", [False, True], ids=["shared trunk", "own trunk"])
def test_ppo_raises_its_reward(tiny, separate):
    module = build(
        PPO,
        tiny,
        rollout=GenerateRollout(5, responses_per_prompt=8),
        optimizer=adamw(1e-2),
        kl=FixedKL(0.01),
        separate_value_model=separate,
    )
    before = mean_vowels(attach(build(PPO, tiny)))
    done = fit(module, PROMPTS, max_steps=24)
    assert mean_vowels(module) > before + 0.1
    assert {"train/reward", "train/value_loss", "train/kl"} <= done.curves[0].keys()
    assert done.curves[-1]["train/value_loss"] < done.curves[0]["train/value_loss"]


def test_grpo_raises_its_reward(tiny):
    rollout = GenerateRollout(5, responses_per_prompt=8)
    module = build(GRPO, tiny, rollout=rollout, optimizer=adamw(1e-2), kl=0.01)
    before = mean_vowels(attach(build(PPO, tiny)))
    fit(module, PROMPTS, max_steps=24)
    assert mean_vowels(module) > before + 0.1


def test_dpo_learns_its_pairs(tiny):
    module = build(DPO, tiny, optimizer=adamw(1e-3), rollout=GenerateRollout(40))
    done = fit(module, PAIRS, max_steps=20)
    assert done.losses[0] == pytest.approx(math.log(2), abs=1e-6)  # at step 0 margins are 0
    assert done.curves[0]["train/accuracy"] == 0.5
    assert done.losses[-1] < 0.3
    assert done.curves[-1]["train/accuracy"] == 1
    assert module.progress.samples == 20 * 2 * len(PAIRS)


@pytest.mark.parametrize("kind", [PPO, GRPO, DPO])
def test_a_batch_is_the_sum_of_its_micro_batches(tiny, kind):
    """One step on 4 prompts at once, or in micro-batches: the same gradient."""
    prompts = PAIRS if kind is DPO else PROMPTS
    options = {} if kind is not PPO else {"epochs_per_rollout": 1}
    whole = fit(build(kind, tiny, **options), prompts, max_steps=1)
    rows = 4 if kind is not GRPO else 8
    parts = fit(
        build(kind, tiny, micro_batch_size=1, **options),
        prompts,
        max_steps=1,
        accumulate_grad_batches=rows,
    )
    torch.testing.assert_close(whole.gradients[0], parts.gradients[0], rtol=1e-4, atol=1e-6)
    assert whole.losses[0] == pytest.approx(parts.losses[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", [PPO, GRPO, DPO])
def test_a_resumed_run_goes_on_exactly(tiny, tmp_path, kind):
    """Stopped in the middle of a rollout: rewards and advantages are not computed anew."""
    prompts = PAIRS if kind is DPO else PROMPTS
    options = {"micro_batch_size": 4 if kind is GRPO else 2, "epochs_per_rollout": 2}
    if kind is PPO:
        options["kl"] = AdaptiveKL(horizon=10)
    more = {"batch_size": 4, "plugins": [AtomicCheckpointIO()]}

    straight, path = build(kind, tiny, **options), tmp_path / "stop.ckpt"
    fit(straight, prompts, max_steps=9, callbacks=[SaveAt(6, path)], **more)
    second = build(kind, tiny, **options)
    if kind is not DPO:
        second.reward = Broken()  # not asked before the next rollout
        fit(second, prompts, max_steps=8, ckpt_path=path, **more)
        second = build(kind, tiny, **options)
    fit(second, prompts, max_steps=9, ckpt_path=path, **more)
    assert same_bits(copied(trained(straight)), copied(trained(second)))
    if kind is PPO:
        assert second.kl.coefficient == straight.kl.coefficient != 0.05
        assert torch.equal(straight.value_head.linear.weight, second.value_head.linear.weight)


@pytest.mark.parametrize(
    ("before", "now", "price"),
    [
        (FixedKL(0.3), FixedKL(0.2), 0.2),
        (FixedKL(0.3), AdaptiveKL(coefficient=0.2), 0.2),
        (AdaptiveKL(coefficient=0.3), FixedKL(0.2), 0.2),
        (AdaptiveKL(coefficient=0.3), AdaptiveKL(coefficient=0.2), 0.3),
    ],
)
def test_a_fixed_price_is_that_of_the_settings(tiny, tmp_path, before, now, price):
    """Only a price that follows its target goes on from a checkpoint."""
    path = tmp_path / "stop.ckpt"
    before.update = lambda kl, responses: None  # its value stays what it is here
    fit(build(PPO, tiny, kl=before), PROMPTS, max_steps=2, callbacks=[SaveAt(2, path)])
    resumed = build(PPO, tiny, kl=now)
    fit(resumed, PROMPTS, max_steps=2, ckpt_path=path)
    assert resumed.kl.coefficient == price


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_responses_without_a_score_teach_nothing(tiny, kind):
    rollout = GenerateRollout(5, responses_per_prompt=4)
    module = attach(build(kind, tiny, reward=Gaps(), rollout=rollout))
    (micro,) = module.collect(PROMPTS, 0)
    rows = torch.repeat_interleave(micro.scores.isnan(), micro.rollout.lengths)
    assert rows.any()
    assert (micro.tokens.weight == (~rows)).all()
    done = fit(build(kind, tiny, reward=Gaps(), rollout=rollout), PROMPTS, max_steps=1)
    assert done.curves[0]["train/reward_missing"] == 0.5
    assert math.isfinite(done.curves[0]["train/reward"])


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_truncated_responses_that_are_left_out_have_no_score(tiny, kind):
    """The judge is not asked about them, and neither their group nor a curve counts them."""
    texts = []

    class Asked(Vowels):
        def score(self, prompts, responses):
            texts.extend(responses)
            return super().score(prompts, responses)

    rollout = Half(5, responses_per_prompt=4)
    module = attach(build(kind, tiny, reward=Asked(), rollout=rollout, mask_truncated=True))
    (micro,) = module.collect(PROMPTS, 0)
    cut, whole = micro.rollout.truncated, ~micro.rollout.truncated
    assert cut.tolist() == [False, True] * 8
    assert texts == [module.chat.decode(row) for row in micro.rollout.responses if row]
    assert micro.scores[cut].isnan().all()
    torch.testing.assert_close(micro.scores[whole], torch.tensor(Vowels().score((), texts)))
    if kind is GRPO:
        own = group_advantages(micro.scores[whole], 2)
        torch.testing.assert_close(
            micro.tokens.credit,
            micro.rollout.rows(0, 16).spread(torch.zeros(16).masked_scatter(whole, own)),
        )
    sums = micro_batch_sums(micro, torch.tensor(0.0), {}, 1.0)
    assert sums["response_length"][1] == 8
    assert sums["reward"][1] == 8
    assert [float(x) for x in sums["reward_missing"]] == [0.0, 8.0]


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_a_rollout_of_truncated_responses_teaches_nothing(tiny, kind):
    rollout = Half(5, responses_per_prompt=2, every=1)
    module = build(kind, tiny, rollout=rollout, mask_truncated=True, epochs_per_rollout=1)
    done = fit(module, PROMPTS, max_steps=1)
    assert torch.equal(done.weights[0], done.weights[-1])
    assert math.isnan(done.curves[0]["train/reward"])
    assert math.isnan(done.curves[0]["train/reward_missing"])


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_a_run_outlives_its_judge(tiny, kind):
    """From the second rollout on scores are missing: nothing is learnt, and the curves say so."""
    rollout = GenerateRollout(5, responses_per_prompt=4)
    module = build(
        kind,
        tiny,
        reward=Tiring(),
        rollout=rollout,
        epochs_per_rollout=1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    )
    done = fit(module, PROMPTS, max_steps=2)
    assert all(math.isnan(done.curves[1][f"train/{name}"]) for name in ("advantage", "credit"))
    assert not any(math.isnan(done.curves[1][f"train/{name}"]) for name in ("kl", "entropy"))
    assert done.curves[0]["train/reward_missing"] == 0
    assert done.curves[1]["train/reward_missing"] == 1
    assert math.isnan(done.curves[1]["train/reward"])
    assert not torch.equal(done.weights[0], done.weights[1])
    assert torch.equal(done.weights[1], done.weights[2])


class Refusing(Vowels):
    """Says that it is set up wrongly."""

    def score(self, prompts, responses):
        raise InputError("model.judge.init_args.model: it has no weights; give another")


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (Broken(), "RuntimeError: out of order"),
        (Refusing(), r"model\.judge\.init_args\.model: it has no weights; give another"),
        (Silent(), "each of its scores is NaN or infinite"),
    ],
)
def test_a_judge_that_never_worked_is_an_error(tiny, judge, reason):
    module = attach(build(GRPO, tiny, reward=judge))
    with pytest.raises(InputError, match=rf"model\.reward: the judge vowels .*{reason}"):
        module.collect(PROMPTS, 0)


def test_the_first_responses_that_a_judge_is_asked_about_decide(tiny):
    """A rollout that is left out whole says nothing about it; after one that it scored, gaps."""
    rollout = Half(5, responses_per_prompt=2, every=1)
    module = attach(build(GRPO, tiny, reward=Broken(), rollout=rollout, mask_truncated=True))
    module.collect(PROMPTS, 0)
    module.mask_truncated = False
    with pytest.raises(InputError, match=r"model\.reward"):
        module.collect(PROMPTS, 0)
    module.reward = Tiring()
    for number in range(2):
        (micro,) = module.collect(PROMPTS, 0)
        assert micro.scores.isnan().all() == bool(number)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GRPO, {"rollout": GenerateRollout(5)}, r"responses_per_prompt: GRPO compares"),
        (GRPO, {"kl": -1.0}, r"model\.kl"),
        (PPO, {"rollout": DatasetRollout(5)}, r"model\.rollout: PPO trains on responses that"),
        (PPO, {"lam": 1.5}, r"model\.lam"),
        (PPO, {"clip_value": 0.0}, r"model\.clip_value"),
        (DPO, {"beta": 0.0}, r"model\.beta"),
        (DPO, {"mask_truncated": True}, r"model\.mask_truncated: DPO samples no responses"),
        (DPO, {"label_smoothing": 0.5}, r"model\.label_smoothing"),
    ],
)
def test_senseless_settings_are_refused(tiny, kind, options, message):
    with pytest.raises(InputError, match=message):
        build(kind, tiny, **options)


@pytest.mark.parametrize("whole", [True, False])
def test_dpo_teaches_no_end_of_turn_after_a_reply_that_was_cut(tiny, whole):
    pair = replace(PAIRS[0], complete=whole, rejected_complete=whole)
    module = attach(build(DPO, tiny, rollout=GenerateRollout(40)))
    (micro,) = module.collect((pair,), seed=0)
    ended = [ids[-1] in module.chat.eos_ids for ids in micro.rollout.responses]
    assert ended == [whole, whole]
    assert micro.rollout.truncated.tolist() == [not whole, not whole]


def test_a_rollout_that_is_left_out_whole_moves_no_price(tiny):
    """Nothing was measured: that is no KL of 0."""
    module = attach(build(PPO, tiny, kl=AdaptiveKL(horizon=1), mask_truncated=True))
    parts = module.collect(PROMPTS, seed=0)
    assert not any(len(part.tokens) for part in parts)
    assert module.kl.coefficient == 0.05


def test_dpo_needs_pairs(tiny):
    with pytest.raises(InputError, match=r"'Hi' has none; use a data module of pairs"):
        fit(build(DPO, tiny), PROMPTS, max_steps=1)


@pytest.mark.parametrize(
    "values", [{"coefficient": -1.0}, {"coefficient": 0.0}, {"target": 0.0}, {"horizon": 0}]
)
def test_a_senseless_price_is_refused(values):
    with pytest.raises(InputError, match=rf"model\.kl\.{next(iter(values))}"):
        AdaptiveKL(**values)


class Close(Vowels):
    """Scores that differ by less than bfloat16 can tell."""

    def score(self, prompts, responses):
        return [0.7 + 0.0003 * i for i in range(len(responses))]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_rewards_are_not_rounded_to_the_precision_of_the_run(tiny, precision):
    module = attach(build(GRPO, tiny, reward=Close()), precision)
    with module.trainer.precision_plugin.forward_context():
        (micro,) = module.collect(PROMPTS[:2], 0)
    expected = [0.7 + 0.0003 * i for i in range(4)]
    assert micro.scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert (micro.tokens.credit != 0).all()


def test_values_are_float32_where_the_head_is_in_sixteen_bits(tiny):
    module = attach(build(PPO, tiny)).to(torch.bfloat16)
    (micro,) = module.collect(PROMPTS[:2], 0)
    assert micro.tokens.values.dtype == torch.float32
    assert micro.tokens.returns.dtype == torch.float32


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_curves_leave_out_responses_without_a_score(tiny, kind):
    """They are those of the scored responses alone, as the gradient is."""
    options = {"whiten": False, "lam": 1.0} if kind is PPO else {}
    module = attach(build(kind, tiny, **options))
    (micro,) = module.collect(PROMPTS, 0)
    half = torch.arange(len(micro.rollout)) % 2 == 0
    owner = micro.rollout.spread(half)
    gone = torch.where(half, micro.scores, NAN)
    weight = micro.tokens.weight * owner
    wild = torch.where(owner, micro.tokens.credit, 1e3)
    cut = replace(micro, scores=gone, tokens=replace(micro.tokens, weight=weight, credit=wild))
    total, sums = module.losses(cut)
    found = micro_batch_sums(cut, total, sums, 1.0)
    credit = micro.tokens.credit[owner]
    assert found["credit"][0] / found["credit"][1] == pytest.approx(float(credit.mean()), abs=1e-5)
    assert found["advantage"][0] == pytest.approx(float(credit.sum()), abs=1e-4)
    for name in ("credit", "advantage", *(["value", "value_loss"] if kind is PPO else [])):
        assert found[name][1] == owner.sum(), name
    for name in ("kl", "entropy"):  # need no judge
        assert found[name][1] == len(owner), name
    if kind is PPO:  # the head is zero at the start
        returns = micro.tokens.returns[owner]
        assert float(found["value_loss"][0]) == pytest.approx(float(0.5 * (returns**2).sum()))


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_a_ratio_that_is_never_clipped_is_named_by_its_key(tiny, kind):
    with pytest.raises(InputError, match=r"model\.clip_ratio: must be positive, got 0"):
        build(kind, tiny, clip_ratio=0.0)


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_predictions_ask_no_judge(tiny, kind):
    class Gone(Vowels):
        def score(self, prompts, responses):
            raise AssertionError("asked")

    module = attach(build(kind, tiny, reward=Gone()))
    rows = module.predict_step(PromptBatch(prompts=PROMPTS[:2]), 0)
    assert rows
    assert not any(any(row["credits"]) for row in rows)


@pytest.mark.parametrize("prompts", [1, 3])
def test_predictions_of_dpo_are_no_pairs(tiny, prompts):
    """An odd number of responses: each has its row, and nobody gave it credit."""
    module = attach(DPO(PolicySpec(model=str(tiny)), rollout=GenerateRollout(4)))
    rows = module.predict_step(PromptBatch(prompts=PROMPTS[:prompts]), 0)
    assert len(rows) == prompts
