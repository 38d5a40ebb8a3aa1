"""Identity 5 of method §7: however a batch is cut, over micro-batches or processes, one gradient.

Two gloo processes are started once; they make all two-process runs and leave them in files.
"""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor

import iqstar.sharding
from fitting import LORA, LOSSES, ask, attach, distance, fit, make_module, sgd
from iqstar import InverseQStar
from iqstar.credit import Whiten
from iqstar.estimators import NullEstimator
from iqstar.mdp import TokenCredits
from iqstar.policy import CausalLM
from iqstar.ranks import even_spans
from iqstar.rollouts import DatasetRollout, GenerateRollout
from iqstar.strategies import ShardedStrategy
from processes import two_processes

LONG = "The ring and the thing you saw are on the land and in the air and in the other inn"
#: Dealt out in turn: the first process gets the long responses, the second nearly none. Twelve
#: make a window of eight and a short one of four.
RESPONSES = [LONG[: 80 - 5 * i] if i % 2 == 0 else "a" for i in range(12)]
PROMPTS = tuple(
    ask("Go on." * (1 + i % 3), text, complete=i % 2 == 0) for i, text in enumerate(RESPONSES)
)
PRECISIONS = {"float32": ("32-true", 1e-5), "float64": ("64-true", 1e-10)}
#: How a batch of eight can be cut on one process and on two.
ALONE = {
    "8": {"batch_size": 8},
    "8 x 1 accumulated": {"batch_size": 8, "micro": 1, "accumulate_grad_batches": 8},
    "2 x 4 accumulated": {"batch_size": 8, "micro": 4, "accumulate_grad_batches": 2},
}
PAIRED = {
    "2 processes x 4": {"batch_size": 4},
    "2 processes x 2 x 2": {"batch_size": 4, "micro": 2, "accumulate_grad_batches": 2},
}


STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": lambda: ShardedStrategy(process_group_backend="gloo"),
}


ALL_STRATEGIES = STRATEGIES | {
    "fsdp, offloaded": lambda: ShardedStrategy(offload_frozen=True, process_group_backend="gloo"),
}


class LocalMean(InverseQStar):
    """Fault: every process divides by its own number of tokens."""

    def training_step(self, batch, batch_idx):
        mine = self.rollout.roll_out(self.policy, batch.prompts, 1.0, 0).response_mask.sum().float()
        everyone = mine.clone()
        torch.distributed.all_reduce(everyone)
        scaled = super().training_step(batch, batch_idx)
        return scaled * (everyone / (mine * self.trainer.world_size)).to(scaled)


class NoWorldSize(InverseQStar):
    """Fault: DDP's division by the number of processes is not undone."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / self.trainer.world_size


class NoAccumulation(InverseQStar):
    """Fault: Lightning's division by the accumulation is not undone."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / self.trainer.accumulate_grad_batches


def train(
    folder,
    dtype,
    cut,
    kind=InverseQStar,
    loss="reverse",
    lora=None,
    precision=None,
    checkpointing=False,
    sharing=True,
    **options,
):
    """Two optimiser steps of plain SGD on the fixed responses."""
    cut = dict(cut)
    torch.manual_seed(0)  # adapters start at random
    module = make_module(
        folder,
        kind=kind,
        spec={
            "dtype": dtype,
            "lora": lora,
            "gradient_checkpointing": checkpointing,
            "share_prefixes": sharing,
        },
        loss=LOSSES[loss](),
        rollout=DatasetRollout(max_new_tokens=80),
        micro_batch_size=cut.pop("micro", None),
        optimizer=sgd(0.05),
        **options,
    )
    # Lightning refuses 64-true with FSDP2; weights of float64 compute in it all the same.
    sharded = isinstance(cut.get("strategy"), ShardedStrategy)
    precision = precision or ("32-true" if sharded else PRECISIONS[dtype][0])
    run = fit(module, PROMPTS, drop_last=False, precision=precision, **cut)
    kept = {name: getattr(run, name) for name in ("gradients", "weights", "losses", "curves")}
    return kept | {"held": {name: held(model) for name, model in models(module).items()}}


