"""The exported model is the trained one: full, adapter, merged, in files of any size."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cli_tools import REMOVED, changed, error_of, tiny_config, write_config
from fitting import contrast, make_module, make_trainer
from iqstar.adapters import LoRASpec
from iqstar.card import DEFAULT_LOSS, RunRecord, _described, model_card, settings_of
from iqstar.chat import ChatFormat
from iqstar.cli import main
from iqstar.data import JSONL
from iqstar.export_callback import Export
from iqstar.mdp import Message
from iqstar.module import InverseQStar
from iqstar.policy import PolicySpec
from iqstar.provenance import ALIGNED_PAIR, BASELINES, NO_LABELS, REPLAY
from iqstar.rollouts import DatasetRollout, GenerateRollout, MixtureRollout
from tiny import CHAT_TEMPLATE, tiny_folder, tiny_tokenizer

LORA = {"rank": 4, "alpha": 8}
IDS = torch.arange(2, 40)[None]


@dataclass
class Run:
    """A finished run."""

    folder: Path
    config: Path
    module: InverseQStar
    logits: torch.Tensor

    @property
    def policy(self) -> Path:
        return self.folder / "policy"

    @property
    def ckpt(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def fit(folder: Path, model: Path, **changes: Any) -> Run:
    """A run of two steps through the command line."""
    folder.mkdir(exist_ok=True)
    config = changed(tiny_config(folder, model), "model.init_args.optimizer", {
        "class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}
    })  # fmt: skip
    for key, value in changes.items():
        config = changed(config, key.replace("__", "."), value)
    file = write_config(folder, config)
    seen: list[InverseQStar] = []
    with pytest.MonkeyPatch.context() as patch:
        end = Export.on_fit_end

        def wrapped(self: Export, trainer: Trainer, module: Any) -> None:
            seen.append(module)
            end(self, trainer, module)

        patch.setattr(Export, "on_fit_end", wrapped)
        assert main(["fit", "--config", str(file)]) == 0
    live = logits_of(seen[0].policy.actor.model)
    return Run(folder / "runs" / "run" / "v", file, seen[0], live)


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny) -> Run:
    return fit(tmp_path_factory.mktemp("full"), tiny)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny) -> Run:
    return fit(tmp_path_factory.mktemp("lora"), tiny, model__init_args__policy__lora=LORA)


def export(run: Run, out: Path, *options: str) -> Path:
    assert main(["export", "--ckpt", str(run.ckpt), "--out", str(out), *options]) == 0
    return out


def same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-6) -> bool:
    print((a - b).abs().max(), b.abs().max())
    return torch.allclose(a, b, rtol=0, atol=atol)


def front(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


# ---- what is written


@pytest.mark.parametrize("how", ["at the end", "from the checkpoint"])
def test_full_model(full, tiny, tmp_path, how):
    folder = full.policy if how == "at the end" else export(full, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert same(logits_of(loaded), full.logits)
    assert not same(logits_of(AutoModelForCausalLM.from_pretrained(tiny)), full.logits, 1e-2)
    assert loaded.dtype == torch.float32
    names = {p.name for p in folder.iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert "attn_implementation" not in (folder / "config.json").read_text()
    assert not list(folder.parent.glob("*.part"))
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # readable as any other file


@pytest.mark.parametrize(
    "changes",
    [
        {
            "model__class_path": "iqstar.baselines.PPO",
            "model__init_args__estimator": REMOVED,
            "model__init_args__reward": {"class_path": "judging.Vowels"},
        },
        {"model__init_args__refresh": {"class_path": "iqstar.refresh.EMARefresh"}},
    ],
    ids=["value head", "moving reference"],
)
def test_checkpoint_with_more_than_the_policy(tmp_path, tiny, changes):
    run = fit(tmp_path / "run", tiny, **changes)
    folder = export(run, tmp_path / "out")
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(folder)), run.logits)


@pytest.mark.parametrize("how", ["at the end", "from the checkpoint"])
def test_adapter(adapters, tiny, tmp_path, how):
    folder = adapters.policy if how == "at the end" else export(adapters, tmp_path / "out")
    onto = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    assert same(logits_of(onto), adapters.logits)
    assert same(logits_of(AutoPeftModelForCausalLM.from_pretrained(folder)), adapters.logits)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny)
    assert all("lora" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not (folder / "config.json").exists()


def test_merged_adapter(adapters, tmp_path):
    folder = export(adapters, tmp_path / "out", "--merge")
    assert not (folder / "adapter_config.json").exists()
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(folder)), adapters.logits, 5e-5)
    assert front(folder)["library_name"] == "transformers"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_tied_heads_stay_tied(full, tmp_path, dtype, size):
    options = ["--dtype", dtype] if dtype else []
    folder = export(full, tmp_path / "out", "--max_shard_size", size, *options)
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_untied_head(tmp_path):
    run = fit(tmp_path, tiny_folder(tmp_path / "untied", tie=False))
    loaded = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"))
    assert same(logits_of(loaded), run.logits)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_files_of_a_size(full, tmp_path):
    folder = export(full, tmp_path / "out", "--max_shard_size", "50KB")
    files = list(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 60_000 for file in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(folder)), full.logits)


def test_dtype(full, adapters, tmp_path):
    folder = export(full, tmp_path / "full", "--dtype", "bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    trained = full.module.policy.actor.model.state_dict()
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, trained[name].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    folder = export(adapters, tmp_path / "lora", "--dtype", "bfloat16")
    weights = load_file(folder / "adapter_model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_dtype_is_that_of_training(tmp_path, tiny):
    """bf16-true trains float32's spec in bfloat16: both exports write what was trained."""
    run = fit(tmp_path / "run", tiny, trainer__precision="bf16-true")
    end, later = (
        load_file(folder / "model.safetensors")
        for folder in (run.policy, export(run, tmp_path / "out"))
    )
    assert {weight.dtype for weight in end.values()} == {torch.bfloat16}
    assert end.keys() == later.keys()
    assert all(torch.equal(weight, later[name]) for name, weight in end.items())


