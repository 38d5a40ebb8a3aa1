"""Every shipped config parses; every experiment trains, on a tiny model and a few rows."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli_tools import end, launch, write_prompts
from iqstar.chat import ChatFormat
from iqstar.cli import main
from iqstar.export_callback import Export
from iqstar.judges import harm
from iqstar.mdp import Message
from iqstar.module import InverseQStar
from processes import fit_in_two
from tiny import BOS, EOS, reward_folder, tiny_folder, tiny_tokenizer
from vllm_stand_in import stand_in

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = [CONFIGS / "quickstart.yaml", *sorted((CONFIGS / "experiment").glob("*.yaml"))]
STRATEGIES = sorted((CONFIGS / "strategy").glob("*.yaml"))
GROUPS = sorted([*(CONFIGS / "estimator").glob("*.yaml"), *(CONFIGS / "loss").glob("*.yaml")])
BASELINES = sorted((CONFIGS / "baseline").glob("*.yaml"))
JUDGES = sorted((CONFIGS / "judge").glob("*.yaml"))
POLICIES = sorted((CONFIGS / "policy").glob("*.yaml"))
SCALE = sorted((CONFIGS / "scale").glob("*.yaml"))
ROLLOUTS = sorted((CONFIGS / "rollout").glob("*.yaml"))


def names(files):
    return [str(f.relative_to(CONFIGS)) for f in files]


def write_data(folder: Path, data_class: str) -> list[str]:
    """Synthetic rows in the layout of a data class, as command-line arguments."""
    questions = [f"Please tell me about the number {i}, would you?" for i in range(20)]
    file = folder / "rows.jsonl"
    if data_class.endswith("Sample"):
        return []
    if data_class.endswith("JSONL"):
        return ["--data.path", str(write_prompts(file))]
    if data_class.endswith(("HHRLHF", "HHPairs")):
        rows = [
            {side: f"\n\nHuman: {q}\n\nAssistant: It is {side}." for side in ("chosen", "rejected")}
            for q in questions
        ]
    else:
        rows = [{"prompt": q, "response": "It is.", "is_safe": True} for q in questions]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ["--data.path", str(file)]


def arguments(file: Path, folder: Path, model: Path) -> list[str]:
    """The config, made small."""
    data = yaml.safe_load(file.read_text())["data"]["class_path"]
    small = {
        "model.policy.model": model,
        "model.rollout.max_new_tokens": 4,
        "model.eval_samples": 1,
        "data.batch_size": 4,
        "data.val_prompts": 3,
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": folder / "runs",
    }
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    return ["--config", str(file), *options, *write_data(folder, data)]


@pytest.fixture
def live(monkeypatch):
    """The module of the last run, as it was when it was exported."""
    seen = []
    export = Export.on_train_end

    def wrapped(self, trainer, module):
        seen.append(module)
        export(self, trainer, module)

    monkeypatch.setattr(Export, "on_train_end", wrapped)
    return seen


def summary_of(folder: Path) -> dict:
    (file,) = (folder / "runs").rglob("summary.json")
    return json.loads(file.read_text())


@torch.no_grad()
def same_logits(live_module, loaded) -> bool:
    ids = torch.arange(2, 40)[None]
    model = live_module.policy.actor.model.eval()
    ours, theirs = model(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits
    return torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_experiments_train(file, tmp_path, tiny, live):
    argv = arguments(file, tmp_path, tiny)
    assert main(["fit", *argv]) == 0
    summary = summary_of(tmp_path)
    assert summary["samples"] == 8
    assert summary["optimizer_steps"] == 2
    assert summary["seconds"] > 0
    assert [e.step for e in live[-1].evaluations] == [0, 2]  # before and after, not every epoch
    assert 0 <= summary["kl"] < 1
    judge = summary["judge"]
    assert judge["name"] == "vader"
    assert judge["prompts"] == 3
    assert -1 <= judge["before"] <= 1
    assert -1 <= judge["after"] <= 1
    loaded = AutoModelForCausalLM.from_pretrained(summary["policy"])
    assert same_logits(live[-1], loaded)
    start = AutoModelForCausalLM.from_pretrained(tiny)
    assert not torch.equal(start.lm_head.weight, loaded.lm_head.weight)
    assert list(Path(summary["policy"]).glob("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(summary["policy"])
    assert tokenizer.chat_template == live[-1].chat.tokenizer.chat_template


@pytest.mark.parametrize("file", BASELINES, ids=names(BASELINES))
def test_baselines_train(file, tmp_path, tiny, live):
    """And the model card says what the model was trained on: no word of Inverse-Q*'s."""
    assert main(["fit", *arguments(file, tmp_path, tiny)]) == 0
    summary = summary_of(tmp_path)
    assert summary["optimizer_steps"] == 2
    # PPO and GRPO take two steps on a rollout; DPO has a pair of each prompt.
    assert summary["samples"] == {"ppo": 4, "grpo": 16, "dpo": 16}[file.stem]
    folder = Path(summary["policy"])
    assert same_logits(live[-1], AutoModelForCausalLM.from_pretrained(folder))
    card = (folder / "README.md").read_text()
    assert file.stem.upper() in card
    assert "No preference label" not in card
    assert "Inverse-Q" not in card.partition("## All settings")[0]


