"""The module under a real trainer: resuming, stopping, what is kept."""

import math
import weakref
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from fitting import PROMPTS, SaveAt, ask, attach, copied, fit, make_module, same_bits, trained
from iqstar.baselines import DPO, GRPO
from iqstar.callbacks import KLLimit
from iqstar.checkpoints import AtomicCheckpointIO
from iqstar.credit import Whiten
from iqstar.data import Sample
from iqstar.errors import InputError
from iqstar.estimators import AlignedPairEstimator, ContrastiveEstimator
from iqstar.evaluation import Evaluation
from iqstar.evaluation import Sample as Said
from iqstar.judges import VaderJudge
from iqstar.losses import RewardImitationLoss, TokenPolicyGradientLoss
from iqstar.mdp import PromptBatch
from iqstar.module import InverseQStar
from iqstar.policy import PolicySpec
from iqstar.rollouts import DatasetRollout, GenerateRollout
from iqstar.summary import first_and_last, print_summary, summarize


def build(folder, **options):
    defaults = {"rollout": GenerateRollout(6), "micro_batch_size": 2, "eval_samples": 1}
    return InverseQStar(
        PolicySpec(model=str(folder)), ContrastiveEstimator("Be kind.", "Be rude."),
        **(defaults | options),
    )  # fmt: skip


def trainer(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **(quiet | options))


def data(**options):
    return Sample(**({"batch_size": 4, "val_prompts": 2} | options))


def test_resumes_inside_a_rollout(tiny, tmp_path):
    """The rollout's rest is sampled anew; exactness at this place is a matter of its own."""
    first = trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    first.fit(build(tiny), data())
    path = tmp_path / "inside.ckpt"
    first.save_checkpoint(path)
    module = build(tiny)
    second = trainer(tmp_path, max_steps=4, enable_checkpointing=False)
    second.fit(module, data(), ckpt_path=path)
    assert second.global_step == 4
    assert module.progress.rollouts == 3  # one before, its rest, and the next


def test_a_module_that_has_trained_goes_on_as_a_new_one(tiny, tmp_path):
    """What counts is the rollout of the checkpoint, not the one that the module was left with."""
    more = {"batch_size": 4, "plugins": [AtomicCheckpointIO()]}
    path = tmp_path / "inside.ckpt"
    module = make_module(tiny, micro_batch_size=2)
    fit(module, PROMPTS, max_steps=5, callbacks=[SaveAt(1, path)], **more)
    fresh = make_module(tiny, micro_batch_size=2)
    for each in (module, fresh):
        fit(each, PROMPTS, max_steps=2, ckpt_path=path, **more)
    assert same_bits(copied(trained(module)), copied(trained(fresh)))


def test_a_rollout_is_let_go_of_before_the_next_one(tiny, tmp_path):
    """Its hidden states are as large as the rollout: two at a time are more than was planned."""
    alive: list[int] = []
    rollouts: list[weakref.ref] = []

    class Watched(InverseQStar):
        def collect(self, prompts, seed):
            alive.append(sum(ref() is not None for ref in rollouts))
            parts = super().collect(prompts, seed)
            rollouts.extend(weakref.ref(part.target) for part in parts)
            return parts

    fit(make_module(tiny, kind=Watched, micro_batch_size=2), PROMPTS, max_steps=6, batch_size=4)
    assert alive == [0, 0, 0]
    assert len(rollouts) == 6


def test_a_rollout_is_not_taken_up_in_other_micro_batches(tiny, tmp_path):
    """Two steps each, so that the loader goes on where it was."""
    more = {"batch_size": 4, "plugins": [AtomicCheckpointIO()]}
    path = tmp_path / "inside.ckpt"
    first = make_module(tiny, micro_batch_size=2, epochs_per_rollout=1)
    fit(first, PROMPTS, max_steps=1, callbacks=[SaveAt(1, path)], **more)
    second = make_module(tiny, micro_batch_size=4, epochs_per_rollout=2)
    message = r"micro-batches of \[2, 2\] responses, this run has \[4\]; set model.micro_batch_size"
    with pytest.raises(InputError, match=message):
        fit(second, PROMPTS, max_steps=2, ckpt_path=path, **more)