def test_paths_in_the_home(full, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.ckpt").symlink_to(full.ckpt)
    assert main(["export", "--ckpt=~/run.ckpt", "--out=~/out"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert main(["export", "--ckpt=~nobody-at-all/run.ckpt", "--out=~/out"]) == 2
    assert "the name of no user" in capsys.readouterr().err


def test_generation_and_chat(full, adapters):
    for run in (full, adapters):
        config = GenerationConfig.from_pretrained(run.policy)
        assert not config._from_model_config  # or transformers might put the model's in its place
        assert config.eos_token_id == 1
        assert config.pad_token_id == 1
        tokenizer = AutoTokenizer.from_pretrained(run.policy)
        assert tokenizer.chat_template == CHAT_TEMPLATE
        messages = [{"role": "user", "content": "Hi"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == run.module.chat.prompt_ids([Message(role="user", content="Hi")])


def test_every_end_token_and_a_template_of_the_config(tmp_path):
    model = tiny_folder(tmp_path / "model", chat_template=False, pad="own", eos_token_id=5)
    run = fit(tmp_path, model, model__init_args__policy__chat_template="hh")
    config = GenerationConfig.from_pretrained(run.policy)
    assert config.eos_token_id == [1, 5]
    assert config.pad_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(run.policy)
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "{a} the")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ours = run.module.chat.prompt_ids([Message(**m) for m in messages])
    assert ids == ours


def test_plain_format_with_a_bos_token():
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = _bos_first()
    chat = ChatFormat(tokenizer, template="hh")
    tokenizer.chat_template = chat.jinja()
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == chat.prompt_ids([Message(role="user", content="Hi")])
    assert ids[0] == 0


def _bos_first() -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])


# ---- the card


def test_card(full, tmp_path):
    kl = full.module.evaluations[-1].metrics["kl"]
    for folder in (full.policy, export(full, tmp_path / "out")):
        card = (folder / "README.md").read_text()
        head = front(folder)
        assert head["library_name"] == "transformers"
        assert head["pipeline_tag"] == "text-generation"
        assert "base_model" not in head  # a local folder means nothing on the hub
        for row in (
            "| principle | Please be kind. |",
            "| antiprinciple | Please be rude. |",
            "| estimator | ContrastiveEstimator (strength 1.0",
            "| loss | DistributionImitationLoss (divergence ReverseKL) |",
            "| β | 1.0 |",
            "| data | JSONL (path ",
            "| optimiser steps | 2 |",
            "| sampled responses | 8 |",
            "|  | before | after step 2 |",
            f"| KL to the base model (nats/token) | 0.000 | {kl:.3f} |",
            f"SHA-256 of its weights `{full.module.policy.actor.fingerprint}`",
        ):
            assert row in card, row
        assert "iqstar fit --config" in card
        assert "trainer:" in card.partition("## All settings")[2]
        assert f"torch {torch.__version__}" in card


@pytest.mark.parametrize("loss", [None, {"class_path": DEFAULT_LOSS["class_path"]}])
def test_card_names_the_default_loss(loss):
    given = {"estimator": {"class_path": "iqstar.estimators.NullEstimator"}, "loss": loss}
    settings = {"model": {"init_args": given}}
    record = RunRecord(
        settings=settings, recipe=None, command=None, step=1, samples=4, evaluations=[]
    )
    card = model_card(record, PolicySpec())
    assert "| loss | DistributionImitationLoss (divergence ReverseKL) |" in card
    assert "| estimator | NullEstimator |" in card
    assert "principle |" not in card


def part(name, **arguments):
    return {"class_path": name, "init_args": arguments}


ALIGNED = part("iqstar.estimators.AlignedPairEstimator", aligned="dpo", base="base")
PRINCIPLE = part("iqstar.estimators.PrincipleEstimator", principle="Be kind.")
GENERATED = part("iqstar.rollouts.GenerateRollout")


@pytest.mark.parametrize(
    ("model", "said", "tag"),
    [
        ({"init_args": {"estimator": PRINCIPLE, "rollout": GENERATED}}, NO_LABELS, None),
        (part("InverseQStar", estimator=ALIGNED), ALIGNED_PAIR, None),
        (
            part("InverseQStar", estimator=part("M", estimators=[PRINCIPLE, ALIGNED])),
            ALIGNED_PAIR,
            None,
        ),
        (
            part(
                "iqstar.InverseQStar",
                estimator=PRINCIPLE,
                rollout=part(
                    "MixedRollout", engines=[GENERATED, part("iqstar.rollouts.DatasetRollout")]
                ),
            ),
            REPLAY,
            None,
        ),
        (part("mine.MyPPO", estimator=PRINCIPLE), "a method of its user's, `MyPPO`.", "iqstar"),
        (part("iqstar.baselines.DPO"), BASELINES["DPO"], "dpo"),
    ],
)
def test_card_claims_only_what_is_so(model, said, tag):
    """Labels take part where an aligned model or a data set's preferred replies do."""
    record = RunRecord(
        settings={"model": model}, recipe=None, command=None, step=1, samples=4, evaluations=[]
    )
    card = model_card(record, PolicySpec())
    assert said in card
    assert (NO_LABELS in card) == (said == NO_LABELS)
    tags = yaml.safe_load(card.split("---\n")[1])["tags"]
    assert tags == list(dict.fromkeys(["iqstar", tag or "inverse-q-star"]))


def test_card_compares_answers_to_the_same_prompts_only():
    first, last = (
        {"step": step, "metrics": {"kl": float(step)}, "judge": None, "samples": [{"prompt": "A"}]}
        for step in (0, 3)
    )
    for asked, head in (("A", "|  | before | after step 3 |"), ("B", "|  | after step 3 |")):
        record = RunRecord(
            settings={},
            recipe=None,
            command=None,
            step=3,
            samples=4,
            evaluations=[first, {**last, "samples": [{"prompt": asked}]}],
        )
        assert head in model_card(record, PolicySpec())


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_the_code_on_the_card_runs(kind, request, capsys):
    run = request.getfixturevalue(kind)
    code = (run.policy / "README.md").read_text().split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    torch.manual_seed(0)
    exec(code.replace("path/to/this/folder", str(run.policy)).replace("=128", "=8"), {})
    assert capsys.readouterr().out.strip()


def test_card_of_an_adapter(adapters):
    card = (adapters.policy / "README.md").read_text()
    assert front(adapters.policy)["library_name"] == "peft"
    assert "| trained | LoRA adapters, rank 4, alpha 8 |" in card
    assert "AutoPeftModelForCausalLM" in card


def test_card_of_a_hub_model():
    record = RunRecord(settings={}, recipe=None, command=None, step=7, samples=28, evaluations=[])
    spec = PolicySpec(model="org/name", revision="abc", lora=LoRASpec())
    for merged, relation in ((False, "adapter"), (True, "finetune")):
        card = model_card(record, spec, merged=merged)
        head = yaml.safe_load(card.split("---\n")[1])
        assert (head["base_model"], head["base_model_relation"]) == ("org/name", relation)
        assert "# name, aligned with Inverse-Q" in card
        assert "| base model | `org/name`, revision `abc` |" in card
        assert "| estimator | not recorded |" in card
        assert "Nothing: the run made no evaluation." in card


@pytest.mark.parametrize(
    ("template", "own", "stops"),
    [
        ("hh", None, '["\\n\\nHuman:"]'),
        ("hh", ["END"], '["END"]'),
        ("chatml", None, None),
        ("hh", [], None),
    ],
)
def test_card_says_what_ended_a_response_in_training(template, own, stops):
    rollout = {"class_path": "iqstar.rollouts.GenerateRollout", "init_args": {"stop_strings": own}}
    settings = {"model": {"init_args": {"rollout": rollout}}}
    record = RunRecord(
        settings=settings, recipe=None, command=None, step=1, samples=4, evaluations=[]
    )
    card = model_card(record, PolicySpec(chat_template=template))
    assert ("stop_strings=" in card) == (stops is not None)
    assert stops is None or f"generate(..., stop_strings={stops}, tokenizer=tokenizer)" in card


def test_card_of_a_judged_run(tmp_path, tiny):
    judge = {"class_path": "iqstar.judges.VaderJudge"}
    run = fit(tmp_path, tiny, model__init_args__judge=judge)
    card = (run.policy / "README.md").read_text()
    assert "The judge (VaderJudge) measures" in card
    before, after = (e.metrics["judge"] for e in run.module.evaluations)
    assert f"| judge score | {before:.3f} | {after:.3f} |" in card


def test_card_of_a_run_from_python(tmp_path, tiny):
    module = make_module(tiny, contrast())
    rows = [{"prompt": f"What is {n}?"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = JSONL(path=str(tmp_path / "rows.jsonl"), val_prompts=2, batch_size=2)
    trainer = make_trainer(max_steps=1, callbacks=[Export()], default_root_dir=tmp_path)
    trainer.fit(module, datamodule=data)
    card = (tmp_path / "policy" / "README.md").read_text()
    assert "| principle | Be kind to all. |" in card
    assert "| loss | DistributionImitationLoss (divergence ReverseKL) |" in card
    assert "rows.jsonl" in card
    assert "Its command was not recorded." in card
    assert "All settings" not in card


def test_settings_of_parts_within_parts(tiny):
    """So that the card of a run from Python knows where its responses were from."""
    mixed = MixtureRollout([GenerateRollout(), DatasetRollout()], [1.0, 1.0])
    module = make_module(tiny, rollout=mixed)
    engines = settings_of(module, None)["model"]["init_args"]["rollout"]["init_args"]["engines"]
    assert [e["class_path"].rpartition(".")[2] for e in engines] == [
        "GenerateRollout",
        "DatasetRollout",
    ]


def test_default_loss_of_the_card_is_that_of_the_module(tiny):
    described = _described(make_module(tiny, contrast()).loss)
    described["init_args"]["divergence"].pop("init_args")
    assert described == DEFAULT_LOSS


# ---- during a run


def test_beside_every_checkpoint(tmp_path, tiny):
    run = fit(
        tmp_path,
        tiny,
        export={"every_save": True, "at_end": False},
        checkpoint={"every_n_train_steps": 1, "save_top_k": -1},
        trainer__max_steps=3,
    )
    folder = run.folder / "checkpoints"
    saved = sorted(p.stem for p in folder.glob("*.ckpt") if not p.is_symlink())
    assert len(saved) == 3
    assert sorted(p.stem for p in folder.glob("*.policy")) == saved
    assert not run.policy.exists()
    assert json.loads((run.folder / "summary.json").read_text())["policy"] is None
    for name in saved:
        checkpoint = torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]
        written = load_file(folder / f"{name}.policy" / "model.safetensors")
        assert {f"actor.model.{n}" for n in written} == set(checkpoint)
        assert all(torch.equal(w, checkpoint[f"actor.model.{n}"]) for n, w in written.items())
    steps = [(folder / f"{n}.policy" / "README.md").read_text() for n in saved]
    assert ["| optimiser steps | 1 |" in c for c in steps] == [True, False, False]


def test_removed_with_its_checkpoint(tmp_path, tiny):
    run = fit(
        tmp_path,
        tiny,
        export={"every_save": True},
        checkpoint={"every_n_train_steps": 1, "save_top_k": 1},
        trainer__max_steps=3,
    )
    folder = run.folder / "checkpoints"
    (saved,) = (p for p in folder.glob("*.ckpt") if not p.is_symlink())
    (exported,) = folder.glob("*.policy")
    assert exported.stem == saved.stem
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(exported)), run.logits)
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(run.policy)), run.logits)