def sampled(folder, rank):
    """Sharded steps on what the policy samples, responses being much longer on one rank."""
    rollout = GenerateRollout(max_new_tokens=3 + 9 * rank)
    strategy = ALL_STRATEGIES["fsdp"]()
    module = make_module(folder, rollout=rollout)
    run = fit(module, batch_size=2, max_steps=2, devices=2, strategy=strategy)
    return {"weights": run.weights, "length": run.curves[-1]["train/response_length"]}


def models(module):
    """The models of a module, by role."""
    return {n: m for n, m in module.named_modules() if isinstance(m, CausalLM)}


def held(model):
    """Bytes of a model's weights that this process holds of its own, and of the whole model."""
    model.to(model.device)  # gives up what is gathered
    own = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.nbytes for p in own), sum(p.nbytes for p in model.parameters())


#: In bfloat16, where FSDP gathers matrices in it; recomputed activations; frozen shards apart.
MIXED = {
    "mixed": {"precision": "bf16-mixed", "sharing": False},
    "mixed, null": {"precision": "bf16-mixed", "estimator": NullEstimator()},
    "recomputed": {"checkpointing": True},
    "mixed, recomputed": {"precision": "bf16-mixed", "checkpointing": True, "sharing": False},
}
#: name of a two-process run → its arguments
RUNS = {
    f"{dtype}, {name}, {strategy}": {"dtype": dtype, "cut": cut, "strategy": strategy}
    for dtype in PRECISIONS
    for name, cut in PAIRED.items()
    for strategy in STRATEGIES
} | {
    "local mean": {"dtype": "float32", "cut": PAIRED["2 processes x 4"], "kind": LocalMean},
    "no world size": {"dtype": "float32", "cut": PAIRED["2 processes x 4"], "kind": NoWorldSize},
    **{
        f"{kind}, {strategy}": {
            "dtype": "float32",
            "cut": PAIRED["2 processes x 2 x 2"],
            "strategy": strategy,
            **options,
        }
        for strategy in STRATEGIES
        for kind, options in MIXED.items()
    },
    "offloaded": {
        "dtype": "float32",
        "cut": PAIRED["2 processes x 4"],
        "strategy": "fsdp, offloaded",
    },
    "no accumulation": {
        "dtype": "float32",
        "cut": PAIRED["2 processes x 2 x 2"],
        "kind": NoAccumulation,
    },
    "reward": {"dtype": "float64", "cut": PAIRED["2 processes x 2 x 2"], "loss": "reward"},
    **{
        f"adapters, {strategy}": {
            "dtype": "float64" if strategy == "ddp" else "float32",  # PEFT's under 32-true
            "cut": PAIRED["2 processes x 2 x 2"],
            "lora": LORA,
            "strategy": strategy,
        }
        for strategy in STRATEGIES
    },
    "a process without tokens": {
        "dtype": "float64",
        "cut": PAIRED["2 processes x 4"],
        "mask_truncated": True,
    },
}


def credits(values):
    credit = torch.tensor(values, dtype=torch.float64)
    zero = torch.zeros_like(credit)
    return TokenCredits(actions=zero.long(), reference=zero, credit=credit, weight=zero + 1)