def test_a_rollout_of_another_method_is_not_taken_up(tiny, tmp_path):
    """What GRPO calls credit is no credit of Inverse-Q*; the weights have the same names."""
    more = {"batch_size": 4, "plugins": [AtomicCheckpointIO()]}
    path = tmp_path / "inside.ckpt"
    shared = {"policy": PolicySpec(model=str(tiny)), "micro_batch_size": 4}
    rollout = GenerateRollout(4, responses_per_prompt=2)
    first = GRPO(reward=VaderJudge(), rollout=rollout, **shared)
    fit(first, PROMPTS, max_steps=1, callbacks=[SaveAt(1, path)], **more)
    second = make_module(tiny, micro_batch_size=4, rollout=rollout)
    with pytest.raises(InputError, match=r"another method; give model\.class_path as that run had"):
        fit(second, PROMPTS, max_steps=2, ckpt_path=path, **more)


def test_a_rollout_of_another_loss_has_no_log_probs_of_its_weights(tiny, tmp_path):
    more = {"batch_size": 4, "plugins": [AtomicCheckpointIO()]}
    path = tmp_path / "inside.ckpt"
    first = make_module(tiny, micro_batch_size=2)
    fit(first, PROMPTS, max_steps=1, callbacks=[SaveAt(1, path)], **more)
    second = make_module(tiny, micro_batch_size=2, loss=TokenPolicyGradientLoss())
    with pytest.raises(InputError, match="or a checkpoint between two rollouts"):
        fit(second, PROMPTS, max_steps=2, ckpt_path=path, **more)


@pytest.mark.parametrize("name", ["kl", "samples"])
def test_a_loss_cannot_take_the_name_of_a_curve(tiny, name):
    class Named(RewardImitationLoss):
        def per_token(self, logits, tokens, target):
            losses, _ = super().per_token(logits, tokens, target)
            return losses, {name: losses.detach()}

    with pytest.raises(InputError, match=f"Named measures {name}, but curves of every loss"):
        fit(make_module(tiny, loss=Named()), PROMPTS, max_steps=1)


def test_autocast_knows_no_float64(tiny):
    with pytest.raises(InputError, match=r"model\.policy\.dtype: float64 does not go with"):
        attach(make_module(tiny, spec={"dtype": "float64"}), "bf16-mixed")


