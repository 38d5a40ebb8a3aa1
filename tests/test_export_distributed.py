"""Two processes export what one would; an export of a sharded checkpoint is the same model.

Two gloo processes are started once; they make all runs and leave them in files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fitting import LORA, fit, make_module
from iqstar.checkpoints import AtomicCheckpointIO, is_sharded_checkpoint, read_checkpoint
from iqstar.cli import main
from iqstar.export_callback import Export
from iqstar.strategies import ShardedStrategy
from processes import two_processes

POLICIES = {"full": None, "adapters": LORA}
STRATEGIES = {
    "ddp": (DDPStrategy, "32-true"),
    "fsdp": (ShardedStrategy, "32-true"),
    "fsdp, bf16": (ShardedStrategy, "bf16-mixed"),
}
RUNS = [(kind, name) for kind in POLICIES for name in STRATEGIES]


def work(rank: int, model: str, out: str) -> None:
    """One of two processes."""
    for kind, name in RUNS:
        torch.manual_seed(0)  # adapters start at random
        folder = Path(out, kind, name)
        strategy, precision = STRATEGIES[name]
        checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1)
        fit(
            make_module(model, spec={"lora": POLICIES[kind]}),
            batch_size=2,
            max_steps=2,
            devices=2,
            plugins=[AtomicCheckpointIO()],
            strategy=strategy(process_group_backend="gloo"),
            precision=precision,
            enable_checkpointing=True,
            default_root_dir=folder,
            callbacks=[Export(every_save=True), checkpoints],
        )


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The folder of all runs."""
    out = tmp_path_factory.mktemp("processes")
    two_processes(work, out, str(tiny), str(out))
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the loaded model, its adapters folded in."""
    if (folder / "adapter_config.json").is_file():
        return AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().state_dict()
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_the_export_is_the_checkpoint(runs, tiny, tmp_path, kind, name):
    folder = runs / kind / name
    (ckpt,) = (p for p in folder.glob("*.ckpt"))
    assert ckpt.name == "step=2.ckpt"
    assert is_sharded_checkpoint(ckpt) == ("fsdp" in name)
    assert [p.name for p in folder.glob("*.policy")] == ["step=2.policy"]
    at_end, beside = weights_of(folder / "policy"), weights_of(folder / "step=2.policy")
    assert equal(at_end, beside)
    assert not equal(at_end, AutoModelForCausalLM.from_pretrained(tiny).state_dict())
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    written = load_file(folder / "policy" / file)
    assert {weight.dtype for weight in written.values()} == {torch.float32}
    saved = read_checkpoint(ckpt)["state_dict"]
    if kind == "full":
        assert "lm_head.weight" not in written
        assert all(torch.equal(w, saved[f"actor.model.{n}"]) for n, w in written.items())
    assert len(written) == len(saved)
    lora = {"rank": LORA.rank, "alpha": LORA.alpha} if kind == "adapters" else None
    config = tmp_path / "config.yaml"
    policy = {"model": str(tiny), "lora": lora}
    config.write_text(yaml.safe_dump({"model": {"init_args": {"policy": policy}}}))
    argv = ["--ckpt", str(ckpt), "--config", str(config), "--out", str(tmp_path / "out")]
    assert main(["export", *argv]) == 0
    assert equal(weights_of(tmp_path / "out"), at_end)
    assert "| optimiser steps | 2 |" in (folder / "policy" / "README.md").read_text()
