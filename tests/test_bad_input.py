"""Bad input: one clear line with the place and the remedy, an exit code, no traceback."""

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer
from torch.multiprocessing import ProcessRaisedException

from cli_tools import REMOVED, changed, error_of, line_of, tiny_config, write_config
from iqstar.cli import main
from iqstar.module import InverseQStar
from iqstar.training_cli import readable_errors
from tiny import tiny_folder, tiny_model, tiny_tokenizer

ESTIMATOR = "model.init_args.estimator"


@pytest.fixture
def config(tmp_path, tiny):
    return tiny_config(tmp_path, tiny)


@pytest.fixture
def fails(tmp_path, config, capsys):
    """Runs the tiny config with one key changed and returns the error."""

    def run(key=None, value=None, *argv, command="fit", code=2):
        content = config if key is None else changed(config, key, value)
        file = write_config(tmp_path, content)
        return error_of(capsys, command, "--config", str(file), *argv, code=code)

    return run


def data_error(tmp_path, config, capsys, text, name="bad.jsonl", data="JSONL"):
    file = tmp_path / name
    file.write_text(text)
    config = changed(config, "data.init_args.path", str(file))
    config["data"]["class_path"] = f"iqstar.data.{data}"
    return error_of(capsys, "fit", "--config", str(write_config(tmp_path, config)))


# ---- commands and config files


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_missing_config(command, capsys):
    message = error_of(capsys, command)
    assert f"iqstar {command} needs --config FILE" in message


def test_config_before_the_command(capsys):
    message = error_of(capsys, "--config", "a.yaml", "validate")
    assert "--config came before the command" in message
    assert "iqstar validate --config" in message


def test_unknown_command(capsys):
    assert "did you mean fit?" in error_of(capsys, "fitt", "--config", "a.yaml")
    assert "one of fit, validate" in error_of(capsys, "deploy")


def test_config_file_that_does_not_exist(tmp_path, capsys):
    message = error_of(capsys, "fit", "--config", str(tmp_path / "none.yaml"))
    assert "none.yaml does not exist" in message
    assert "no file is given" in error_of(capsys, "fit", "--config")


def test_group_file_that_does_not_exist(fails):
    message = fails(None, None, "--model.estimator", "configs/estimator/none.yaml")
    assert message.startswith("--model.estimator: configs/estimator/none.yaml does not exist")


@pytest.mark.parametrize(
    ("text", "line"), [("a: 1\nb: [1, 2\nc: 3\n", 3), ("a: 1\n  b: 2\n", 2), ("a: 'x\n", 2)]
)
def test_yaml_syntax(tmp_path, capsys, text, line):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    message = error_of(capsys, "fit", "--config", str(file))
    assert message.startswith(f"{file}:{line}: not valid YAML")


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words\n"])
def test_yaml_that_is_no_mapping(tmp_path, capsys, text):
    file = tmp_path / "list.yaml"
    file.write_text(text)
    assert f"{file}:1: not a mapping" in error_of(capsys, "fit", "--config", str(file))


def test_config_that_is_no_text(tmp_path, capsys):
    file = tmp_path / "weights.yaml"
    file.write_bytes(b"\xff\xfe\x00\x81")
    assert f"{file}: cannot be read" in error_of(capsys, "fit", "--config", str(file))


# ---- keys


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("modle", "model"),
        ("trainer.max_stepz", "trainer.max_steps"),
        ("summary.exmples", "summary.examples"),
        ("model.init_args.betaa", "model.init_args.beta"),
        ("model.init_args.policy.modle", "model.init_args.policy.model"),
        ("model.init_args.policy.lora.rnk", "model.init_args.policy.lora.rank"),
        (f"{ESTIMATOR}.init_args.strenght", f"{ESTIMATOR}.init_args.strength"),
        ("data.init_args.batchsize", "data.init_args.batch_size"),
        ("trainer.logger.init_args.save_dri", "trainer.logger.init_args.save_dir"),
    ],
)
def test_misspelt_key_in_a_file(fails, tmp_path, key, right):
    message = fails(key, 1)
    file = tmp_path / "config.yaml"
    line = line_of(file, key.rpartition(".")[2] + ":")
    assert message == f"{file}:{line}: unknown key {key}; did you mean {right}?"