class SaveInside(Callback):
    """Writes a checkpoint after the third micro-batch, in the middle of a window of two."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(self.path)


def test_resumes_inside_an_accumulation_window(tiny, tmp_path):
    """The rest of the window is normalised by its own tokens, not by nothing."""
    path = tmp_path / "window.ckpt"
    options = {"accumulate_grad_batches": 2, "enable_checkpointing": False}
    first = trainer(tmp_path, max_steps=2, callbacks=[SaveInside(path)], **options)
    first.fit(build(tiny), data())
    second = trainer(tmp_path, max_steps=2, **options)
    second.fit(build(tiny), data(), ckpt_path=path)
    assert second.global_step == 2
    ratio = second.logged_metrics["train/grad_norm"] / first.logged_metrics["train/grad_norm"]
    assert 0.1 < ratio < 10


def test_checkpoint_holds_what_was_done_and_measured(tiny, tmp_path):
    module = build(tiny)
    run = trainer(tmp_path, max_steps=2, num_sanity_val_steps=-1, enable_checkpointing=False)
    run.fit(module, data())
    path = tmp_path / "end.ckpt"
    run.save_checkpoint(path)
    loaded = build(tiny)
    trainer(tmp_path, enable_checkpointing=False).validate(
        loaded, data(), ckpt_path=path, verbose=False
    )
    assert str(loaded.evaluations[0].metrics) == str(module.evaluations[0].metrics)  # NaN ≠ NaN
    responses = [[s.response for s in m.evaluations[0].samples] for m in (loaded, module)]
    assert responses[0] == responses[1]
    assert loaded.progress.samples == module.progress.samples == 4
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_validation_before_training_is_step_zero_with_no_divergence(tiny, tmp_path):
    module = build(tiny)
    run = trainer(tmp_path, max_steps=1, num_sanity_val_steps=-1, enable_checkpointing=False)
    run.fit(module, data())
    assert module.evaluations[0].step == 0
    assert module.evaluations[0].metrics["kl"] == 0.0


def test_kl_limit_stops_a_run(tiny, tmp_path):
    limit = KLLimit(limit=1e-4, steps=2)
    fast = torch.optim.SGD
    module = build(tiny, optimizer=lambda groups: fast(groups, lr=30.0))
    run = trainer(tmp_path, max_steps=50, callbacks=[limit], enable_checkpointing=False)
    run.fit(module, data())
    assert 2 <= run.global_step < 50
    run.save_checkpoint(tmp_path / "stopped.ckpt")

    again = build(tiny, optimizer=lambda groups: fast(groups, lr=30.0))
    limit = KLLimit(limit=1e-4, steps=2)
    more = trainer(tmp_path, max_steps=50, callbacks=[limit], enable_checkpointing=False)
    more.fit(again, data(), ckpt_path=tmp_path / "stopped.ckpt")
    assert more.global_step == run.global_step  # a run that was stopped stays so


def test_a_step_whose_kl_was_not_measured_does_not_hide_the_others():
    """All responses of a step may be left out (mask_truncated): its mean is 0/0."""
    limit, run = KLLimit(limit=0.1, steps=3), Mock(spec=Trainer, should_stop=False)
    limit.load_state_dict({"recent": [math.nan], "stopped": False})
    for step, kl in enumerate([9.0, 9.0, math.nan, 9.0], start=1):
        assert not run.should_stop
        run.global_step, run.callback_metrics = step, {"train/kl": torch.tensor(kl)}
        limit.on_train_batch_end(run, Mock(spec=LightningModule), None, None, 0)
    assert run.should_stop
    assert limit.state_dict() == {"recent": [9.0, 9.0, 9.0], "stopped": True}


def test_models_are_loaded_in_main_memory(tiny):
    """Lightning asks for them with its device as the default; "meta" stands in for a GPU here."""
    pair = AlignedPairEstimator(aligned=str(tiny))
    module = InverseQStar(PolicySpec(model=str(tiny)), pair, rollout=GenerateRollout(6))
    with torch.device("meta"):
        attach(module)
    assert len(list(module.estimator.parameters())) > 0
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert module.policy.actor.sharing  # what was tried out on it went well


def test_window_that_does_not_fit_the_rollout_says_which_keys(tiny, tmp_path):
    run = trainer(tmp_path, max_steps=2, accumulate_grad_batches=4, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches.*micro_batch_size"):
        run.fit(build(tiny), data())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_gradients_are_held_while_responses_are_made(tiny, tmp_path, accumulate):
    """They are as large as the weights, and Lightning would keep them until the next backward."""
    module = build(tiny, micro_batch_size=2 if accumulate == 2 else None)
    held, sample = [], module.rollout.roll_out

    def roll_out(*arguments):
        held.append([p for p in module.trained_weights() if p.grad is not None])
        return sample(*arguments)

    module.rollout.roll_out = roll_out
    options = {"accumulate_grad_batches": accumulate, "enable_checkpointing": False}
    trainer(tmp_path, max_steps=3, **options).fit(module, data())
    assert held == [[]] * 3
    assert module.trainer.callback_metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("name", ["beta", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_units_must_be_positive(tiny, name, value):
    with pytest.raises(ValueError, match=f"model.{name}"):
        build(tiny, **{name: value})


def evaluation(step):
    return Evaluation(step=step, metrics={}, samples=())


@pytest.mark.parametrize(
    ("steps", "names"),
    [([0, 5], {"before", "after"}), ([5], {"after"}), ([0, 3], {"before"}), ([3, 4], set())],
)
def test_only_what_was_measured_is_called_before_and_after(steps, names):
    """A run of 5 steps; without a first evaluation, a later one does not stand in for it."""
    assert set(first_and_last([evaluation(s) for s in steps], 5)) == names


def test_evaluations_of_other_prompts_are_not_compared():
    """A run that goes on with other data has no score from before its training."""
    own = VaderJudge().identity
    history = [judged(0, 0.1, own, "ab"), judged(5, 0.6, own, "ac")]
    with pytest.warns(UserWarning, match="on other held-out prompts than the last one"):
        assert set(first_and_last(history, 5)) == {"after"}
    assert set(first_and_last([history[0], judged(5, 0.6, own, "ab")], 5)) == {"before", "after"}


def judged(step, score, judge, texts):
    samples = tuple(
        Said(prompt=f"say {t}", response=t, score=score or math.nan, tokens=3, truncated=False)
        for t in texts
    )
    metrics = {"kl": 0.1} | ({} if score is None else {"judge": score})
    return Evaluation(step=step, metrics=metrics, samples=samples, judge=judge)


@pytest.mark.parametrize(
    ("judge", "score", "kept"),
    [(None, None, None), ("harm 0.1", 0.4, None), (VaderJudge().identity, 0.4, 0.4)],
)
def test_a_run_goes_on_with_another_judge(tiny, judge, score, kept):
    """Its scores are not compared with those of the one before."""
    module = make_module(tiny, judge=VaderJudge(), eval_samples=2)
    own = VaderJudge().identity
    ends = {"before": judged(0, score, judge, "ab"), "after": judged(5, 0.6, own, "abcd")}
    summary = summarize(module, ends)
    assert (summary["judge"]["before"], summary["judge"]["after"]) == (kept, 0.6)
    assert (summary["before"].get("judge"), summary["before"]["kl"]) == (kept, 0.1)
    assert summary["judge"]["prompts"] == 2


def test_a_summary_prints_any_text(tiny, capsys):
    """Also what looks like rich's markup."""
    module = make_module(tiny, judge=VaderJudge(), eval_samples=1)
    own, texts = VaderJudge().identity, [r"use \[/b] or [/INST]", r"\[x = 5\]"]
    ends = {"before": judged(0, 0.1, own, texts), "after": judged(5, 0.6, own, texts)}
    rest = {"optimizer_steps": 5, "seconds": 1.0, "policy": None}
    print_summary(summarize(module, ends) | rest, ends, 2, 1)
    shown = capsys.readouterr().out
    assert all(text in shown for text in texts)


