"""vLLM for real, on the bundled model: ``make test-vllm``, in an environment of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cli_tools import tiny_config
from fitting import ask
from iqstar.adapters import LoRASpec
from iqstar.cli import main
from iqstar.errors import InputError
from iqstar.loading import load_policy
from iqstar.policy import PolicySpec
from iqstar.pretrained import resolve_model
from iqstar.scoring import RolloutScorer
from iqstar.vllm_engines import EXTENSION, Request, Server
from iqstar.vllm_rollout import VLLMRollout
from tiny import tiny_folder

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("unchecked_shapes")]

PROMPTS = [
    ask(text)
    for text in (
        "Hi",
        "Why is the sky blue?",
        "Tell me a joke about two programmers and a cat that knows more than both of them.",
        "And you?",
    )
]
#: Small, for these tests beside other work; vLLM takes much more by itself.
SMALL = {"max_model_len": 512, "max_num_seqs": 32, "enforce_eager": True}
SMALL |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024}
MEMORY = 128 * 2**20


@contextmanager
def serving(folder: Path, port: int, *options: str) -> Iterator[str]:
    """A vLLM server of the bundled model, in bfloat16; its address."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--model", resolve_model("bundled"), "--dtype", "bfloat16", "--port", str(port)]
    command += ["--max-model-len", "512", "--max-num-seqs", "32", "--enforce-eager"]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "1024"]
    command += ["--kv-cache-memory-bytes", str(MEMORY), "--enable-scale-out", *options]
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"no server after 10 minutes: {log.read_text()[-5000:]}")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, 8765, "--worker-extension-cls", EXTENSION) as url:
        yield url


def load(precision: str = "32-true", **spec: Any) -> Any:
    spec = PolicySpec(model="bundled", **spec)
    return load_policy(spec, spec.chat(), precision)


def perturb(module: torch.nn.Module, scale: float = 0.1) -> None:
    """Every weight by a random factor; the embedding, which is the head too, among them."""
    torch.manual_seed(int(1000 * scale))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + scale * torch.randn_like(parameter))


class Scored:
    """An engine that also asks for the log-probs of what it samples."""

    def __init__(self, rollout: VLLMRollout, policy: Any) -> None:
        self.rollout, self.policy = rollout, policy
        engine = rollout.connect(policy)
        generate = engine.generate

        def asking(requests: list[Request]) -> list[Any]:
            extra = {"logprobs": 0}
            self.responses = generate(
                [dataclasses.replace(r, sampling=r.sampling | extra) for r in requests]
            )
            return self.responses

        engine.generate = asking  # type: ignore[method-assign]

    def gap(self, precision: str = "32-true", seed: int = 0) -> torch.Tensor:
        """|vLLM's log-prob − our scoring| of every sampled token, in nats."""
        rollout = self.rollout.roll_out(self.policy, PROMPTS, 1.0, seed)
        theirs = [
            torch.tensor(response.logprobs[: int(length)])
            for response, length in zip(self.responses, rollout.lengths, strict=True)
        ]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
        with torch.no_grad(), autocast:
            ours = RolloutScorer(self.policy, [rollout], 1.0).behaviour()
        self.found = rollout
        return (ours - torch.cat(theirs)).abs()


def report(name: str, gap: torch.Tensor) -> None:
    print(
        f"vLLM gap, {name}: mean {gap.mean():.2g}, largest {gap.max():.2g} nats, {len(gap)} tokens"
    )


# ---- identity 9, and that every weight arrives


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_server_follows_the_policy(url, precision):
    """Log-probs agree within bfloat16's rounding, before and after all weights have changed.

    A weight that did not arrive, such as the packed copy of a head tied to the embedding, or keys
    and values kept from before (the prompts are the same), would be far outside.
    """
    policy = load(precision)
    engine = Scored(VLLMRollout(url, max_new_tokens=24, responses_per_prompt=2), policy)
    for name in ("as loaded", "perturbed"):
        gap = engine.gap(precision)
        report(f"bfloat16 server, {precision} scoring, {name}", gap)
        assert gap.mean() < 0.1
        assert gap.max() < 1.0
        perturb(policy.actor)


def test_without_a_transfer_the_server_does_not_follow(url, monkeypatch):
    """That the test above can fail: old weights are seen at once."""
    policy = load()
    engine = Scored(VLLMRollout(url, max_new_tokens=24), policy)
    assert engine.gap().mean() < 0.1
    monkeypatch.setattr(VLLMRollout, "synchronise", lambda *_: None)
    perturb(policy.actor)
    assert engine.gap().mean() > 0.5


def test_what_was_computed_with_old_weights_is_forgotten(url, monkeypatch):
    """The same long prompt before and after: with its old keys and values the answers differ.

    Greedily, so that nothing but the weights decides. The control keeps the cache.
    """
    policy = load()
    rollout = VLLMRollout(url, max_new_tokens=1)
    engine = rollout.connect(policy)
    assert isinstance(engine, Server)
    words = "the quick brown fox jumps over the lazy dog and runs away into the deep dark wood "
    prompt = policy.actor.chat.prompt_ids(ask(words * 8).messages)
    request = Request(prompt=prompt, sampling={"temperature": 0.0, "max_tokens": 1, "logprobs": 0})

    def logprob() -> float:
        (response,) = engine.generate([request])
        assert response.logprobs
        return response.logprobs[0]

    rollout.synchronise(policy)
    logprob()  # keeps the prompt's keys and values
    perturb(policy.actor, 0.2)
    post = engine._post
    with monkeypatch.context() as patch:
        kept = lambda path, body=None: (  # noqa: E731
            {"success": True} if path == "/reset_prefix_cache" else post(path, body)
        )
        patch.setattr(engine, "_post", kept)
        rollout.synchronise(policy)
    stale = logprob()
    rollout.synchronise(policy)
    fresh = logprob()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        own = float(policy.actor.model.eval()(ids).logits[0, -1].log_softmax(-1).max())
    print(f"log-prob of the next token: {own:.3f} ours, {fresh:.3f} fresh, {stale:.3f} stale")
    assert abs(fresh - own) < 0.3
    assert abs(stale - own) > 2 * abs(fresh - own)


