"""The vLLM engine without vLLM: what is asked of it, what weights it gets, what can go wrong.

What it does with real samples is in test_vllm_real.py (``make test-vllm``).
"""

import copy
import re
import time
import urllib.error

import pytest
import torch
import yaml

from cli_tools import tiny_config
from fitting import LORA, PROMPTS, ask, attach, fit, make_module
from iqstar.adapters import LoRASpec
from iqstar.cli import main
from iqstar.errors import InputError
from iqstar.loading import load_policy
from iqstar.policy import PolicySpec
from iqstar.rollouts import rollout_seed
from iqstar.vllm_engines import Server
from iqstar.vllm_rollout import VLLMRollout
from iqstar.weight_files import effective_weights
from processes import fit_in_two
from tiny import tiny_folder
from vllm_stand_in import stand_in

END = 1


def load(folder, **spec):
    spec = PolicySpec(model=str(folder), **spec)
    return load_policy(spec, spec.chat())


def cut(body):
    """A response that reaches the limit."""
    return [7] * body["sampling_params"]["max_tokens"], "length"


@pytest.fixture
def server(tiny):
    with stand_in(tiny, cut) as server:
        yield server


def rows_of(rollout):
    pairs = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [row[mask].tolist() for row, mask in pairs]


def randomise(module, scale=0.2):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


# ---- what is asked


def test_every_setting_of_sampling_is_named(tiny, server):
    """What is left out, vLLM would fill in from the checkpoint."""
    policy = load(tiny)
    VLLMRollout(server.url, max_new_tokens=9).roll_out(policy, PROMPTS[:1], 0.7, 3)
    (body,) = server.asked
    chat = policy.actor.chat
    assert body["token_ids"] == chat.prompt_ids(PROMPTS[0].messages)
    assert body["sampling_params"] == {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "max_tokens": 9,
        "ignore_eos": True,
        "stop_token_ids": [END],
        "stop": [],
        "detokenize": False,
        "skip_special_tokens": False,
        # Rows of the output layer that mean no token are never drawn.
        "logit_bias": {str(i): -1e9 for i in range(chat.vocab_size, 320)},
        "seed": rollout_seed(3, 0),
    }


def test_every_response_has_a_seed_of_its_own(tiny, server):
    engine = VLLMRollout(server.url, max_new_tokens=3, responses_per_prompt=5)
    seeds = []
    for seed in (0, 0, 1):
        server.asked.clear()
        engine.roll_out(load(tiny), PROMPTS, 1.0, seed)
        seeds.append({body["sampling_params"]["seed"] for body in server.asked})
    assert [len(s) for s in seeds] == [5 * len(PROMPTS)] * 3
    assert seeds[0] == seeds[1]
    assert not seeds[0] & seeds[2]


def test_answers_keep_the_order_of_the_prompts(tiny):
    """The answer says how long its prompt was; the slowest prompts come first."""
    texts = ("a" * 90, "b" * 5, "c" * 40, "d")

    def answer(body):
        return [2 + len(body["token_ids"]) % 200, END], "stop"

    policy = load(tiny)
    prompts = [ask(text) for text in texts]
    with stand_in(tiny, answer) as server:
        for size in (None, 3):
            engine = VLLMRollout(server.url, responses_per_prompt=2, batch_size=size)
            rollout = engine.roll_out(policy, prompts, 1.0, 0)
            assert rollout.prompts == tuple(p for p in prompts for _ in range(2))
            lengths = [len(policy.actor.chat.prompt_ids(p.messages)) for p in rollout.prompts]
            assert rows_of(rollout) == [[2 + n % 200, END] for n in lengths]


# ---- identity 7: what ended a response is an action


def test_the_end_is_inside_the_mask(tiny):
    given = iter([([5, 6, END], "stop"), ([5, 6, 7], "length"), ([END], "stop")])
    with stand_in(tiny, lambda body: next(given)) as server:
        engine = VLLMRollout(server.url, max_new_tokens=3, batch_size=1)
        rollout = engine.roll_out(load(tiny), PROMPTS[:3], 1.0, 0)
    assert rows_of(rollout) == [[5, 6, END], [5, 6, 7], [END]]
    assert rollout.truncated.tolist() == [False, True, False]
    assert engine.on_policy


