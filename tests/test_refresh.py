"""A reference, or an estimator's model, that follows the policy."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from fitting import LORA, PROMPTS, SaveAt, attach, copied, fit, make_module, same_bits, trained
from iqstar.checkpoints import AtomicCheckpointIO
from iqstar.errors import InputError
from iqstar.estimators import NullEstimator, ResponseEstimator
from iqstar.refresh import EMARefresh, PeriodicRefresh
from iqstar.rollouts import GenerateRollout
from iqstar.scoring import RolloutScorer
from iqstar.sharding import give_up_gathered, whole
from iqstar.strategies import ShardedStrategy
from processes import two_processes


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_an_average_follows_the_policy_by_its_decay(tiny):
    """By hand: w ← ¾·w + ¼·θ, twice."""
    module = attach(make_module(tiny))
    start = weights(module.frozen)
    with torch.no_grad():
        for weight in module.actor.parameters():
            weight += 1.0
    refresh = EMARefresh(decay=0.75)
    refresh.apply(module.frozen, module.actor)
    refresh.apply(module.frozen, module.actor)
    for name, weight in module.frozen.named_parameters():
        expected = start[name] + 1 - 0.75**2
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)
        assert not weight.requires_grad


def test_a_renewal_waits_for_the_next_rollout(tiny):
    """Two steps a rollout: with every = 1 the weights of step 2 are taken over, not of step 1."""
    module = make_module(
        tiny, refresh=PeriodicRefresh(every=1), micro_batch_size=2, epochs_per_rollout=1
    )
    done = fit(module, PROMPTS, batch_size=4, max_steps=3)
    own = torch.cat([p.flatten() for p in module.frozen.parameters()])
    assert torch.equal(own, done.weights[2])


def test_another_fit_of_the_same_module_renews_from_its_own_start(tiny):
    """Its steps count from 0 again; those of the first fit do not."""
    module = make_module(tiny, refresh=PeriodicRefresh(every=1))
    fit(module, PROMPTS, max_steps=3)
    done = fit(module, PROMPTS, max_steps=3)
    own = torch.cat([p.flatten() for p in module.frozen.parameters()])
    assert torch.equal(own, done.weights[2])


def test_one_role_alone_may_move(tiny):
    start = weights(attach(make_module(tiny)).frozen)
    for of in ("reference", "estimator"):
        module = make_module(tiny, refresh=EMARefresh(of, decay=0.5))
        fit(module, PROMPTS, max_steps=3)
        told = module.estimator.model
        moved, kept = (module.frozen, told) if of == "reference" else (told, module.frozen)
        assert same_bits(weights(kept), start)
        assert not same_bits(weights(moved), start)


@pytest.mark.parametrize("of", ["reference", "estimator"])
def test_a_response_estimator_asks_its_own_model_only(tiny, of):
    """Where one role moves, candidates, their ranks and the exemplar are of the estimator's."""
    estimator = ResponseEstimator("Be kind to all.", "Be rude!", candidates=2, max_new_tokens=4)
    module = attach(make_module(tiny, estimator, refresh=EMARefresh(of)))
    rollout = GenerateRollout(5).roll_out(module.policy, PROMPTS, 1.0, 3)

    def estimated():
        scorer = RolloutScorer(module.policy, [rollout])
        found = estimator.estimate(scorer, scorer.reference(), 3)
        return found.logprobs(torch.arange(len(found)))

    start = estimated()
    with torch.no_grad():
        for weight in module.frozen.parameters():
            weight *= 1.5
    assert torch.equal(estimated(), start)
    estimator.model.load_state_dict(module.frozen.state_dict())
    moved = estimated()
    estimator.model = None  # the reference, which has the same weights now
    torch.testing.assert_close(estimated(), moved)
    assert (moved - start).abs().max() > 0.1


@pytest.mark.parametrize("of", ["both", "reference", "estimator"])
def test_a_resumed_run_goes_on_exactly(tiny, tmp_path, of):
    def build():
        return make_module(
            tiny,
            refresh=EMARefresh(of, every=2, decay=0.5),
            micro_batch_size=2,
            epochs_per_rollout=2,
        )

    more = {"batch_size": 4, "plugins": [AtomicCheckpointIO()]}
    straight, second, path = build(), build(), tmp_path / "stop.ckpt"
    fit(straight, PROMPTS, max_steps=9, callbacks=[SaveAt(6, path)], **more)
    fit(second, PROMPTS, max_steps=9, ckpt_path=path, **more)
    assert same_bits(copied(trained(straight)), copied(trained(second)))
    assert same_bits(weights(straight.frozen), weights(second.frozen))


