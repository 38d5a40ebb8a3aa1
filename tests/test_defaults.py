"""Parts that no setting names: they are printed, and one setting of theirs can be changed."""

import json

import pytest
import torch
import yaml

from cli_tools import REMOVED, changed, error_of, tiny_config, write_config
from iqstar.alignment import AlignmentModule
from iqstar.baselines import PPO, FixedKL
from iqstar.cli import main
from iqstar.defaults import PARTS
from iqstar.estimators import NullEstimator
from iqstar.judges import RefusalJudge
from iqstar.losses import DistributionImitationLoss, ReverseKL
from iqstar.module import InverseQStar
from iqstar.optim import ADAMW, WarmupCosine
from iqstar.policy import PolicySpec
from iqstar.precision import default_precision
from iqstar.rollouts import GenerateRollout

MODEL = "model.init_args"


@pytest.fixture
def config(tmp_path, tiny):
    """One that leaves the parts to their defaults, as README's does."""
    config = changed(tiny_config(tmp_path, tiny), f"{MODEL}.rollout", REMOVED)
    return changed(config, "trainer.precision", REMOVED)


@pytest.fixture
def printed(tmp_path, config, capsys):
    """The parts of the method that a run would use."""

    def run(*argv, keys=()):
        content = config
        for key, value in keys:
            content = changed(content, key, value)
        capsys.readouterr()
        code = main(["fit", "--config", str(write_config(tmp_path, content)), *argv])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return yaml.safe_load(shown.out)

    return run


def test_defaults_are_printed(printed):
    got = printed("--print_config")
    model = got["model"]["init_args"]
    assert model["rollout"]["class_path"] == "iqstar.rollouts.GenerateRollout"
    assert model["rollout"]["init_args"]["max_new_tokens"] == 64
    assert model["schedule"] == {
        "class_path": "iqstar.optim.WarmupCosine",
        "init_args": {"warmup": 0.1, "floor": 0.1},
    }
    assert model["loss"]["init_args"]["divergence"] == {"class_path": "iqstar.losses.ReverseKL"}
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW"
    chosen = {key: model["optimizer"]["init_args"][key] for key in ("lr", "weight_decay", "fused")}
    assert chosen == {"lr": 2e-5, "weight_decay": 0.0, "fused": True}
    assert got["trainer"]["precision"] == default_precision("cpu")
    # Wherever it stands.
    later = ("--print_config", "--trainer.max_steps", "7")
    assert printed(*later) == printed(*later[1:], *later[:1])


def test_defaults_are_those_of_the_constructors(tiny):
    policy = PolicySpec(model=str(tiny))
    module = InverseQStar(policy, NullEstimator())
    assert type(module.rollout) is GenerateRollout
    assert type(module.schedule) is WarmupCosine
    assert type(module.loss) is DistributionImitationLoss
    assert type(module.loss.divergence) is ReverseKL
    assert type(PPO(policy, RefusalJudge()).kl) is FixedKL
    assert set(PARTS[AlignmentModule]) == {"rollout", "optimizer", "schedule"}
    (group,) = module.optimizer([torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert {key: group[key] for key in ADAMW} == ADAMW


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout.init_args.max_new_tokens", 128),
        ("optimizer.init_args.lr", 1e-5),
        ("schedule.init_args.warmup", 0.2),
        ("loss.init_args.divergence.class_path", "iqstar.losses.ForwardKL"),
    ],
)
def test_one_setting_of_a_default_part(printed, key, value):
    """On the command line and in YAML, there with ``init_args`` and without."""
    short = key.replace("init_args.", "").replace(".class_path", "")
    argument = str(value).rpartition(".")[2] if isinstance(value, str) else str(value)
    by_option = printed(f"--model.{short}", argument, "--print_config")
    by_key = printed("--print_config", keys=[(f"{MODEL}.{key}", value)])
    assert by_option == by_key == printed("--print_config", keys=[(f"{MODEL}.{short}", value)])
    base = printed("--print_config")
    assert changed(base, f"{MODEL}.{key}", value) == by_option


def test_a_class_that_is_named_has_its_own_defaults(printed):
    """Not those of the part in whose place it stands: torch's AdamW decays."""
    named = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0}}
    for got in (
        printed("--print_config", keys=[(f"{MODEL}.optimizer", named)]),
        printed("--model.optimizer", "AdamW", "--model.optimizer.lr=1.0", "--print_config"),
    ):
        optimizer = got["model"]["init_args"]["optimizer"]["init_args"]
        assert (optimizer["weight_decay"], optimizer["fused"]) == (0.01, None)
    got = printed("--model.rollout", "DatasetRollout", "--print_config")
    assert got["model"]["init_args"]["rollout"]["init_args"] == {"max_new_tokens": 64}


def test_a_part_may_be_null(printed):
    keys = [(f"{MODEL}.{name}", None) for name in ("loss", "rollout", "schedule")]
    model = printed("--print_config", keys=keys)["model"]["init_args"]
    assert model["loss"] is model["rollout"] is model["schedule"] is None


def test_parts_of_a_baseline(printed):
    argv = ["--model", "PPO", "--model.reward", "RefusalJudge", "--print_config"]
    keys = [("model", {"init_args": {"policy": {"model": "bundled"}}})]
    model = printed(*argv[:-1], "--model.kl.coefficient", "0.1", argv[-1], keys=keys)["model"]
    assert model["class_path"].startswith("iqstar.baselines.")
    given = model["init_args"]
    assert "loss" not in given
    assert given["kl"]["init_args"] == {"coefficient": 0.1}
    assert given["optimizer"]["init_args"]["lr"] == 2e-5


def test_misspelt_setting_of_a_default_part(tmp_path, config, capsys):
    file = str(write_config(tmp_path, config))
    message = error_of(capsys, "fit", "--config", file, "--model.optimizer.lrr", "1")
    assert message.endswith("did you mean --model.optimizer.lr?")


def test_epochs_alone_are_not_cut_short_by_the_default_steps(printed):
    """Steps that are named still end the run, as the first of the two does in Lightning."""

    def steps(*argv, keys=(("trainer.max_steps", REMOVED),)):
        return printed(*argv, "--print_config", keys=keys)["trainer"]["max_steps"]

    assert steps() == 100
    assert steps("--trainer.max_epochs", "3") == -1
    assert steps("--trainer.max_epochs=3", "--trainer.max_steps=7") == 7
    assert steps("--trainer.max_epochs=-1") == 100
    assert steps("--trainer.max_epochs=3", keys=()) == 2


def test_a_run_of_epochs(tmp_path, config):
    """5 steps an epoch; all of them are made, and the last one is measured."""
    config = changed(config, "trainer.max_steps", REMOVED)
    config = changed(config, "trainer.max_epochs", 2)
    config = changed(config, "model.init_args.rollout", {"max_new_tokens": 4})
    assert main(["fit", "--config", str(write_config(tmp_path, config))]) == 0
    summary = json.loads((tmp_path / "runs" / "run" / "v" / "summary.json").read_text())
    assert summary["optimizer_steps"] == 10
    assert [e["step"] for e in summary["evaluations"]] == [0, 5, 10]
    assert summary["after"] is not None