@pytest.mark.parametrize("file", POLICIES, ids=names(POLICIES))
def test_policies_train(file, tmp_path, tiny, live):
    lora = yaml.safe_load(file.read_text())["model"]["init_args"]["policy"].get("lora")
    given = [*arguments(EXPERIMENTS[0], tmp_path, tiny), "--config", str(file)]
    assert main(["fit", *given, "--model.micro_batch_size", "2"]) == 0  # of rollouts of 4
    summary = summary_of(tmp_path)
    assert lora, "a policy that is no adapter needs a test of its own"
    assert summary["trained_weights"] < summary["weights"] / 2
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny), summary["policy"]
    )
    assert same_logits(live[-1], loaded)


def test_adapters_train_on_pairs_too(tmp_path, tiny, live):
    """DPO's rollout is one batch of 4 pairs here; lora.yaml says which flag that takes."""
    dpo = next(file for file in BASELINES if file.stem == "dpo")
    given = [*arguments(dpo, tmp_path, tiny), "--config", str(CONFIGS / "policy" / "lora.yaml")]
    assert main(["fit", *given]) == 2
    assert main(["fit", *given, "--model.micro_batch_size", "2"]) == 0
    assert summary_of(tmp_path)["trained_weights"] < summary_of(tmp_path)["weights"] / 2


@pytest.mark.parametrize("file", SCALE, ids=names(SCALE))
def test_scale_configs_train(file, tmp_path, live, monkeypatch):
    """On a tiny model of the same architecture, without a chat template as theirs, on one CPU."""
    monkeypatch.chdir(CONFIGS.parent)
    stand_in = tiny_folder(tmp_path / "model", chat_template=False, tie=False)
    one_cpu = {
        "data.subset": "null",
        "data.eval_batch_size": 3,
        "model.micro_batch_size": 2,
        "trainer.accumulate_grad_batches": 2,
        "trainer.strategy": "auto",
        "trainer.num_nodes": 1,
    }
    options = [part for key, value in one_cpu.items() for part in (f"--{key}", str(value))]
    assert main(["fit", *arguments(file, tmp_path, stand_in), *options]) == 0
    summary = summary_of(tmp_path)
    assert summary["samples"] == 8
    assert summary["optimizer_steps"] == 2
    policy = live[-1].policy
    assert policy.spec.gradient_checkpointing
    assert (policy.frozen is None) == ("lora" in file.name)
    given = yaml.safe_load(file.read_text())
    assert given["trainer"]["devices"] == (1 if "24gb" in file.name else 8)
    assert ("fsdp" in given["trainer"].get("strategy", "")) == (given["trainer"]["devices"] > 1)


def test_vicunas_template_writes_vicunas_format():
    tokenizer = tiny_tokenizer(chat_template=False)
    chat = ChatFormat(tokenizer, template=str(CONFIGS / "scale" / "vicuna.jinja"))
    turns = ("user", "Hi."), ("assistant", "Hello."), ("user", "Who are you?")
    text = tokenizer.decode(chat.prompt_ids([Message(role=r, content=c) for r, c in turns]))
    assert text == (
        f"{BOS}A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. "
        f"USER: Hi. ASSISTANT: Hello.{EOS}USER: Who are you? ASSISTANT:"
    )
    assert chat.end_of_turn == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("file", [*GROUPS, *ROLLOUTS], ids=names([*GROUPS, *ROLLOUTS]))
def test_groups_combine(file):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(InverseQStar, "model")
    base = yaml.safe_load(EXPERIMENTS[0].read_text())["model"]
    key = file.parent.name
    given = yaml.safe_load(file.read_text())
    base["init_args"][key] = given
    module = parser.instantiate(parser.parse_object({"model": base})).model
    part = getattr(module, key)
    home, _, name = given["class_path"].rpartition(".")
    assert type(part) is getattr(import_module(home), name)


@pytest.mark.parametrize("file", GROUPS, ids=names(GROUPS))
def test_groups_train(file, tmp_path, tiny):
    argv = arguments(EXPERIMENTS[0], tmp_path, tiny)
    argv += [f"--model.{file.parent.name}", str(file), "--trainer.limit_val_batches", "0"]
    if file.stem == "aligned_pair":  # another model of the same vocabulary
        argv += ["--model.estimator.aligned", str(tiny_folder(tmp_path / "aligned", seed=1))]
    assert main(["fit", *argv]) == 0
    assert summary_of(tmp_path)["optimizer_steps"] == 2