def test_misspelt_key_in_a_nested_part(fails):
    message = fails(
        "model.init_args.loss",
        {
            "class_path": "iqstar.losses.DistributionImitationLoss",
            "init_args": {
                "divergence": {
                    "class_path": "iqstar.losses.GeneralizedJSD",
                    "init_args": {"weigth": 0.5},
                }
            },
        },
    )
    assert message.endswith(
        "did you mean model.init_args.loss.init_args.divergence.init_args.weight?"
    )


def test_misspelt_key_in_the_optimizer(fails):
    message = fails(
        "model.init_args.optimizer", {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1.0}}
    )
    assert message.endswith("did you mean model.init_args.optimizer.init_args.lr?")


def test_key_without_a_near_one_lists_the_known(fails):
    message = fails("data.init_args.zzzzzz", 1)
    assert "unknown key data.init_args.zzzzzz; known there: path, " in message


@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("--trainer.max_stepz", "--trainer.max_steps"),
        ("--model.betaa", "--model.beta"),
        ("--model.init_args.betaa", "--model.init_args.beta"),
        ("--model.estimator.strenght", "--model.estimator.strength"),
        ("--modle.beta", "--model.beta"),
        ("--data.batchsize", "--data.batch_size"),
        ("--ckpt_pth", "--ckpt_path"),
    ],
)
def test_misspelt_option(fails, option, right):
    argv = [option, "3"] if "init_args" not in option else [f"{option}=3"]
    message = fails(None, None, *argv)
    assert message == f"{option}: unknown option; did you mean {right}?"


def test_a_file_of_data_is_no_config(fails, tmp_path):
    """Whatever it is called: the data module reads it, and says what is wrong with it."""
    file = tmp_path / "heldout.json"
    file.write_text("[]")
    pairs = ("--data", "iqstar.data.JSONLPairs", "--data.heldout_path", str(file))
    assert "not a mapping of keys" not in fails(None, None, *pairs)


@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("--max_steps", "--trainer.max_steps"),
        ("--lr", "--model.optimizer.lr"),
        ("--strength", "--model.estimator.strength"),
        ("--batch_size", "--data.batch_size or --model.rollout.batch_size"),
    ],
)
def test_option_without_what_stands_before_it(fails, option, right):
    assert fails(None, None, option, "5") == f"{option}: unknown option; did you mean {right}?"


def test_key_at_another_place(fails, tmp_path):
    file = tmp_path / "config.yaml"
    message = fails("trainer.beta", 2)
    line = line_of(file, "beta")
    assert message == f"{file}:{line}: unknown key trainer.beta; did you mean model.beta?"


def test_settings_beside_a_class_path(fails, tmp_path):
    part = {"class_path": "iqstar.estimators.PrincipleEstimator", "principle": "Be kind."}
    message = fails(ESTIMATOR, part)
    file = tmp_path / "config.yaml"
    assert message == (
        f"{file}:{line_of(file, 'principle:')}: {ESTIMATOR}.principle stands beside class_path; "
        f"a class takes what is below init_args: {ESTIMATOR}.init_args.principle"
    )


def test_settings_of_a_part_without_a_class(fails):
    for option in ("--model.refresh.every", "--model.refresh.evry"):
        message = fails(None, None, option, "2")
        assert message == (
            f"{option}: model.refresh has no class yet; name one first: --model.refresh, one of "
            "iqstar.refresh.EMARefresh, iqstar.refresh.PeriodicRefresh"
        )


def test_word_that_is_no_option(fails):
    assert fails(None, None, "stray").startswith("stray: not expected here")