def followed(rank, folder):
    """Two processes: the reference after two renewals, held whole and spread over both."""
    found = {}
    for name, strategy in (
        ("ddp", DDPStrategy(process_group_backend="gloo")),
        ("fsdp", ShardedStrategy(process_group_backend="gloo")),
    ):
        for kind in (EMARefresh(decay=0.5), PeriodicRefresh(every=1)):
            module = make_module(folder, refresh=kind)
            options = {"devices": 2, "strategy": strategy, "batch_size": 2, "max_steps": 3}
            fit(module, PROMPTS, **options)
            give_up_gathered(module.frozen)
            held = {n: whole(p.detach()) for n, p in module.frozen.named_parameters()}
            found[name, type(kind).__name__] = copied(held)
            strategy = type(strategy)(process_group_backend="gloo")
    return found


def test_sharded_models_follow_as_whole_ones_do(tiny, tmp_path):
    """The rest of a sharded reference stays gathered after scoring: renewed there, it were lost."""
    start = weights(attach(make_module(tiny)).frozen)
    for rank in two_processes(followed, tmp_path, str(tiny)):
        for kind in ("EMARefresh", "PeriodicRefresh"):
            replicated, sharded = rank["ddp", kind], rank["fsdp", kind]
            assert not same_bits(sharded, start)
            for name, weight in replicated.items():
                torch.testing.assert_close(sharded[name], weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("before", [True, False])
def test_a_renewal_can_neither_begin_nor_end_at_a_resume(tiny, tmp_path, before):
    path, more = tmp_path / "stop.ckpt", {"batch_size": 4, "plugins": [AtomicCheckpointIO()]}
    moving, plain = make_module(tiny, refresh=EMARefresh()), make_module(tiny)
    first, second = (moving, plain) if before else (plain, moving)
    fit(first, PROMPTS, max_steps=2, callbacks=[SaveAt(1, path)], **more)
    with pytest.raises(InputError, match=r"frozen.*model\.refresh or .* as that run had them"):
        fit(second, PROMPTS, max_steps=2, ckpt_path=path, **more)


def test_without_a_renewal_checkpoints_hold_the_trained_weights_only(tiny):
    module = attach(make_module(tiny))
    assert not any(name.startswith(("frozen", "estimator")) for name in module.state_dict())
    module = attach(make_module(tiny, refresh=EMARefresh()))
    assert any(name.startswith("frozen") for name in module.state_dict())


def test_what_cannot_follow_is_refused(tiny):
    with pytest.raises(InputError, match="with adapters the reference is the policy"):
        attach(make_module(tiny, spec={"lora": LORA}, refresh=EMARefresh()))
    with pytest.raises(InputError, match="NullEstimator asks no such model; use both"):
        attach(make_module(tiny, NullEstimator(), refresh=EMARefresh("estimator")))
    with pytest.raises(InputError, match=r"model\.refresh\.init_args\.decay"):
        EMARefresh(decay=1.0)
    with pytest.raises(InputError, match=r"model\.refresh\.init_args\.every"):
        PeriodicRefresh(every=0)


@pytest.mark.parametrize(
    ("dtype", "precision", "key"),
    [
        ("bfloat16", "32-true", r"model\.policy\.dtype: .* bfloat16 rounds away; use float32"),
        ("float32", "bf16-true", r"trainer\.precision: .* bf16-true rounds away; use bf16-mixed"),
    ],
)
def test_an_average_in_sixteen_bits_is_refused(tiny, dtype, precision, key):
    """With decay 0.95 every step of it would round to nothing."""
    with pytest.raises(InputError, match=key):
        attach(make_module(tiny, spec={"dtype": dtype}, refresh=EMARefresh()), precision)
    attach(make_module(tiny, spec={"dtype": dtype}, refresh=PeriodicRefresh()), precision)
