"""A run that stops and goes on is the run that never stopped, bit for bit.

Two gloo processes are started once and make all two-process runs. A rollout of four prompts lasts
four optimiser steps (two micro-batches, twice over) and an epoch eight, so step 6 is in the middle
of the second rollout.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from fitting import (
    LORA,
    PROMPTS,
    SaveAt,
    adamw,
    ask,
    copied,
    fit,
    make_module,
    same_bits,
    trained,
)
from iqstar.checkpoints import (
    AtomicCheckpointIO,
    is_sharded_checkpoint,
    read_checkpoint,
    weight_names,
)
from iqstar.errors import InputError
from iqstar.losses import TokenPolicyGradientLoss
from iqstar.optim import WarmupCosine
from iqstar.resume import check_same_checkpoint
from iqstar.rollouts import GenerateRollout
from iqstar.sharding import own_part
from iqstar.strategies import ShardedStrategy
from processes import two_processes

STEPS, STOP = 9, 6
ASKED = (*PROMPTS, *(ask(f"Tell me about {i}, please{'!' * i}") for i in range(4)))
POLICIES = {"full": None, "adapters": LORA}
STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": lambda: ShardedStrategy(process_group_backend="gloo"),
    "fsdp, one file": lambda: ShardedStrategy(
        process_group_backend="gloo", save_distributed_checkpoint=False
    ),
}


def run(folder, lora=None, world=1, steps=STEPS, strategy=None, callbacks=(), lr=1e-2, **options):
    """Trains on what the policy samples; returns the weights and losses of every step."""
    torch.manual_seed(0)  # adapters start at random
    gradients = GradientBytes()
    module = make_module(
        folder,
        spec={"lora": lora},
        rollout=GenerateRollout(max_new_tokens=3),
        loss=TokenPolicyGradientLoss(),  # needs the log-probs of the weights that sampled
        optimizer=adamw(lr),
        schedule=WarmupCosine(),
        micro_batch_size=2 // world,
        epochs_per_rollout=2,
    )
    done = fit(
        module,
        ASKED,
        batch_size=4 // world,
        max_steps=steps,
        devices=world,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*callbacks, gradients],
        **options,
        **({"strategy": STRATEGIES[strategy]()} if strategy else {}),
    )
    return {
        "weights": copied(trained(module)),
        "losses": done.losses,
        "samples": module.progress.samples,
        "held": held(module) | {"gradients": gradients.held},
        "rates": [group["lr"] for group in module.trainer.optimizers[0].param_groups],
    }


class GradientBytes(Callback):
    """Bytes of gradients that this process holds when a step is due."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.trained_weights()]
        self.held = sum(own_part(g).nbytes for g in grads)


def held(module):
    """Bytes that this process holds of trained weights and their moments."""
    weights = [p for p in module.actor.parameters() if p.requires_grad]
    states = module.trainer.optimizers[0].state
    kinds = {
        "weights": weights,
        "moments": [states[p][name] for p in weights for name in ("exp_avg", "exp_avg_sq")],
    }
    return {kind: sum(own_part(t).nbytes for t in tensors) for kind, tensors in kinds.items()}


def both(folder, path, **options):
    """The run without a stop, which saves on its way, and the one that goes on from there."""
    straight = run(folder, callbacks=[SaveAt(STOP, path)], **options)
    return {"straight": straight, "resumed": run(folder, ckpt_path=path, **options)}


def check_same(pair):
    """Same weights and losses; a resumed run has the losses of its own steps only."""
    assert same_bits(pair["straight"]["weights"], pair["resumed"]["weights"])
    assert pair["resumed"]["losses"] == pair["straight"]["losses"][STOP:]
    assert pair["resumed"]["samples"] == pair["straight"]["samples"]