def test_misspelt_key_in_a_group_file(fails, tmp_path):
    file = tmp_path / "group.yaml"
    file.write_text(
        "class_path: iqstar.estimators.PrincipleEstimator\n"
        "init_args:\n  principle: Be kind.\n  placment: system\n"
    )
    message = fails(None, None, "--model.estimator", str(file))
    assert message.startswith(f"{file}:4: unknown key model.estimator.init_args.placment; did you")
    file.write_text("class_path: iqstar.estimators.NulEstimator\n")
    message = fails(None, None, "--model.estimator", str(file))
    assert message.startswith(f"{file}:1: model.estimator: iqstar.estimators.NulEstimator is no ")


def test_a_key_of_a_mapping_on_the_command_line(fails):
    message = fails(None, None, "--model.policy.lora", "{rank: 2, dropout: 0.1}")
    assert message.startswith("--model.policy.lora.dropout: unknown option; known there: rank,")


# ---- classes


@pytest.mark.parametrize(
    ("key", "path", "right"),
    [
        ("model", "iqstar.InverseQstar", "iqstar.InverseQStar"),
        ("data", "iqstar.data.HHRLFH", "iqstar.data.HHRLHF"),
        ("data", "HHRLFH", "iqstar.data.HHRLHF"),
        (ESTIMATOR, "iqstar.estimators.PrincpleEstimator", "iqstar.estimators.PrincipleEstimator"),
        (ESTIMATOR, "iqstar.estimatrs.NullEstimator", "iqstar.estimators.NullEstimator"),
        ("model.init_args.optimizer", "torch.optim.AdamX", "torch.optim.Adam"),
        (
            "trainer.logger",
            "lightning.pytorch.loggers.TensorBordLogger",
            "lightning.pytorch.loggers.TensorBoardLogger",
        ),
    ],
)
def test_wrong_class_path(fails, tmp_path, key, path, right):
    message = fails(f"{key}.class_path", path)
    file = tmp_path / "config.yaml"
    module = path.rpartition(".")[0]
    missing = f" (there is no module {module})" if "estimatrs" in module else ""
    assert message == (
        f"{file}:{line_of(file, path)}: {key}: {path} is no class that fits here{missing}; "
        f"did you mean {right}?"
    )


def test_wrong_class_on_the_command_line(fails):
    message = fails(None, None, "--model.estimator", "PrincpleEstimator")
    assert message.startswith("--model.estimator: PrincpleEstimator is no class")
    assert message.endswith("did you mean iqstar.estimators.PrincipleEstimator?")
    assert "iqstar.data.HHRLHF" in fails(None, None, "--data", "HHRLFH")


def test_a_class_in_a_file_of_ones_own(tmp_path, tiny, capsys, monkeypatch):
    """Files in the folder that a command is started from are found, as python -m finds them."""
    (tmp_path / "own_judges.py").write_text(
        "from iqstar.judges import VaderJudge\nclass Mine(VaderJudge): pass\n"
    )
    (tmp_path / "own_broken.py").write_text("import a_package_that_nobody_has\n")
    config = str(write_config(tmp_path, tiny_config(tmp_path, tiny)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = ["iqstar", "fit", "--config", config, "--print_config", "--model.judge"]
    monkeypatch.setattr(sys, "argv", [*argv, "own_judges.Mine"])
    assert main() == 0
    assert "class_path: own_judges.Mine" in capsys.readouterr().out
    broken = error_of(capsys, *argv[1:], "own_broken.Mine")
    assert "own_broken.Mine cannot be imported (No module named 'a_package_that_nobody" in broken
    absent = error_of(capsys, *argv[1:], "own_absent.VaderJudg")
    assert "(there is no module own_absent); did you mean iqstar.judges.VaderJudge?" in absent


def test_class_of_another_kind(fails):
    message = fails(f"{ESTIMATOR}.class_path", "iqstar.losses.ReverseKL")
    assert "choose one of iqstar.estimators." in message


# ---- values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.init_args.beta", "high", "float"),
        ("trainer.max_steps", "ten", "int"),
        ("data.init_args.batch_size", "many", "int"),
        (f"{ESTIMATOR}.init_args.strength", "strong", "float"),
        ("model.init_args.rollout.init_args.source", "oracle", "one of 'policy', 'reference'"),
        ("model.init_args.policy.dtype", "float8", "one of 'float32', 'bfloat16'"),
    ],
)
def test_wrong_type(fails, tmp_path, key, value, expected):
    message = fails(key, value)
    file = tmp_path / "config.yaml"
    place = f"{file}:{line_of(file, f': {value}')}: {key}: "
    assert message.startswith(f"{place}{value!r} does not fit; expected {expected}")


