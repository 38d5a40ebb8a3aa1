"""The bundled model on one and two processes: one gradient, one export, small checkpoints."""

import gc
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoModelForCausalLM

from fitting import SaveAt, ask, contrast, distance, fit, make_module, sgd
from iqstar import LoRASpec
from iqstar.checkpoints import AtomicCheckpointIO
from iqstar.export_callback import Export
from iqstar.pretrained import resolve_model
from iqstar.rollouts import DatasetRollout
from iqstar.strategies import ShardedStrategy
from processes import two_processes

pytestmark = pytest.mark.slow

LONG = "It depends on the weather, on the season and on how far you would like to walk that day."
#: The first process gets the long responses, the second nearly none.
PROMPTS = tuple(ask(f"Question {i}?", LONG[: 88 - 8 * i] if i % 2 == 0 else "No") for i in range(8))
IDS = torch.arange(1000, 1020)[None]
CUTS = {
    "8": {"batch_size": 8},
    "8 x 1": {"batch_size": 8, "micro": 1, "accumulate_grad_batches": 8},
    "ddp 2 x 4": {"batch_size": 4, "devices": 2, "strategy": DDPStrategy},
    "fsdp 2 x 4": {"batch_size": 4, "devices": 2, "strategy": ShardedStrategy},
}


def gradient(cut):
    """The gradient before clipping, and the change of plain SGD, of one optimiser step."""
    cut = dict(cut)
    if "strategy" in cut:
        cut["strategy"] = cut["strategy"](process_group_backend="gloo")
    module = make_module(
        "bundled",
        contrast(1.0),
        rollout=DatasetRollout(max_new_tokens=80),
        micro_batch_size=cut.pop("micro", None),
        optimizer=sgd(5.0),  # so large a change that rounding of the weights does not show in it
    )
    run = fit(module, PROMPTS, max_steps=1, **cut)
    change = run.weights[1] - run.weights[0]
    found = {"gradient": run.gradients[0], "change": change, "loss": run.losses[0]}
    del module, run
    gc.collect()  # a trainer and its module refer to each other: several gigabytes
    return found


def logits(policy):
    """What the live policy makes of some tokens, by the path that it is trained on."""
    from iqstar.mdp import TokenSequences

    sequences = TokenSequences(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS, dtype=torch.bool),
        position_ids=torch.arange(IDS.shape[1])[None],
        predictors=torch.arange(IDS.shape[1]),
    )
    with torch.no_grad():
        hidden = policy.actor.eval().hidden(sequences)
        return policy.actor.frozen_head().logits(hidden)


def work(rank: int, out: str):
    """One of two processes."""
    torch.set_num_threads(1)
    runs = {name: gradient(cut) for name, cut in CUTS.items() if "devices" in cut}
    module = make_module("bundled", contrast(1.0))
    fit(
        module,
        batch_size=2,
        max_steps=2,
        devices=2,
        plugins=[AtomicCheckpointIO()],
        strategy=ShardedStrategy(process_group_backend="gloo"),
        default_root_dir=out,
        callbacks=[Export(), SaveAt(2, Path(out, "sharded.ckpt"))],
    )
    runs["logits"] = logits(module.policy)
    return runs if rank == 0 else None  # both have the same, whole


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """The runs of two processes."""
    resolve_model("bundled")  # converted once
    out = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:  # several runs in a process that keeps what they
        patch.setenv("MALLOC_TRIM_THRESHOLD_", "134217728")  # freed (iqstar.allocator) take 12 GB
        return out, two_processes(work, out, str(out))[0]


def size(path):
    return sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())


def test_one_gradient(paired):
    yardstick = gradient(CUTS["8"])
    for name in list(CUTS)[1:]:
        run = paired[1].get(name) or gradient(CUTS[name])
        for what in ("gradient", "change"):
            assert distance(run[what], yardstick[what]) < 1e-5, (name, what)
        assert run["loss"] == pytest.approx(yardstick["loss"], rel=1e-5), name


def test_the_export_of_a_sharded_run_is_the_live_policy(paired):
    out, runs = paired
    model = AutoModelForCausalLM.from_pretrained(out / "policy").eval()
    with torch.no_grad():
        theirs = model(IDS).logits[0]
    torch.testing.assert_close(runs["logits"], theirs, atol=1e-5, rtol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("bundled")).eval()
    with torch.no_grad():
        assert (base(IDS).logits[0] - theirs).abs().max() > 0.1  # it was trained


def test_checkpoints_hold_trained_weights_and_moments_only(paired, tmp_path):
    assert size(paired[0] / "sharded.ckpt") < 1.7e9
    path, adapter = tmp_path / "lora.ckpt", tmp_path / "policy"
    fit(
        make_module("bundled", contrast(1.0), spec={"lora": LoRASpec(rank=8, alpha=16)}),
        max_steps=1,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=tmp_path,
        callbacks=[Export(), SaveAt(1, path)],
    )
    assert size(path) < 3 * size(adapter / "adapter_model.safetensors") + 2e6