def test_adapters_arrive_merged(url):
    policy = load("bf16-mixed", lora=LoRASpec(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in policy.actor.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    engine = Scored(VLLMRollout(url, max_new_tokens=24), policy)
    gap = engine.gap("bf16-mixed")
    report("adapters, merged in bfloat16", gap)
    assert gap.mean() < 0.1


# ---- sampling


def test_ends_lengths_and_seeds(url):
    policy = load()
    engine = VLLMRollout(url, max_new_tokens=20, responses_per_prompt=4)
    first, again, other = (engine.roll_out(policy, PROMPTS, 1.0, seed) for seed in (3, 3, 4))
    (end,) = policy.actor.chat.end_of_turn
    for row, mask, cut in zip(
        first.response_ids, first.response_mask, first.truncated, strict=True
    ):
        ids = row[mask].tolist()
        assert cut == (end not in ids)
        assert end not in ids[:-1]
        assert len(ids) == 20 if cut else len(ids) <= 20
    assert 0 < first.truncated.sum() < len(first)
    assert len({tuple(row.tolist()) for row in first.response_ids[8:12]}) > 1
    assert torch.equal(first.response_ids, again.response_ids)  # nothing else is at work here
    assert not torch.equal(first.response_ids[:, :5], other.response_ids[:, :5])


def test_stop_strings_end_responses(url):
    policy = load()
    engine = VLLMRollout(url, max_new_tokens=40, stop_strings=["e"])
    rollout = engine.roll_out(policy, PROMPTS, 1.0, 0)
    decode = policy.actor.chat.tokenizer.decode
    rows = zip(rollout.response_ids, rollout.response_mask, rollout.truncated, strict=True)
    for row, mask, cut in rows:
        ids = row[mask].tolist()
        assert "e" not in decode(ids[:-1])
        assert cut or "e" in decode(ids) or ids[-1] in policy.actor.chat.eos_ids
    assert not rollout.truncated.all()


def test_frequencies_are_those_of_the_policy(url):
    """First tokens of 400 responses: all tokens over 1% within 5 standard deviations."""
    policy, number = load(), 400
    engine = VLLMRollout(url, max_new_tokens=1, responses_per_prompt=number)
    rollout = engine.roll_out(policy, PROMPTS[:1], 2.0, 0)
    ids = torch.tensor([policy.actor.chat.prompt_ids(PROMPTS[0].messages)])
    with torch.no_grad():
        expected = (policy.actor.model.eval()(ids).logits[0, -1] / 2.0).softmax(-1)
    likely = (expected > 0.01).nonzero()[:, 0]
    found = torch.bincount(rollout.actions, minlength=len(expected)) / number
    assert len(likely) > 3
    deviation = (expected * (1 - expected) / number).sqrt()
    assert ((found - expected).abs() < 5 * deviation)[likely].all()


# ---- runs and errors


def test_a_run_with_a_server(url, tmp_path):
    config = tiny_config(tmp_path, Path(resolve_model("bundled")))
    config["model"]["init_args"]["rollout"] = {
        "class_path": "iqstar.vllm_rollout.VLLMRollout",
        "init_args": {"url": url, "max_new_tokens": 8},
    }
    config["model"]["init_args"]["eval_samples"] = 1
    config["trainer"]["precision"] = "bf16-mixed"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 0
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    assert json.loads(summary.read_text())["optimizer_steps"] == 2


def test_another_model_is_refused(url, tmp_path):
    spec = PolicySpec(model=str(tiny_folder(tmp_path / "tiny")))
    with pytest.raises(InputError, match="serves another model than the policy: its vocab_size"):
        VLLMRollout(url).connect(load_policy(spec, spec.chat()))


def test_a_server_without_the_extension_says_so(tmp_path):
    with (
        serving(tmp_path, 8766) as url,
        pytest.raises(InputError, match=f"was started without --worker-extension-cls {EXTENSION}"),
    ):
        VLLMRollout(url).connect(load())


# ---- vLLM started by the run


def test_in_this_environment_without_a_server():
    """In float32: within its rounding, before and after all weights have changed."""
    policy = load()
    options = SMALL | {"dtype": "float32", "kv_cache_memory_bytes": MEMORY}
    engine = Scored(VLLMRollout(None, max_new_tokens=24, llm=options), policy)
    for name in ("as loaded", "perturbed"):
        gap = engine.gap()
        report(f"float32, in process, {name}", gap)
        assert gap.max() < 1e-3
        perturb(policy.actor)


def test_options_that_vllm_does_not_know_are_an_error():
    with pytest.raises(InputError, match=r"model\.rollout\.init_args\.llm: .*nonsense"):
        VLLMRollout(None, llm={"nonsense": 1}).connect(load())