def test_wrong_type_on_the_command_line(fails):
    message = fails(None, None, "--model.beta", "high")
    assert message == "--model.beta: 'high' does not fit; expected float"


def test_wrong_word_of_several_lists(fails):
    message = fails(None, None, "--trainer.precision", "fp16")
    assert message.startswith("--trainer.precision: 'fp16' does not fit; expected one of ")
    assert "'bf16-mixed', '32-true', '64-true'" in message
    assert not {"[", "]"} & set(message)
    message = fails(None, None, "--data.val_prompts", "some")
    assert message.endswith("'some' does not fit; expected int or 'auto' or null")


def test_wrong_learning_rate(fails):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": "high"}}
    message = fails("model.init_args.optimizer", optimizer)
    assert "model.init_args.optimizer.init_args.lr: 'high' does not fit; expected float" in message


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan")])
def test_value_out_of_range(fails, value):
    assert fails("model.init_args.beta", value).startswith("model.beta: must be a positive number")


def test_unknown_strategy_and_precision(fails):
    assert fails("trainer.strategy", "dpp").startswith("trainer: ")
    assert "trainer" in fails("trainer.precision", "16-tru")


@pytest.mark.parametrize("value", [REMOVED, None, "", "  "])
def test_estimator_without_a_principle(fails, value):
    message = fails(f"{ESTIMATOR}.init_args.principle", value)
    assert "ContrastiveEstimator needs" in message
    assert "estimator.init_args.principle" in message


def test_placebo_of_an_estimator_without_principle(fails):
    message = fails(
        ESTIMATOR,
        {
            "class_path": "iqstar.estimators.PlaceboEstimator",
            "init_args": {"estimator": {"class_path": "iqstar.estimators.NullEstimator"}},
        },
    )
    assert "NullEstimator has no principle to replace" in message


@pytest.mark.parametrize("key", ["model.init_args.estimator", "data", "model"])
def test_missing_part(fails, key):
    message = fails(key, REMOVED)
    assert "needs estimator; set model.init_args.estimator" in message or "data: missing" in message


def test_principle_over_its_budget(fails):
    message = fails(f"{ESTIMATOR}.init_args.max_principle_tokens", 2)
    assert message.startswith("model.estimator.init_args.principle: the text has")
    assert "its budget is 2" in message


# ---- data


def test_missing_data_file(fails):
    message = fails("data.init_args.path", "nowhere.jsonl")
    assert message.startswith("data.path: no such file or folder: nowhere.jsonl; give")
    assert "from the hub" not in fails("data.init_args.path", "data/prompts.jsonl")
    message = fails("data.init_args.path", "someone/prompts")
    assert "(from the hub: hf download someone/prompts --repo-type dataset" in message


def test_windows_over_two_rollouts_are_refused_before_a_model_is_loaded(fails, monkeypatch):
    monkeypatch.setattr(InverseQStar, "configure_model", lambda self: pytest.fail("loaded"))
    message = fails("trainer.accumulate_grad_batches", 2, "--model.micro_batch_size", "4")
    assert message.startswith("trainer.accumulate_grad_batches: an optimiser step takes 2 micro-b")