def work(rank: int, folder: str, alone: str, out: str):
    """One of two processes: every strategy, full and with adapters, and checkpoints of others."""
    runs = {}
    for kind, lora in POLICIES.items():
        for name in STRATEGIES:
            path = Path(out, f"{kind}, {name}.ckpt")
            runs[kind, name] = both(folder, path, lora=lora, world=2, strategy=name)
            runs[kind, name, "from one process"] = run(
                folder,
                lora=lora,
                world=2,
                steps=STOP + 1,
                strategy=name,
                ckpt_path=Path(alone, f"{kind}.ckpt"),
            )
        runs[kind, "ddp"]["again"] = run(folder, lora=lora, world=2, strategy="ddp")
        # The same training, whose checkpoints are other files.
        runs[kind, "fsdp"]["again"] = runs[kind, "fsdp, one file"]["straight"]
    return runs


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The runs of one process, and their checkpoints."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {kind: both(tiny, folder / f"{kind}.ckpt", lora=lora) for kind, lora in POLICIES.items()}
    return folder, runs


@pytest.fixture(scope="module")
def paired(tiny, alone, tmp_path_factory):
    """The runs of two processes, and the folder of their checkpoints."""
    out = tmp_path_factory.mktemp("processes")
    return out, two_processes(work, out, str(tiny), str(alone[0]), str(out))


@pytest.mark.parametrize("kind", POLICIES)
def test_one_process_goes_on_exactly(alone, kind):
    check_same(alone[1][kind])


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_go_on_exactly(paired, kind, name):
    for rank in paired[1]:
        check_same(rank[kind, name])


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_run_repeats_bit_for_bit(paired, kind, name):
    for rank in paired[1]:
        assert same_bits(
            rank[kind, name]["straight"]["weights"], rank[kind, name]["again"]["weights"]
        )


@pytest.mark.parametrize("kind", POLICIES)
def test_all_ranks_end_with_the_same_weights(paired, kind):
    for name in STRATEGIES:
        first, second = (rank[kind, name]["straight"]["weights"] for rank in paired[1])
        assert same_bits(first, second)


@pytest.mark.parametrize("kind", POLICIES)
def test_sharding_halves_weights_gradients_and_moments(paired, kind):
    for rank in paired[1]:
        whole = rank[kind, "ddp"]["straight"]["held"]
        for what, size in rank[kind, "fsdp"]["straight"]["held"].items():
            assert size == pytest.approx(whole[what] / 2, rel=0.1), what


def test_checkpoints_are_of_the_kind_asked_for(paired):
    out, _ = paired
    assert is_sharded_checkpoint(out / "full, fsdp.ckpt")
    assert (out / "full, fsdp, one file.ckpt").is_file()
    assert (out / "full, ddp.ckpt").is_file()
    assert list(out.glob("*.part")) == []


def test_a_sharded_checkpoint_is_checked_before_it_is_loaded(paired):
    """Loading a folder would pass over weights that the model lacks."""

    def refuse(names):
        assert names == set(read_checkpoint(paired[0] / "full, ddp.ckpt")["state_dict"])
        raise InputError("of another method")

    strategy = STRATEGIES["fsdp"]()
    strategy._lightning_module = SimpleNamespace(
        on_load_checkpoint=lambda checkpoint: None, check_weights=refuse
    )
    with pytest.raises(InputError, match="of another method"):
        strategy.load_checkpoint(paired[0] / "full, fsdp.ckpt")