def test_exporting_changes_no_training(full, tmp_path, tiny):
    run = fit(
        tmp_path,
        tiny,
        export={"every_save": True, "dtype": "bfloat16"},
        checkpoint={"every_n_train_steps": 1, "save_top_k": -1},
    )
    assert torch.equal(run.logits, full.logits)


# ---- bad input


@pytest.fixture
def fails(full, tmp_path, capsys):
    """The error of an export of the full run, or of another checkpoint."""

    def run(*options: str, ckpt: Path = full.ckpt, out: Path = tmp_path / "out") -> str:
        return error_of(capsys, "export", "--ckpt", str(ckpt), "--out", str(out), *options)

    return run


def edited(run: Run, folder: Path, **changes: Any) -> Path:
    """A copy of a run's checkpoint with some of its entries replaced, or removed if None."""
    checkpoint = torch.load(run.ckpt, weights_only=True)
    for name, value in changes.items():
        place = checkpoint["iqstar"] if name in checkpoint["iqstar"] else checkpoint
        place[name] = value
    checkpoint = {k: v for k, v in checkpoint.items() if v is not None}
    torch.save(checkpoint, folder / "edited.ckpt")
    return folder / "edited.ckpt"


def test_arguments(capsys, fails):
    message = error_of(capsys, "export")
    assert message.startswith("the following arguments are required: --ckpt/--ckpt_path, --out")
    assert fails("--merg").startswith("--merg: unknown option; did you mean --merge?")
    assert fails("--dtype", "int8").startswith("--dtype: invalid choice: 'int8'")
    message = fails("--max_shard_size", "many")
    assert message == "--max_shard_size: 'many' is no size; write it like 500MB or 5GB"
    assert main(["export", "--help"]) == 0
    assert "--max_shard_size" in capsys.readouterr().out