def test_stop_strings_end_a_response_too(tiny):
    policy = load(tiny)
    tokenizer = policy.actor.chat.tokenizer
    ids = tokenizer("the ring and")["input_ids"]
    with stand_in(tiny, lambda body: (ids, "stop")) as server:
        engine = VLLMRollout(server.url, stop_strings=["ring"])
        (row,) = rows_of(engine.roll_out(policy, PROMPTS[:1], 1.0, 0))
    assert tokenizer.decode(row) == "the ring"
    sampling = server.asked[0]["sampling_params"]
    assert sampling["stop"] == ["ring"]
    assert sampling["detokenize"]


def test_an_end_that_nobody_asked_for_is_an_error(tiny):
    with (
        stand_in(tiny, lambda body: ([5, 6], "stop")) as server,
        pytest.raises(InputError, match="after 2 tokens, reason 'stop', at no end"),
    ):
        VLLMRollout(server.url).roll_out(load(tiny), PROMPTS[:1], 1.0, 0)


# ---- the weights


def test_weights_arrive_before_every_rollout(tiny, server):
    """In the server's dtype; the tied head goes as the embedding. Nothing stays behind."""
    policy = load(tiny)
    engine = VLLMRollout(server.url, max_new_tokens=3)
    for seed in range(2):
        randomise(policy.actor)
        engine.roll_out(policy, PROMPTS, 1.0, seed)
        own = policy.actor.model.state_dict()
        assert set(own) - set(server.weights[-1]) == {"lm_head.weight"}
        for name, weight in server.weights[-1].items():
            assert torch.equal(weight, own[name].bfloat16()), name
    answers = ["generate"] * len(PROMPTS)
    assert server.log == ["load", "reset", *answers, "load", "reset", *answers]
    assert not any(folder.exists() for folder in server.folders)
    assert engine.sync_seconds > 0


def test_weights_can_pass_through_another_folder(tiny, server, tmp_path):
    engine = VLLMRollout(server.url, max_new_tokens=3, transfer_folder=str(tmp_path))
    engine.synchronise(load(tiny))
    assert server.folders[0].parent == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_merged_and_left_as_they_are(tiny, server, rslora):
    """Against PEFT's own merging, of a copy."""
    server.served["dtype"] = "float32"
    policy = load(tiny, lora=LoRASpec(rank=4, alpha=8, rslora=rslora))
    randomise(policy.actor)
    before = copy.deepcopy(policy.actor.state_dict())
    merged = copy.deepcopy(policy.actor.model).merge_and_unload().state_dict()
    VLLMRollout(server.url, max_new_tokens=3).roll_out(policy, PROMPTS, 1.0, 0)
    assert set(merged) - set(server.weights[0]) == {"lm_head.weight"}
    for name, weight in server.weights[0].items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-6, atol=1e-6)
    after = policy.actor.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_merged_weights_give_the_adapted_models_outputs(tiny):
    policy = load(tiny, lora=LORA)
    randomise(policy.actor)
    plain = load(tiny).actor
    plain.model.load_state_dict(effective_weights(policy.actor))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        ours, theirs = policy.actor.model.eval()(ids).logits, plain.model.eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert "lora" not in "".join(dict(plain.plain.named_parameters()))