def test_a_sharded_checkpoint_with_damaged_metadata_is_named(paired, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    shutil.copytree(paired[0] / "full, fsdp.ckpt", damaged)
    (damaged / ".metadata").write_bytes(b"")
    with pytest.raises(InputError, match=r"--ckpt_path: .*damaged\.ckpt cannot be read \("):
        weight_names(damaged)


@pytest.mark.parametrize("kind", POLICIES)
def test_every_kind_holds_the_same(paired, kind):
    """One file of DDP, one file of FSDP and a sharded folder: same names, trained weights only."""
    out, _ = paired
    files = [read_checkpoint(out / f"{kind}, {name}.ckpt") for name in STRATEGIES]
    names = set(files[0]["state_dict"])
    assert weight_names(out / f"{kind}, fsdp.ckpt") == names
    for file in files:
        assert set(file["state_dict"]) == names
        moments = file["optimizer_states"][0]["state"]
        assert moments.keys() == files[0]["optimizer_states"][0]["state"].keys()
        for name in names:  # ranks sum gradients in another order: not bit for bit
            torch.testing.assert_close(
                file["state_dict"][name], files[0]["state_dict"][name], atol=1e-3, rtol=1e-3
            )


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_of_two_processes_loads_on_one(tiny, paired, kind, name):
    """Weights and moments are taken over whole; one further step changes the weights."""
    path = paired[0] / f"{kind}, {name}.ckpt"
    saved = read_checkpoint(path)["state_dict"]
    resumed = run(tiny, lora=POLICIES[kind], steps=STOP + 1, ckpt_path=path)
    assert len(resumed["losses"]) == 1
    before = {key.removeprefix("actor."): value for key, value in saved.items()}
    assert before.keys() == resumed["weights"].keys()
    moved = torch.cat([(resumed["weights"][key] - before[key]).flatten() for key in before])
    assert 0 < moved.abs().max() < 0.02  # Adam at lr 1e-2, moments kept: a new one would overshoot


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_of_one_process_loads_on_two(alone, paired, kind, name):
    saved = read_checkpoint(alone[0] / f"{kind}.ckpt")["state_dict"]
    for rank in paired[1]:
        resumed = rank[kind, name, "from one process"]
        assert len(resumed["losses"]) == 1
        before = {key.removeprefix("actor."): value for key, value in saved.items()}
        moved = torch.cat([(resumed["weights"][key] - before[key]).flatten() for key in before])
        assert 0 < moved.abs().max() < 0.02


def test_a_resumed_run_has_the_rate_that_it_is_given(tiny, alone):
    """And not that of the checkpoint: with a rate of 0 no weight moves."""
    path = alone[0] / "full.ckpt"
    rates = alone[1]["full"]["resumed"]["rates"]
    halved = run(tiny, ckpt_path=path, lr=5e-3)
    assert halved["rates"] == pytest.approx([rate / 2 for rate in rates])
    still = run(tiny, ckpt_path=path, lr=0.0)
    saved = read_checkpoint(path)["state_dict"]
    for name, weight in still["weights"].items():
        assert torch.equal(weight, saved[f"actor.{name}"])


def test_frozen_weights_are_not_in_a_checkpoint_but_their_identity_is(tiny, alone):
    for kind in POLICIES:
        saved = read_checkpoint(alone[0] / f"{kind}.ckpt")
        assert not any(name.startswith(("frozen", "estimator")) for name in saved["state_dict"])
        assert len(saved["iqstar"]["frozen"]["reference"]) == 64


def differing(rank):
    with pytest.raises(InputError) as error:
        check_same_checkpoint(None if rank else "runs/a.ckpt")
    check_same_checkpoint("runs/a.ckpt")
    return str(error.value)


def test_processes_that_found_different_checkpoints_are_told(tmp_path):
    """As on nodes with file systems of their own: some would train while others evaluate."""
    for message in two_processes(differing, tmp_path):
        assert "(process 0: runs/a.ckpt, process 1: none)" in message


def test_another_base_model_is_refused(tmp_path, alone):
    from tiny import tiny_folder

    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"other frozen weights \(reference: \w{12} there"):
        run(other, ckpt_path=alone[0] / "full.ckpt")


def test_the_rest_of_an_epoch_is_trained_on_in_larger_batches(tiny, tmp_path):
    """Four of eight prompts one by one, then the other four in one accumulated step."""

    class Seen(GenerateRollout):
        def roll_out(self, policy, prompts, temperature, seed):
            seen.extend(p.messages[0].content for p in prompts)
            return super().roll_out(policy, prompts, temperature, seed)

    def train(steps, **options):
        module = make_module(tiny, rollout=Seen(max_new_tokens=3), micro_batch_size=1)
        fit(module, ASKED, max_steps=steps, plugins=[AtomicCheckpointIO()], **options)

    seen, path = [], tmp_path / "a.ckpt"
    train(4, batch_size=1, callbacks=[SaveAt(4, path)])
    train(5, batch_size=4, accumulate_grad_batches=4, ckpt_path=path)
    assert seen == [prompt.messages[0].content for prompt in ASKED]