def work(rank: int, folder: str):
    """One of two processes: all runs, and whitening of unequal shares."""
    runs = {}
    for name, run in RUNS.items():
        run = dict(run)
        strategy = ALL_STRATEGIES[run.pop("strategy", "ddp")]()
        cut = {**run["cut"], "devices": 2, "strategy": strategy}
        runs[name] = train(folder, **{**run, "cut": cut})
    for mode, fit_in in {"once": True, "at every token": False}.items():
        iqstar.sharding._fit = lambda size, device, answer=fit_in: answer
        runs[f"gathered {mode}"] = sampled(folder, rank)
    device = torch.device("cpu")
    runs["spans"] = even_spans(3 - 2 * rank, 1, device)
    runs["spans, some empty"] = even_spans(3 - 2 * rank, 1, device, empty=True)
    actor = attach(make_module(folder)).policy.actor
    one_by_one = GenerateRollout(max_new_tokens=2, batch_size=1)
    runs["sampled one by one"] = len(one_by_one.sample(actor, PROMPTS[: 3 - 2 * rank], 1.0, 0))
    share = credits([[1.0, 2.0, 3.0, 10.0], [-4.0]][rank])
    runs["whiten"] = Whiten().apply(share, torch.arange(len(share))).credit
    return runs


@pytest.fixture(scope="module")
def paired(tiny, tmp_path_factory):
    """The runs of both processes."""
    return two_processes(work, tmp_path_factory.mktemp("processes"), str(tiny))


@pytest.fixture(scope="module")
def whole(tiny):
    """The run that is the yardstick: one process, one batch of eight; computed once each."""
    cache = {}

    def run(dtype, loss="reverse", lora=None, **options):
        key = (dtype, loss, lora is None, *options)
        if key not in cache:
            cache[key] = train(tiny, dtype, ALONE["8"], loss=loss, lora=lora, **options)
        return cache[key]

    return run


def gaps(run, yardstick):
    """The largest relative L2 distance of gradients and of weight changes, and of the losses."""
    assert len(run["gradients"]) == len(yardstick["gradients"]) == 2  # a full and a short window
    found = {
        f"gradient {i}": distance(a, b)
        for i, (a, b) in enumerate(zip(run["gradients"], yardstick["gradients"], strict=True))
    }
    a, b = run["weights"], yardstick["weights"]
    found |= {f"change {i}": distance(a[i + 1] - a[0], b[i + 1] - b[0]) for i in (0, 1)}
    for i, (ours, theirs) in enumerate(zip(run["losses"], yardstick["losses"], strict=True)):
        found[f"loss {i}"] = abs(ours - theirs) / abs(theirs)
    return found


def check_same(run, yardstick, tolerance):
    found = gaps(run, yardstick)
    assert {name: gap for name, gap in found.items() if gap > tolerance} == {}


def test_the_responses_are_of_very_unequal_length(tiny):
    lengths = [len(r) for r in RESPONSES]
    assert max(lengths) >= 80
    assert sum(lengths[1::2]) < 0.03 * sum(lengths)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", list(ALONE)[1:])