def test_adapters_of_embeddings_cannot_be_merged(tiny, server):
    policy = load(tiny, lora=LoRASpec(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(InputError, match=r"lora\.target_modules: .*embed_tokens is not a linear"):
        VLLMRollout(server.url).roll_out(policy, PROMPTS, 1.0, 0)


@pytest.mark.parametrize(
    ("strategy", "lora"),
    [
        ("ddp", None),
        pytest.param("fsdp", None, marks=pytest.mark.slow),
        ("fsdp", {"rank": 4}),
    ],
)
def test_two_processes_share_one_server(tmp_path, tiny, server, strategy, lora):
    """Each asks for its own 4 prompts; one of them brings the whole weights, once a rollout."""
    config = tiny_config(tmp_path, tiny)
    config["model"]["init_args"]["rollout"] = {
        "class_path": "iqstar.vllm_rollout.VLLMRollout",
        "init_args": {"url": server.url, "max_new_tokens": 4},
    }
    config["model"]["init_args"]["policy"]["lora"] = lora
    config["trainer"] |= {"devices": 2, "strategy": strategy}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    fit_in_two(tmp_path, "--config", str(tmp_path / "run.yaml"))
    assert server.log.count("load") == 2
    assert server.log.count("generate") == 2 * 2 * 4
    seeds = [body["sampling_params"]["seed"] for body in server.asked]
    assert len(set(seeds)) == len(seeds)
    start = {n: w.bfloat16() for n, w in load(tiny).actor.model.state_dict().items()}
    assert all(torch.equal(w, start[n]) for n, w in server.weights[0].items())
    assert {n: w.shape for n, w in server.weights[1].items()} == {
        n: start[n].shape for n in server.weights[0]
    }
    assert any(not torch.equal(w, start[n]) for n, w in server.weights[1].items())


# ---- in a run


def test_a_run_trains_on_its_answers(tiny, server):
    module = make_module(tiny, rollout=VLLMRollout(server.url, max_new_tokens=5))
    fit(module, max_steps=2)
    assert server.log.count("load") == 2
    first, second = server.weights
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_evaluations_need_no_server(tmp_path, tiny):
    """They sample with the built-in engine, so that runs compare whatever their engines."""
    config = tiny_config(tmp_path, tiny)
    config["model"]["init_args"]["rollout"] = {
        "class_path": "iqstar.vllm_rollout.VLLMRollout",
        "init_args": {"url": "http://127.0.0.1:9", "max_new_tokens": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["validate", "--config", str(tmp_path / "run.yaml")]) == 0


# ---- what can go wrong


def nobody(tiny):
    """The address of a server that has just stopped."""
    with stand_in(tiny, cut) as server:
        return server.url


def test_a_missing_server_is_found_before_anything_is_computed(tiny):
    module = make_module(tiny, rollout=VLLMRollout(nobody(tiny)))
    words = rf"model\.rollout\.init_args\.url: no vLLM server .*vllm serve {re.escape(str(tiny))} "
    with pytest.raises(InputError, match=words):
        attach(module)


@pytest.mark.parametrize(
    ("path", "status", "content", "words"),
    [
        ("/collective_rpc", 404, "Not Found", "started without VLLM_SERVER_DEV_MODE=1; start it"),
        ("/inference/v1/generate", 403, "off", "started without --enable-scale-out; start it"),
        (
            "/collective_rpc",
            500,
            "'CPUWorker' object has no attribute 'iqstar_model'",
            "without --worker-extension-cls iqstar.vllm_worker.WeightSync; start it with: VLLM_",
        ),
        ("/inference/v1/generate", 500, "out of memory", "status 500: out of memory; its log"),
    ],
)
def test_a_server_that_refuses_says_what_it_lacks(tiny, server, path, status, content, words):
    server.refusals[path] = status, content
    with pytest.raises(InputError, match=rf"model\.rollout\.init_args\.url: .*{words}"):
        VLLMRollout(server.url).roll_out(load(tiny), PROMPTS, 1.0, 0)


def test_a_server_that_dies_says_how_to_go_on(tiny):
    policy = load(tiny)
    with stand_in(tiny, cut) as server:
        engine = VLLMRollout(server.url, max_new_tokens=3)
        engine.roll_out(policy, PROMPTS, 1.0, 0)
    with pytest.raises(InputError, match=r"\.url: .* stopped answering .*--ckpt_path last"):
        engine.roll_out(policy, PROMPTS, 1.0, 1)


def test_a_server_that_takes_too_long_is_not_called_dead(tiny):
    """Its log has nothing to say, and another start would time out again."""

    def slow(body):
        time.sleep(1.0)
        return cut(body)

    with stand_in(tiny, slow) as server:
        engine = VLLMRollout(server.url, max_new_tokens=3, timeout=0.2)
        with pytest.raises(InputError, match=r"\.timeout: .* within 0\.2 seconds; give it more"):
            engine.roll_out(load(tiny), PROMPTS[:1], 1.0, 0)


def test_a_host_that_cannot_be_reached_in_time_is_no_slow_server(monkeypatch):
    """The kernel gives up a connection by itself; urllib wraps what it says."""
    server = Server("http://127.0.0.1:9", "model", timeout=600.0)

    def unreachable(*_, **__):
        raise urllib.error.URLError(TimeoutError("timed out"))

    monkeypatch.setattr(server._opener, "open", unreachable)
    with pytest.raises(InputError, match=r"no vLLM server answers at .*; start one with"):
        server.model()


def test_any_error_of_bringing_weights_is_raised_as_it_is(tiny, server, monkeypatch):
    engine, policy = VLLMRollout(server.url), load(tiny)

    def fail(folder):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(engine.connect(policy), "load", fail)
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        engine.synchronise(policy)


def test_a_request_whose_connection_is_reset_is_sent_again(tiny, server, monkeypatch):
    """Twice; its seed is the same, and so is the rollout."""
    monkeypatch.setattr("iqstar.vllm_engines.PAUSES", (0.0, 0.0))
    policy, engine = load(tiny), VLLMRollout(server.url, max_new_tokens=3)
    whole = engine.roll_out(policy, PROMPTS[:1], 1.0, 0)
    server.dropped = 2
    again = engine.roll_out(policy, PROMPTS[:1], 1.0, 0)
    assert server.dropped == 0
    assert rows_of(again) == rows_of(whole)
    server.dropped = 3
    with pytest.raises(InputError, match=r"\.url: .* stopped answering .*--ckpt_path last"):
        engine.roll_out(policy, PROMPTS[:1], 1.0, 0)


def test_another_model_is_refused(tmp_path, tiny):
    other = tiny_folder(tmp_path / "other", vocab_size=400)
    with (
        stand_in(other, cut) as server,
        pytest.raises(InputError, match=r"\.url: .*vocab_size is 400, the policy's 320; let it"),
    ):
        VLLMRollout(server.url).connect(load(tiny))
    assert server.log == []


def test_a_busy_server_is_refused(tiny, server):
    """What it keeps of another run's prompts would have been computed with older weights."""
    server.resets = False
    with pytest.raises(InputError, match="a server of its own"):
        VLLMRollout(server.url).roll_out(load(tiny), PROMPTS, 1.0, 0)


def test_weights_that_cannot_be_written_are_an_error(tiny, server, tmp_path):
    engine = VLLMRollout(server.url, transfer_folder=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"init_args\.transfer_folder: .*cannot be written"):
        engine.synchronise(load(tiny))


def test_a_prompt_that_is_too_long_for_the_server_is_an_error(tiny, server):
    server.served["max_tokens"] = 30
    with pytest.raises(InputError, match=r"data\.max_prompt_tokens: .* vLLM's 30 positions"):
        VLLMRollout(server.url, max_new_tokens=28).roll_out(load(tiny), PROMPTS, 1.0, 0)


def test_without_vllm_and_without_a_server_there_is_a_remedy(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"init_args\.url: .*pip install vllm"):
        VLLMRollout(url=None).connect(load(tiny))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"responses_per_prompt": 0}, "responses_per_prompt"),
        ({"batch_size": 0}, "batch_size"),
        ({"timeout": 0.0}, "timeout"),
        ({"url": "localhost:8000"}, "url"),
        ({"llm": {"max_model_len": 9}}, "llm"),
    ],
)
def test_senseless_settings_are_refused(options, key):
    with pytest.raises(InputError, match=rf"model\.rollout\.init_args\.{key}"):
        VLLMRollout(**options)


def test_sampling_needs_a_positive_temperature(tiny, server):
    with pytest.raises(InputError, match=r"model\.temperature"):
        VLLMRollout(server.url).roll_out(load(tiny), PROMPTS, 0.0, 0)


def test_a_server_that_would_stop_at_a_split_prompt_is_refused(tiny, server):
    server.served["stops_at_split_prompts"] = True
    with pytest.raises(InputError, match="--no-enable-chunked-prefill"):
        VLLMRollout(server.url, max_new_tokens=3).connect(load(tiny))
    assert server.log == []  # before any weight is brought over