def test_size_in_a_config(tmp_path, tiny, capsys):
    config = changed(tiny_config(tmp_path, tiny), "export.max_shard_size", "5 apples")
    message = error_of(capsys, "fit", "--config", str(write_config(tmp_path, config)))
    assert message.startswith("export.max_shard_size: '5 apples' is no size")


def test_newest_checkpoint_below_a_folder(full, tmp_path, capsys):
    argv = ["export", "--ckpt_path", str(full.folder.parent), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith(f"Exported {full.ckpt.resolve()} to ")
    assert (tmp_path / "out" / "config.json").is_file()


def test_checkpoint_that_is_none(fails, full, tmp_path):
    assert fails(ckpt=tmp_path / "none").startswith(f"--ckpt: {tmp_path}/none does not exist")
    assert "has no complete checkpoint below it" in fails(ckpt=tmp_path)
    (tmp_path / "text.ckpt").write_text("text")
    assert "text.ckpt is no checkpoint" in fails(ckpt=tmp_path / "text.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(full.ckpt.read_bytes()[:20_000])
    assert "half-written" in fails(ckpt=cut)


def test_checkpoint_without_weights(fails, full, tmp_path):
    for weights in (None, {}):
        message = fails(ckpt=edited(full, tmp_path, state_dict=weights))
        assert message.endswith("holds no weights of a policy; give a .ckpt that iqstar fit saved")
    assert "not saved by iqstar fit" in fails(ckpt=edited(full, tmp_path, iqstar=None))


def test_folder(fails, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    assert fails(out=tmp_path / "file").endswith("is a file; give a folder")
    message = fails(out=tmp_path / "file" / "out")
    assert message.startswith(f"export: cannot write {tmp_path}/file/out (Not a directory)")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    assert "is not empty; choose another folder, or add --overwrite" in fails()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert fails(out=Path()).endswith("which cannot be replaced; name another")
    assert "holds something else than an exported model" in fails("--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_overwriting(full, adapters, tmp_path):
    out = export(full, tmp_path / "out", "--max_shard_size", "50KB")
    export(adapters, out, "--overwrite")
    assert not list(out.glob("model*"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_model_that_is_not_ours_is_not_replaced(adapters, tiny, tmp_path, fails):
    """The base model's folder least of all: an adapter would then be one of itself."""
    shutil.copytree(tiny, tmp_path / "out")
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert "holds something else than an exported model" in fails("--overwrite")
    (tmp_path / "out" / "README.md").write_text("---\ntags:\n- iqstar\n---\nAn export of ours.")
    config = yaml.safe_load(adapters.config.read_text())
    config["model"]["init_args"]["policy"]["model"] = str(tmp_path / "out")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    own = ["--config", str(tmp_path / "own.yaml"), "--overwrite"]
    assert "is the model that this one was trained from; choose another" in fails(*own)
    assert before == sorted({p.name for p in (tmp_path / "out").iterdir()} - {"README.md"})


def test_full_disk(full, tmp_path, fails):
    out = export(full, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))  # writing more fails
    try:
        message = fails("--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"export: cannot write {out} (")
    assert "File too large" in message
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_run_whose_export_cannot_be_written(tmp_path, tiny, capsys):
    run = tmp_path / "runs" / "run" / "v"
    run.mkdir(parents=True)
    (run / "policy").write_text("in the way")
    file = write_config(tmp_path, tiny_config(tmp_path, tiny))
    message = error_of(capsys, "fit", "--config", str(file))
    assert message.startswith(f"export: cannot write {run}/policy (Not a directory)")
    assert (run / "policy").read_text() == "in the way"
    argv = ["--ckpt", str(run / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "out")]
    assert main(["export", *argv]) == 0  # training was not lost


def test_merging_a_full_model(fails):
    message = fails("--merge")
    assert message.startswith("--merge: ")
    assert message.endswith(
        "has no adapters to fold in, all weights were trained; leave --merge out"
    )


def test_run_without_a_recipe(fails, full, tmp_path):
    bare = edited(full, tmp_path, recipe=None)
    assert "give a YAML that does with --config" in fails(ckpt=bare)
    out = tmp_path / "out"
    argv = ["--ckpt", str(bare), "--out", str(out), "--config", str(full.config)]
    assert main(["export", *argv]) == 0
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(out)), full.logits)
    assert "| principle | Please be kind. |" in (out / "README.md").read_text()


def test_configs_that_do_not_fit(fails, full, tmp_path):
    message = fails("--config", str(tmp_path / "none.yaml"))
    assert message.endswith("none.yaml does not exist or is not a file")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "list.yaml:1: not a mapping" in fails("--config", str(tmp_path / "list.yaml"))
    config = yaml.safe_load(full.config.read_text())
    wrong = changed(config, "model.init_args.policy.modle", "x")
    message = fails("--config", str(write_config(tmp_path, wrong, "wrong.yaml")))
    assert "model.init_args.policy is not understood" in message
    lora = changed(config, "model.init_args.policy.lora", LORA)
    message = fails("--config", str(write_config(tmp_path, lora, "lora.yaml")))
    assert "does not fit the model of its settings" in message


def test_base_model_that_changed(fails, adapters, tmp_path):
    other = tiny_folder(tmp_path / "other", seed=1)
    config = yaml.safe_load(adapters.config.read_text())
    config = changed(config, "model.init_args.policy.model", str(other))
    file = write_config(tmp_path, config)
    message = fails("--config", str(file), ckpt=adapters.ckpt)
    assert f"was trained from another base model: {other} has changed since" in message
    shutil.rmtree(other)
    message = fails("--config", str(file), ckpt=adapters.ckpt)
    assert message.startswith("model.policy.model: ")


def test_a_linked_folder_stays_linked(tmp_path, full, capsys):
    """The part is written beside the folder itself, on whose disk there is room."""
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    argv = ["export", "--ckpt", str(full.ckpt), "--out", str(tmp_path / "link")]
    assert main(argv) == main([*argv, "--overwrite"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "config.json").exists()


def test_merging_adapted_embeddings_of_a_tied_model(tmp_path, tiny, capsys):
    lora = {**LORA, "target_modules": ["embed_tokens", "q_proj"]}
    run = fit(tmp_path, tiny, model__init_args__policy__lora=lora)
    argv = ["export", "--ckpt", str(run.ckpt), "--out", str(tmp_path / "out")]
    assert "--merge: the adapted embeddings are also the output" in error_of(
        capsys, *argv, "--merge"
    )
    assert main(argv) == 0
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(logits_of(loaded), run.logits)


@pytest.mark.slow
def test_bundled_model(tmp_path):
    run = fit(tmp_path, Path("bundled"), trainer__max_steps=1, data__init_args__val_prompts=1)
    for options in ([], ["--max_shard_size", "200MB"]):
        out = export(run, tmp_path / f"out{len(options)}", *options)
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert same(logits_of(loaded), run.logits, 1e-5)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert front(out)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        chat = AutoTokenizer.from_pretrained(out)
        ids = chat.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True
        )["input_ids"]
        assert ids == run.module.chat.prompt_ids([Message(role="user", content="Hi")])
    assert len(list((tmp_path / "out2").glob("model-*.safetensors"))) > 1