@pytest.mark.parametrize("file", JUDGES, ids=names(JUDGES))
def test_judges_combine(file, tmp_path, monkeypatch):
    """With what they need in place; what they measure is in tests of their own."""
    monkeypatch.setattr(harm.HarmModel, "load", lambda path: path)
    monkeypatch.setenv("IQSTAR_CACHE", str(tmp_path))
    (tmp_path / "harm.npz").touch()
    given = yaml.safe_load(file.read_text())
    if file.stem == "harm":
        given["init_args"]["path"] = str(tmp_path / "harm.npz")
    if file.stem == "reward_model":
        given["init_args"]["model"] = reward_folder(tmp_path / "reward")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(InverseQStar, "model")
    base = yaml.safe_load(EXPERIMENTS[0].read_text())["model"]
    base["init_args"]["judge"] = given
    judge = parser.instantiate(parser.parse_object({"model": base})).model.judge
    assert f"iqstar.judges.{type(judge).__name__}" == given["class_path"]
    assert judge.name == file.stem
    assert judge.version


def test_judges_train(tmp_path, tiny):
    """A judge's file in place of another, as its comment says."""
    argv = arguments(EXPERIMENTS[0], tmp_path, tiny)
    assert main(["fit", *argv, "--model.judge", str(CONFIGS / "judge" / "refusal.yaml")]) == 0
    assert summary_of(tmp_path)["judge"]["name"] == "refusal"


def test_scored_rollouts_train(tmp_path, tiny):
    """On what ``iqstar score`` writes with the same config; the others' engines run elsewhere."""
    credits_file = str(tmp_path / "credits.parquet")
    argv = arguments(CONFIGS / "experiment" / "hh_kind.yaml", tmp_path, tiny)
    assert main(["score", *argv, "--output", credits_file]) == 0
    argv += ["--model.rollout", str(CONFIGS / "rollout" / "scored.yaml")]
    argv += ["--model.rollout.path", credits_file]
    assert main(["fit", *argv, "--model.loss", str(CONFIGS / "loss" / "reward.yaml")]) == 0
    summary = summary_of(tmp_path)
    assert summary["optimizer_steps"] == 2
    assert summary["kl"] > 0


@pytest.mark.parametrize("file", STRATEGIES, ids=names(STRATEGIES))
def test_strategies_train(file, tmp_path, tiny):
    """On two processes, but for the one that is of one device; DDP's are Lightning's own."""
    argv = [*arguments(EXPERIMENTS[0], tmp_path, tiny), "--config", str(file)]
    two = [*argv, "--trainer.devices", "2"]
    if file.stem == "single":
        assert main(["fit", *argv]) == 0
    elif file.stem == "ddp":
        code, output = end(launch("-m", "iqstar.cli", "fit", *two))
        assert code == 0, output
    else:
        fit_in_two(tmp_path, *two)
    assert summary_of(tmp_path)["optimizer_steps"] == 2


@pytest.mark.parametrize("file", STRATEGIES, ids=names(STRATEGIES))
def test_strategies_combine(file, tmp_path, tiny, capsys):
    argv = arguments(EXPERIMENTS[0], tmp_path, tiny)
    assert main(["fit", *argv, "--config", str(file), "--print_config"]) == 0
    used = yaml.safe_load(capsys.readouterr().out)["trainer"]
    given = yaml.safe_load(file.read_text())["trainer"]
    assert {key: used[key] for key in given} == given


def test_a_rollout_server_trains(tmp_path, tiny):
    """With a stand-in that answers: what vLLM itself does is in test_vllm_real.py."""
    argv = [*arguments(EXPERIMENTS[0], tmp_path, tiny), "--model.rollout"]
    with stand_in(tiny, lambda body: ([5, 1], "stop")) as server:
        argv += [str(CONFIGS / "rollout" / "vllm.yaml"), "--model.rollout.url", server.url]
        assert main(["fit", *argv]) == 0
    assert summary_of(tmp_path)["optimizer_steps"] == 2
    assert server.log.count("load") == 2


def test_no_config_is_left_out():
    tested = [*EXPERIMENTS, *POLICIES, *GROUPS, *STRATEGIES, *SCALE, *ROLLOUTS]
    tested += [*BASELINES, *JUDGES, CONFIGS / "compare.yaml"]  # the last in test_compare.py
    assert sorted(tested) == sorted(CONFIGS.rglob("*.yaml"))


def test_measuring_and_predicting(tmp_path, tiny, capsys):
    argv = arguments(CONFIGS / "experiment" / "hh_kind.yaml", tmp_path, tiny)
    assert main(["validate", *argv]) == 0
    assert "val/judge" in capsys.readouterr().out
    assert main(["test", *argv]) == 0
    out = tmp_path / "out" / "predictions.jsonl"
    assert main(["predict", *argv, "--predictions.path", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["prompt"][-1]["role"] == "user"
        assert 1 <= len(row["credits"]) <= 4
        assert len(row["credits"]) == len(row["tokens"]) == len(row["implied"])
        assert any(row["credits"])
        assert max(map(abs, row["implied"])) < 1e-4  # an untrained policy is its reference
