"""Identity 5 of method §7 for the baselines: two processes make the gradient of one.

Two gloo processes are started once and make all runs, on fixed responses of unequal length.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from fitting import ask, attach, distance, fit, sgd
from iqstar import PolicySpec
from iqstar.baselines import DPO, GRPO, PPO, AdaptiveKL
from iqstar.errors import InputError
from iqstar.optim import Constant
from iqstar.rollouts import DatasetRollout
from iqstar.strategies import ShardedStrategy
from judging import Gaps, Vowels
from processes import two_processes

LONG = "The ring and the thing you saw are on the land and in the air"
PROMPTS = tuple(
    replace(ask(f"Go on {i}.", LONG[: 40 - 5 * i] if i % 2 == 0 else "a"), rejected="No" + "o" * i)
    for i in range(8)
)
KINDS = {"ppo": PPO, "grpo": GRPO, "dpo": DPO}


class Replayed(DatasetRollout):
    """The data set's responses, taken for the policy's own: the same ones on any processes."""

    on_policy = True

    def __init__(self, responses_per_prompt):
        super().__init__(80)
        self.responses_per_prompt = responses_per_prompt

    def roll_out(self, policy, prompts, temperature, seed):
        more = range(self.responses_per_prompt)
        rows = [replace(p, response=(p.response or "") + "e" * i) for p in prompts for i in more]
        return super().roll_out(policy, rows, temperature, seed)


def build(folder, kind):
    options = {} if kind is DPO else {"reward": Vowels()}
    if kind is PPO:
        options |= {"kl": AdaptiveKL(target=0.01, horizon=10), "clip_value": None}
    rollout = Replayed(2 if kind is GRPO else 1)
    # What rows share is read once, and its gradient is rounded to float32 in the model's norms.
    spec = PolicySpec(model=str(folder), dtype="float64", share_prefixes=False)
    return kind(spec, rollout=rollout, optimizer=sgd(0.05), schedule=Constant(), **options)


def run(folder, name, precision="64-true", **cut):
    module = build(folder, KINDS[name])
    done = fit(module, PROMPTS, precision=precision, max_steps=4, **cut)
    own = getattr(getattr(module, "kl", None), "coefficient", None)
    keys = done.curves[0].keys() - {"train/tokens_per_second"}
    curves = [{key: values[key] for key in keys} for values in done.curves]
    return {"gradients": done.gradients, "weights": done.weights, "curves": curves, "kl": own}


class Failing(Vowels):
    """Fails on one rank, or on both, in one way or another."""

    def __init__(self, error, ranks):
        self.error, self.ranks = error, ranks

    def score(self, prompts, responses):
        if torch.distributed.get_rank() in self.ranks:
            raise self.error
        return super().score(prompts, responses)


FAILURES = {
    "set up wrongly on one": lambda: Failing(InputError("no such file"), (1,)),
    "no score on any": lambda: Failing(RuntimeError("no such page"), (0, 1)),
    "no score on one": lambda: Failing(RuntimeError("no such page"), (1,)),
}


def judged(folder, name):
    """What becomes of a first rollout with a judge that fails."""
    module = attach(build(folder, GRPO), "64-true")
    module.reward = FAILURES[name]()
    try:
        (micro,) = module.collect(PROMPTS[:2], 0)
    except InputError as error:
        return str(error)
    return micro.scores.isnan().all().item()


def work(rank: int, folder: str):
    failures = {name: judged(folder, name) for name in FAILURES}
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    runs = {"failures": failures}
    for name in KINDS:
        strategy["strategy"] = DDPStrategy(process_group_backend="gloo")
        runs[name] = run(folder, name, batch_size=4, **strategy)
    # Its rollouts leave the policy's weights sharded, as those of a server do.
    strategy["strategy"] = ShardedStrategy(process_group_backend="gloo")
    runs["grpo, sharded"] = run(folder, "grpo", "32-true", batch_size=4, **strategy)
    try:
        sharded = ShardedStrategy(process_group_backend="gloo")
        fit(build(folder, PPO), PROMPTS, batch_size=4, max_steps=1, devices=2, strategy=sharded)
    except InputError as error:
        runs["sharded"] = str(error)
    return runs


@pytest.fixture(scope="module")
def paired(tiny, tmp_path_factory):
    return two_processes(work, tmp_path_factory.mktemp("processes"), str(tiny))


@pytest.mark.parametrize("name", [*KINDS, "grpo, sharded"])
def test_two_processes_are_one(tiny, paired, name):
    """Gradients, curves and weights: whitening, groups and prices are over all ranks."""
    whole = run(tiny, name.partition(",")[0], batch_size=8)
    for rank in paired:
        for ours, theirs in zip(whole["gradients"], rank[name]["gradients"], strict=True):
            assert distance(theirs, ours) < 1e-10
        assert distance(rank[name]["weights"][-1], whole["weights"][-1]) < 1e-10
        if name == "ppo":
            assert rank[name]["kl"] == pytest.approx(whole["kl"], rel=1e-9) != 0.05
        for ours, theirs in zip(whole["curves"], rank[name]["curves"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)


def test_a_value_head_is_not_sharded_in_silence(paired):
    assert "value head of PPO cannot be sharded; use ddp" in paired[0]["sharded"]


def test_all_ranks_stop_together_at_a_judge_that_does_not_work(paired):
    for rank, ran in enumerate(paired):
        found = ran["failures"]
        assert "cannot be used: no such file" in found["set up wrongly on one"]
        assert (
            "none of the first 8 responses (RuntimeError: no such page)" in found["no score on any"]
        )
        assert found["no score on one"] == (rank == 1)


def test_a_group_is_never_cut(tiny):
    """Responses to one prompt are compared whichever micro-batches they are in."""
    module = attach(build(tiny, GRPO), "64-true")
    module.reward = Gaps()
    module.micro_batch_size = 1
    alone = module.collect(PROMPTS[:2], 0)
    module.micro_batch_size = None
    (together,) = module.collect(PROMPTS[:2], 0)
    torch.testing.assert_close(torch.cat([m.tokens.credit for m in alone]), together.tokens.credit)
