"""The command: start-up, help, which setting wins, what a run leaves behind, what it prints."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from lightning import Trainer

from cli_tools import changed, tiny_config, write_config
from iqstar import __version__
from iqstar.cli import main
from iqstar.errors import InputError
from iqstar.settings import read_settings


@pytest.fixture
def config(tmp_path, tiny):
    return tiny_config(tmp_path, tiny)


@pytest.fixture
def printed(tmp_path, config, capsys):
    """The config that a run would use."""
    file = write_config(tmp_path, config)

    def run(*argv):
        capsys.readouterr()
        assert main(["fit", "--config", str(file), *argv, "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


# ---- start-up and help


def test_no_torch_before_a_run():
    code = (
        "import sys, iqstar.cli; iqstar.cli.main(['--help']); iqstar.cli.main(['--version']);"
        "iqstar.cli.main(['fitt']); assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout


def test_usage(capsys):
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == usage
    for command in ("fit", "validate", "test", "predict", "audit", "export"):
        assert f"  {command} " in usage


def test_help_of_a_command(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: iqstar fit --config FILE [--KEY VALUE ...]\n\niqstar fit: align")
    for option in ("--model.help", "--data.help", "--trainer.max_steps", "--ckpt_path"):
        assert option in text
    assert "{command}" not in text


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--model.help", "InverseQStar", "Unit of credit, in reward per nat."),
        ("--model.estimator.help", "ContrastiveEstimator", "γ, how far to go from the reference"),
        ("--data.help", "HHRLHF", "Keep only the first human turn"),
    ],
)
def test_docstrings_are_the_help(capsys, option, value, says):
    assert main(["fit", option, value]) == 0
    assert says in " ".join(capsys.readouterr().out.split())


# ---- which setting wins


def test_the_command_line_wins_over_configs_and_a_later_config_over_an_earlier(tmp_path, printed):
    second = tmp_path / "second.yaml"
    second.write_text("trainer: {max_steps: 7, gradient_clip_val: 0.5}\n")
    assert printed()["trainer"]["max_steps"] == 2
    both = printed("--config", str(second))["trainer"]
    assert (both["max_steps"], both["gradient_clip_val"]) == (7, 0.5)
    last = printed("--config", str(second), "--trainer.max_steps", "1")["trainer"]
    assert (last["max_steps"], last["gradient_clip_val"]) == (1, 0.5)


@pytest.mark.parametrize("word", ["", "init_args."])
def test_the_word_init_args_may_be_left_out(printed, word):
    got = printed(f"--model.{word}beta", "2", f"--model.estimator.{word}strength=3")
    model = got["model"]["init_args"]
    assert model["beta"] == 2
    assert model["estimator"]["init_args"]["strength"] == 3
    assert model["estimator"]["init_args"]["principle"] == "Please be kind."
    assert model["policy"]["model"] == printed()["model"]["init_args"]["policy"]["model"]


def test_one_seed_for_all(printed):
    got = printed("--seed_everything", "5")
    assert got["seed_everything"] == 5


@pytest.mark.parametrize("file", ["configs/baseline/ppo.yaml", "configs/baseline/dpo.yaml"])
def test_adapters_are_laid_over_any_method(capsys, file):
    """The overlay says how the model is trained, not by which method."""
    argv = ("--config", file, "--config", "configs/policy/lora.yaml", "--print_config")
    assert main(["fit", *argv]) == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    plain = yaml.safe_load(Path(file).read_text())["model"]
    assert model["class_path"] == plain["class_path"]
    assert model["init_args"]["policy"]["lora"]["rank"] == 8


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_gradients_of_ddp_are_its_buckets(tmp_path, tiny, monkeypatch, strategy):
    """Else every device holds them twice."""
    config = changed(tiny_config(tmp_path, tiny), "trainer.strategy", strategy)
    config = changed(config, "trainer.devices", 2)
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, *_, **__: seen.append(trainer.strategy))
    assert main(["fit", "--config", str(write_config(tmp_path, config))]) == 0
    assert seen[0]._ddp_kwargs == {"gradient_as_bucket_view": True}


@pytest.mark.parametrize("own", [True, False])
def test_a_progress_bar_of_the_users_takes_the_place_of_ours(tmp_path, tiny, monkeypatch, own):
    theirs = {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}
    config = changed(tiny_config(tmp_path, tiny), "trainer.enable_progress_bar", True)
    config = changed(config, "trainer.callbacks", [theirs] if own else None)
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, *_, **__: seen.append(trainer))
    assert main(["fit", "--config", str(write_config(tmp_path, config))]) == 0
    bar = type(seen[0].progress_bar_callback).__name__
    assert bar == ("TQDMProgressBar" if own else "ProgressBar")


def test_group_files(printed):
    got = printed(
        *("--model.estimator", "configs/estimator/placebo.yaml"),
        *("--model.loss", "configs/loss/jsd.yaml"),
        *("--config", "configs/strategy/ddp.yaml"),
    )
    model = got["model"]["init_args"]
    assert model["estimator"]["class_path"] == "iqstar.estimators.PlaceboEstimator"
    inner = model["estimator"]["init_args"]["estimator"]
    assert inner["class_path"] == "iqstar.estimators.ContrastiveEstimator"
    assert model["loss"]["init_args"]["divergence"]["class_path"] == "iqstar.losses.GeneralizedJSD"
    assert got["trainer"]["strategy"] == "ddp"
    assert got["trainer"]["max_steps"] == 2


def test_class_names_without_their_module(printed):
    got = printed("--model.loss", "RewardImitationLoss", "--model.loss.clip", "2")
    loss = got["model"]["init_args"]["loss"]
    assert loss == {"class_path": "iqstar.losses.RewardImitationLoss", "init_args": {"clip": 2.0}}


# ---- a run


def test_a_principle_may_end_like_a_file():
    """Text of several words is no path; one word is a file that does not exist."""
    (read,) = read_settings(["--model.estimator.principle", "Answer only as valid .json"])
    assert read.value == "Answer only as valid .json"
    (read,) = read_settings(["--output", "credits.json"])  # its command says what it must be
    assert read.path == ("output",)
    with pytest.raises(InputError, match=r"contrastiv\.yaml does not exist"):
        read_settings(["--model.estimator", "contrastiv.yaml"])


def test_a_run_and_a_second_one_in_its_folder(tmp_path, config, capsys):
    argv = ["fit", "--config", str(write_config(tmp_path, config))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(argv) == 0
    shown = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
    assert not shown
    out, err = capsys.readouterr()
    assert "24 rows → 21 prompts to train on, 3 held out" in err
    assert "Training 28,832 of 28,832 weights (100.0%), 32-true" in err
    for noise in ("litlogger", "TPU", "GPU available: False", "eval mode", "Writing", "treespec"):
        assert noise not in out + err
    assert "Held-out prompts" in out
    folder = tmp_path / "runs" / "run" / "v"
    first = json.loads((folder / "summary.json").read_text())
    assert main([*argv, "--trainer.max_steps", "1"]) == 0
    second = json.loads((folder / "summary.json").read_text())
    assert (first["optimizer_steps"], second["optimizer_steps"]) == (2, 1)
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 1


def test_settings_win_over_those_of_a_checkpoint(tmp_path, config):
    file = write_config(tmp_path, config)
    assert main(["fit", "--config", str(file)]) == 0
    last = next((tmp_path / "runs").rglob("last.ckpt"))
    more = ["--trainer.max_steps", "3", "--model.beta", "2"]
    assert main(["fit", "--config", str(file), "--ckpt_path", str(last), *more]) == 0
    folder = tmp_path / "runs" / "run" / "v"
    assert json.loads((folder / "summary.json").read_text())["optimizer_steps"] == 3
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["beta"] == 2


def test_a_useful_warning_is_shown(tmp_path, config):
    config = changed(config, "model.init_args.rollout.init_args.top_p", 0.5)
    with pytest.warns(UserWarning, match="top_p < 1"):
        main(["fit", "--config", str(write_config(tmp_path, config)), "--trainer.max_steps", "1"])