@pytest.mark.parametrize(
    "more",
    [
        ["--data.limit", "7"],  # one batch of 4 an epoch: what is left of them fills none
        ["--trainer.max_steps", "1"],  # ends inside the first rollout, of 4
    ],
)
def test_windows_that_need_one_rollout_only_are_not_refused(tmp_path, config, more):
    file = str(write_config(tmp_path, config))
    uneven = ["--model.micro_batch_size", "1", "--trainer.accumulate_grad_batches", "3"]
    assert main(["fit", "--config", file, *uneven, "--trainer.limit_val_batches", "0", *more]) == 0


def test_malformed_json_line(tmp_path, config, capsys):
    text = '{"prompt": "a"}\n\n{"prompt": "b"\n'
    message = data_error(tmp_path, config, capsys, text)
    assert message.startswith(f"{tmp_path}/bad.jsonl:3: malformed JSON")
    assert "repair or remove the line" in message


def test_empty_prompt(tmp_path, config, capsys):
    text = '{"prompt": "a"}\n{"prompt": "  "}\n'
    assert data_error(tmp_path, config, capsys, text).startswith(f"{tmp_path}/bad.jsonl:2: ")


def test_hh_row_without_assistant_turn(tmp_path, config, capsys):
    row = {"chosen": "\n\nHuman: Hello there", "rejected": "\n\nHuman: Hello there"}
    message = data_error(tmp_path, config, capsys, json.dumps(row) + "\n", data="HHRLHF")
    assert message.startswith(f"{tmp_path}/bad.jsonl:1: ")
    assert "assistant" in message.lower()


@pytest.mark.parametrize("data", ["JSONL", "HHRLHF", "BeaverTails"])
def test_unknown_columns(tmp_path, config, capsys, data):
    message = data_error(tmp_path, config, capsys, '{"question": "a"}\n', data=data)
    assert message.startswith(f"{tmp_path}/bad.jsonl:1: unknown column layout: found question;")
    assert f"{data} expects" in message


def test_file_without_rows(tmp_path, config, capsys):
    assert "the file has no rows" in data_error(tmp_path, config, capsys, "")


def test_prompt_over_its_budget_is_counted(tmp_path, config, capsys):
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": f"Number {i}"} for i in range(20)] + [{"prompt": "long " * 300}]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = changed(config, "data.init_args.path", str(file))
    config = changed(config, "data.init_args.max_prompt_tokens", 64)
    assert main(["fit", "--config", str(write_config(tmp_path, config))]) == 0
    assert "1 skipped: over max_prompt_tokens=64" in capsys.readouterr().err


def test_prompt_longer_than_the_model(tmp_path, fails):
    model = tiny_folder(tmp_path / "short", max_position_embeddings=24)
    message = fails("model.init_args.policy.model", str(model))
    assert message.startswith("data: no prompt is left to train on (24 rows")
    assert "24 skipped: over 3 tokens, response and principle pass the model's pos" in message


def test_a_prompt_that_fits_without_its_principle_only_is_skipped(tmp_path, config, capsys):
    """And counted: found in the middle of training, it would end the run."""
    model = tiny_folder(tmp_path / "short", max_position_embeddings=120)
    config = changed(config, "model.init_args.policy.model", str(model))
    rows = [{"prompt": f"Number {i}"} for i in range(20)]
    rows += [{"prompt": "to " * length} for length in range(20, 60)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = changed(config, "data.init_args.path", str(file))
    config = changed(config, "data.init_args.shuffle", False)
    config = changed(config, "trainer.max_steps", 12)
    config = changed(config, "trainer.limit_val_batches", 0)
    assert main(["fit", "--config", str(write_config(tmp_path, config))]) == 0
    (skipped,) = re.findall(r"(\d+) skipped: over \d+ tokens, response", capsys.readouterr().err)
    assert 5 < int(skipped) < 35


# ---- models


@pytest.mark.parametrize("inside", [None, "readme"])
def test_folder_that_is_no_model(tmp_path, fails, inside):
    folder = tmp_path / "no model"
    folder.mkdir()
    if inside:
        (folder / "README.md").write_text("nothing")
    message = fails("model.init_args.policy.model", str(folder))
    assert message.startswith(f"model.policy.model: the folder {folder} has no config.json")


def test_model_that_does_not_exist(fails):
    message = fails("model.init_args.policy.model", "./nowhere/model")
    assert message.startswith("model.policy.model: './nowhere/model' does not exist; give")


def test_damaged_weights(tmp_path, tiny, fails):
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"not weights")
    message = fails("model.init_args.policy.model", str(folder))
    assert message.startswith(f"model.policy.model: {folder} cannot be loaded")