def test_a_limit_that_ends_an_epoch_ends_the_accumulation_window(tiny):
    """Lightning steps after the last batch that it trains on: N counts no further ones."""
    limits = {"batch_size": 4, "limit_train_batches": 1, "max_steps": 1}
    plain, cut = (
        fit(make_module(tiny, micro_batch_size=1), PROMPTS, accumulate_grad_batches=n, **limits)
        for n in (1, 2)
    )
    torch.testing.assert_close(cut.gradients[0], plain.gradients[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["replayed", "pairs"])
def test_a_kl_limit_needs_responses_of_the_policy(tiny, tmp_path, kind):
    """Over other responses the estimate is no KL, and may be sixty times as large."""
    module = (
        build(tiny, rollout=DatasetRollout(6))
        if kind == "replayed"
        else DPO(PolicySpec(model=str(tiny)), rollout=GenerateRollout(6))
    )
    run = trainer(tmp_path, max_steps=1, callbacks=[KLLimit(limit=1.0)], limit_val_batches=0,
                  enable_checkpointing=False)  # fmt: skip
    with pytest.raises(InputError, match=r"kl\.limit: .*leave kl\.limit out, and see val/kl"):
        run.fit(module, Answered())


class Answered(LightningDataModule):
    """Pairs, whose chosen replies are responses too."""

    training_steps = staticmethod(lambda prompts: 1)

    def train_dataloader(self):
        pair = replace(ask("Hi", "Yes."), rejected="No.")
        batch = PromptBatch(prompts=(pair, pair), last=True)
        return DataLoader([batch], collate_fn=lambda rows: rows[0])

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def test_predictions_show_the_credit_of_every_response(tiny):
    """Whatever training leaves out or rescales."""
    settings = {"rollout": GenerateRollout(4), "seed": 3, "loss": RewardImitationLoss()}
    plain = attach(make_module(tiny, **settings))
    changed = attach(make_module(tiny, transforms=[Whiten()], mask_truncated=True, **settings))
    batch = PromptBatch(prompts=PROMPTS)
    rows = plain.predict_step(batch, 0)
    assert changed.predict_step(batch, 0) == rows
    assert any(row["truncated"] for row in rows)
    assert all(row["credits"] for row in rows)