def test_accumulated_micro_batches_are_one_batch(tiny, whole, dtype, name):
    check_same(train(tiny, dtype, ALONE[name]), whole(dtype), PRECISIONS[dtype][1])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_are_one_batch(paired, whole, dtype, name, strategy):
    for rank in paired:
        check_same(rank[f"{dtype}, {name}, {strategy}"], whole(dtype), PRECISIONS[dtype][1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_curve_is_a_global_mean(paired, whole, strategy):
    """Not only the loss: lengths, rates, credit, KL, entropy and the gradient norm."""
    timed = {"train/tokens_per_second"}
    for rank in paired:
        for name in PAIRED:
            for ours, theirs in zip(
                rank[f"float64, {name}, {strategy}"]["curves"],
                whole("float64")["curves"],
                strict=True,
            ):
                assert ours.keys() == theirs.keys() > timed
                for key in ours.keys() - timed:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-9), key


def test_sampled_credit_is_one_batch_too(paired, whole):
    for rank in paired:
        check_same(rank["reward"], whole("float64", "reward"), 1e-10)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_are_one_batch_too(paired, whole, strategy):
    for rank in paired:
        dtype = "float64" if strategy == "ddp" else "float32"
        yardstick = whole(dtype, lora=LORA)
        check_same(rank[f"adapters, {strategy}"], yardstick, PRECISIONS[dtype][1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recomputed_activations_are_one_batch_too(paired, whole, strategy):
    for rank in paired:
        check_same(rank[f"recomputed, {strategy}"], whole("float32"), 1e-5)


@pytest.mark.parametrize("kind", ["mixed", "mixed, recomputed"])
def test_matrices_gathered_in_bfloat16_are_autocasts(paired, kind):
    """FSDP's gradient is DDP's: the same products of the same bits, summed in float32."""
    for rank in paired:
        check_same(rank[f"{kind}, fsdp"], rank[f"{kind}, ddp"], 1e-5)


def test_sharded_ranks_sample_responses_of_different_lengths(paired):
    """None waits for ever, whether blocks are gathered once per rollout or at every token."""
    for rank in paired:
        once, often = rank["gathered once"], rank["gathered at every token"]
        assert once["length"] == pytest.approx((3 + 12) / 2)
        assert often["length"] == once["length"]
        for ours, theirs in zip(once["weights"], often["weights"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_ranks_with_fewer_rows_make_as_many_passes(paired):
    """Three rows on the first rank, one on the second, one row at a time if possible."""
    first, second = paired
    assert first["spans"] == [(0, 3)]
    assert second["spans"] == [(0, 1)]
    assert first["spans, some empty"] == [(0, 1), (1, 2), (2, 3)]
    assert second["spans, some empty"] == [(0, 0), (0, 0), (0, 1)]
    assert (first["sampled one by one"], second["sampled one by one"]) == (3, 1)


def test_frozen_shards_may_stay_in_main_memory(paired, whole):
    for rank in paired:
        check_same(rank["offloaded"], whole("float32"), 1e-5)


def test_every_process_holds_half_of_each_model(paired):
    for rank in paired:
        for own, total in rank["float32, 2 processes x 4, fsdp"]["held"].values():
            assert own == pytest.approx(total / 2, rel=0.1)
        for own, total in rank["float32, 2 processes x 4, ddp"]["held"].values():
            assert own == total


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_policy_and_reference_agree_exactly_in_bfloat16(paired, strategy):
    """Identity 3: no credit, no loss, no gradient, however the weights are held."""
    for rank in paired:
        run = rank[f"mixed, null, {strategy}"]
        assert not any(gradient.any() for gradient in run["gradients"])
        assert all(torch.equal(weights, run["weights"][0]) for weights in run["weights"])


def test_a_process_without_a_single_token_takes_part(paired, whole):
    """All of the second process's responses are cut and masked out."""
    yardstick = whole("float64", mask_truncated=True)
    for rank in paired:
        check_same(rank["a process without tokens"], yardstick, 1e-10)


@pytest.mark.parametrize("fault", ["local mean", "no world size", "no accumulation"])
def test_a_planted_fault_is_found(paired, whole, fault):
    """The comparison above is sharp: each fault moves gradient and weights by far more."""
    found = gaps(paired[0][fault], whole("float32"))
    assert found["gradient 0"] > 0.1
    assert found["change 0"] > 0.1


def test_a_missing_accumulation_factor_is_found_on_one_process(tiny, whole):
    run = train(tiny, "float32", ALONE["8 x 1 accumulated"], kind=NoAccumulation)
    assert gaps(run, whole("float32"))["gradient 0"] == pytest.approx(7 / 8, rel=1e-4)


def test_whitening_is_over_all_processes(paired):
    """Credits 1, 2, 3, 10 here and −4 there: mean 12/5, variance 130/5 − 144/25 = 20.24."""
    together = torch.cat([rank["whiten"] for rank in paired])
    expected = (torch.tensor([1.0, 2, 3, 10, -4]).double() - 2.4) / 20.24**0.5
    torch.testing.assert_close(together, expected, atol=1e-12, rtol=0)
    assert together.mean().item() == pytest.approx(0, abs=1e-12)
    assert together.std(correction=0).item() == pytest.approx(1, abs=1e-12)