def test_tokenizer_without_chat_template(tmp_path, fails):
    folder = tiny_folder(tmp_path / "base", chat_template=False)
    message = fails("model.init_args.policy.model", str(folder))
    assert message.startswith("model.policy.chat_template: the tokenizer has no chat template; set")


def test_vocabularies_that_differ(tmp_path, fails):
    other = tiny_folder(tmp_path / "other", pad="own")
    message = fails(
        ESTIMATOR,
        {
            "class_path": "iqstar.estimators.PrincipleEstimator",
            "init_args": {"principle": "Be kind.", "model": str(other)},
        },
    )
    assert message.startswith("model.estimator.init_args.model: the vocabulary of ")
    assert "differs from the policy's" in message


def test_judge_without_its_extra(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    message = fails("model.init_args.judge", {"class_path": "iqstar.judges.VaderJudge"})
    assert message.endswith("install it with: pip install vaderSentiment")


def test_logger_without_its_package(fails):
    message = fails("trainer.logger", {"class_path": "lightning.pytorch.loggers.CometLogger"})
    assert message.startswith("a class in the settings, such as trainer.logger, needs the package ")
    assert "install it with: pip install 'comet-ml" in message


# ---- running


def test_accumulation_that_does_not_divide(config, fails):
    config["model"]["init_args"]["micro_batch_size"] = 2
    message = fails("trainer.accumulate_grad_batches", 3)
    assert message.startswith("trainer.accumulate_grad_batches: an optimiser step takes 3")


def test_data_that_fills_no_batch(fails):
    assert fails("data.init_args.batch_size", 500).startswith("data.batch_size: ")


def test_run_folder_that_cannot_be_written(tmp_path, fails):
    (tmp_path / "file").write_text("in the way")
    message = fails("trainer.logger.init_args.save_dir", str(tmp_path / "file"))
    assert str(tmp_path / "file") in message
    assert "trainer.logger.init_args.save_dir" in message


def broken_model(tiny: Path, folder: Path) -> Path:
    """A model whose weights became infinite."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_model_with_infinite_weights(tmp_path, tiny, config, capsys):
    folder = broken_model(tiny, tmp_path / "infinite")
    config = changed(config, "model.init_args.policy.model", str(folder))
    message = error_of(capsys, "fit", "--config", str(write_config(tmp_path, config)))
    assert message.startswith("model.policy.model: the model's output is not finite")


def test_non_finite_loss(tmp_path, config, capsys):
    """A learning rate that blows the weights up after a good checkpoint."""
    config["model"]["init_args"] |= {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0e18}},
        "schedule": {"class_path": "iqstar.optim.Constant"},
        "rollout": {"class_path": "iqstar.rollouts.DatasetRollout"},
        "loss": {"class_path": "iqstar.losses.RewardImitationLoss"},
    }
    config["checkpoint"] = {"every_n_train_steps": 1, "save_top_k": -1}
    config["trainer"] |= {"max_steps": 6, "gradient_clip_val": None, "num_sanity_val_steps": 0}
    config["data"]["init_args"]["val_prompts"] = 0
    rows = [{"prompt": f"Number {i}", "response": f"It is {i}."} for i in range(40)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config["data"]["init_args"]["path"] = str(data)
    message = error_of(capsys, "fit", "--config", str(write_config(tmp_path, config)), code=3)
    assert "not finite at optimiser step 1" in message
    assert "'Number " in message  # the batch
    assert "model.optimizer.init_args.lr" in message
    saved = sorted((tmp_path / "runs").rglob("*.ckpt"))
    assert saved
    for file in saved:
        assert torch.load(file, weights_only=False)["state_dict"]


def test_checkpoint_that_does_not_exist(fails, tmp_path):
    message = fails(None, None, "--ckpt_path", str(tmp_path / "none.ckpt"))
    assert message.startswith(f"--ckpt_path: {tmp_path}/none.ckpt does not exist; give")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    message = fails(None, None, "--ckpt_path", str(tmp_path / "text.ckpt"))
    assert "text.ckpt is no checkpoint" in message


def test_checkpoint_of_another_model(tmp_path, config, capsys):
    file = write_config(tmp_path, config)
    assert main(["fit", "--config", str(file)]) == 0
    last = next((tmp_path / "runs").rglob("last.ckpt"))
    other = tiny_folder(tmp_path / "wide", hidden_size=64)
    argv = ["validate", "--config", str(file), "--ckpt_path", str(last)]
    message = error_of(capsys, *argv, "--model.policy.model", str(other))
    assert message.startswith("--ckpt_path: the checkpoint was trained with other frozen weights")
    message = error_of(capsys, *argv, "--model.policy.lora.rank", "2")
    assert message.startswith("--ckpt_path: the checkpoint lacks")
    assert main(argv) == 0


def test_checkpoint_of_other_adapters(tmp_path, config, capsys):
    file = str(write_config(tmp_path, config))
    assert main(["fit", "--config", file, "--model.policy.lora.rank", "2"]) == 0
    last = next((tmp_path / "runs").rglob("last.ckpt"))
    argv = ["validate", "--config", file, "--ckpt_path", str(last)]
    message = error_of(capsys, *argv, "--model.policy.lora.rank", "3")
    assert message.startswith("--ckpt_path: the checkpoint does not fit the model")
    assert main([*argv, "--model.policy.lora.rank", "2"]) == 0


@pytest.fixture
def process_group(monkeypatch):
    """What Lightning leaves behind of a process group is gone after the test."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.usefixtures("process_group")
def test_sharding_over_one_device_runs_and_says_so(tmp_path, config, capsys, strategy):
    argv = ["fit", "--config", str(write_config(tmp_path, config))]
    assert main([*argv, "--trainer.strategy", strategy]) == 0
    assert "nothing is sharded" in capsys.readouterr().err


def test_more_devices_than_the_prompts_fill(tmp_path, config, capsys):
    """21 prompts to train on: six devices with batches of four ask for 24."""
    argv = ["fit", "--config", str(write_config(tmp_path, config))]
    message = error_of(capsys, *argv, "--data.batch_size", "22")
    assert message.startswith("data.batch_size: 21 training prompts do not fill one batch of 22")


def test_real_bugs_keep_their_traceback(tmp_path, config, monkeypatch):
    from iqstar.module import InverseQStar

    def broken(self, *args):
        raise ValueError("a bug")

    monkeypatch.setattr(InverseQStar, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", "--config", str(write_config(tmp_path, config))])


@pytest.mark.parametrize(("kind", "code"), [("InputError", 2), ("NonFiniteLossError", 3)])
def test_error_of_a_spawned_process(tmp_path, config, capsys, monkeypatch, kind, code):
    def spawned(*args, **kwargs):
        trace = f"-- Process 1\nTraceback …\niqstar.errors.{kind}: data: wrong; mend it\n"
        raise ProcessRaisedException(trace, 1, 1)

    monkeypatch.setattr(Trainer, "fit", spawned)
    file = write_config(tmp_path, config)
    assert error_of(capsys, "fit", "--config", str(file), code=code) == "data: wrong; mend it"


def test_in_a_process_of_its_own(tmp_path, config):
    config["trainer"]["max_stepz"] = 3
    file = write_config(tmp_path, yaml.safe_load(yaml.safe_dump(config)))
    done = subprocess.run(
        [sys.executable, "-m", "iqstar.cli", "fit", "--config", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    line = line_of(file, "max_stepz")
    assert done.stderr == (
        f"iqstar: error: {file}:{line}: unknown key trainer.max_stepz; "
        "did you mean trainer.max_steps?\n"
    )


# ---- found by a review: what once ended in a traceback, or blamed the wrong thing


def test_an_interval_longer_than_an_epoch(fails):
    """21 prompts in batches of four."""
    message = fails(None, None, "--trainer.val_check_interval", "100")
    assert message.startswith("trainer.val_check_interval: an epoch has 5 training batches")
    assert "check_val_every_n_epoch" in message


def test_the_best_checkpoint_of_no_run(fails):
    assert fails(None, None, "--ckpt_path", "best").startswith("--ckpt_path: best does not exist")


def test_a_slurm_job_of_one_task_for_two_devices(fails, tmp_path, config, monkeypatch):
    """One device would train a half of each batch, and nothing would say so."""
    for name in ("NTASKS", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "1" if name == "NTASKS" else "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    message = fails(None, None, *two)
    assert message.startswith("trainer.devices: the SLURM job has 1 task(s) for 2 device(s)")
    own = "lightning.fabric.plugins.environments.LightningEnvironment"
    assert own in message
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, *_, **__: seen.append(trainer))
    file = write_config(tmp_path, changed(config, "trainer.plugins", own))
    assert main(["fit", "--config", str(file), *two]) == 0
    assert type(seen[0].strategy.cluster_environment).__name__ == "LightningEnvironment"


def test_a_slurm_job_of_tasks_that_are_not_counted_by_node(fails, monkeypatch):
    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    message = fails()
    assert message.startswith("the SLURM job: You set `--ntasks=8`")
    assert "--ntasks-per-node" in message


def test_a_negative_number_is_no_option(tmp_path, fails):
    """The key that is wrong stands in another file."""
    file = tmp_path / "estimator.yaml"
    file.write_text("class_path: PrincipleEstimator\ninit_args:\n  principel: Be kind.\n")
    bound = ("--trainer.max_epochs", "-1")
    assert "principel" in fails(None, None, "--model.estimator", str(file), *bound)


def test_a_folder_without_a_checkpoint(tmp_path, fails):
    message = fails(None, None, "--ckpt_path", str(tmp_path))
    assert message.startswith(f"--ckpt_path: {tmp_path} has no complete checkpoint")


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), TimeoutError(110, "x")])
def test_errors_of_the_network_are_no_files(error):
    with pytest.raises(type(error)), readable_errors([]):
        raise error


def test_a_connection_of_one_process_is_not_another_process():
    with pytest.raises(RuntimeError, match="reset by peer"), readable_errors([]):
        raise RuntimeError("Connection reset by peer")


def test_half_precision_by_its_other_name(fails):
    message = fails(None, None, "--trainer.precision", "16")
    assert message.startswith("trainer.precision: 16 is not supported")


def test_weights_in_sixteen_bits_are_warned_of(tmp_path, config):
    argv = ["fit", "--config", str(write_config(tmp_path, config))]
    with pytest.warns(UserWarning, match="bf16-true holds the trained weights in 16 bits"):
        assert main([*argv, "--trainer.precision", "bf16-true"]) == 0


def test_attention_that_is_not_installed(fails):
    """It runs on GPUs only, so it is chosen after the checks that run here."""
    message = fails("model.init_args.policy.attn_implementation", "flash_attention_2")
    assert message.startswith("model.policy.attn_implementation: flash_attention_2 cannot be used")
    assert "sdpa" in message


@pytest.mark.parametrize("name", ["rank", "alpha"])
def test_adapters_that_cannot_train(fails, name):
    message = fails("model.init_args.policy.lora", {name: 0})
    assert f"model.policy.lora.{name}: must be at least 1, got 0" in message
