"""Sampled tokens a second: iqstar's rollout engines against transformers' ``generate``.

Same model, prompts, precision and threads, every response of the full length, in alternating fresh
processes:

    python benchmarks/rollouts.py --rounds 5
    python benchmarks/rollouts.py --vllm http://localhost:8000   # with a server that is running
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import urlparse

import harness
from iqstar.allocator import allow_huge_pages

BASE = "transformers generate"


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Samples a few times in this process.

    Args:
        settings: ``side``, ``texts`` (one for each response), ``tokens``, ``repeats``,
            ``precision``, ``model``, ``threads``, ``vllm`` (URL).

    Returns:
        Tokens of one rollout, its median seconds, seconds of the weights' transfer, memory.
    """
    if settings["side"] != BASE:
        allow_huge_pages()  # as the command does, before torch is imported
    import torch

    import memory

    torch.set_num_threads(settings["threads"])
    made = _transformers(settings) if settings["side"] == BASE else _iqstar(settings)
    sample: Callable[[int], int] = made[0]
    bf16 = settings["precision"] == "bf16-mixed"
    seconds, transfers, tokens = [], [], 0
    for repeat in range(1 + settings["repeats"]):
        context: AbstractContextManager = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with context if bf16 else nullcontext():
            started = time.perf_counter()
            tokens = sample(repeat)
            seconds.append(time.perf_counter() - started)
        transfers.append(float(getattr(made[1], "sync_seconds", 0.0) or 0.0))
    rss, pss = memory.peak()
    if settings["side"] == "vllm":
        server = memory.server_peak(urlparse(settings["vllm"]).port)
        rss, pss = rss + server[0], pss + server[1]
    return {
        "tokens": tokens,
        "seconds": harness.medians([{"s": s} for s in seconds[1:]])["s"],
        "sync_seconds": harness.medians([{"s": s} for s in transfers[1:]])["s"],
        "peak_rss_mib": rss / 2**20,
        "peak_pss_mib": pss / 2**20,
    }


def _iqstar(settings: dict[str, Any]) -> tuple[Callable[[int], int], Any]:
    """An engine of iqstar, and how many response tokens a call of it makes."""
    from iqstar import PolicySpec
    from iqstar.loading import load_policy
    from iqstar.mdp import Message, Prompt
    from iqstar.rollouts import GenerateRollout

    spec = PolicySpec(model=settings["model"], attn_implementation="grouped")
    policy = load_policy(spec, spec.chat(), settings["precision"])
    policy.actor.chat.eos_ids = ()  # every response is of the full length
    prompts = [Prompt(messages=(Message(role="user", content=t),)) for t in settings["texts"]]
    engine = GenerateRollout(max_new_tokens=settings["tokens"])
    if settings["side"] == "vllm":
        from iqstar.vllm_rollout import VLLMRollout

        engine = VLLMRollout(url=settings["vllm"], max_new_tokens=settings["tokens"])

    def sample(seed: int) -> int:
        return int(engine.roll_out(policy, prompts, 1.0, seed).response_mask.sum())

    return sample, engine


def _transformers(settings: dict[str, Any]) -> tuple[Callable[[int], int], Any]:
    """A plain call of ``generate``, all its settings but those of sampling at their defaults."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from iqstar.pretrained import resolve_model

    folder = resolve_model(settings["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # every response is of the full length
    chats = [[{"role": "user", "content": text}] for text in settings["texts"]]

    def sample(seed: int) -> int:
        torch.manual_seed(seed)
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        pad = tokenizer.pad_token_id
        count = settings["tokens"]
        made = model.generate(
            **inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=count, pad_token_id=pad
        )
        return made[:, inputs["input_ids"].shape[1] :].numel()

    return sample, None


def main() -> None:
    """Measures every engine in turn, for each precision and number of responses."""
    parser = harness.parser(__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed", "32-true"])
    parser.add_argument("--responses", type=int, nargs="+", default=[16, 64], help="at once")
    parser.add_argument("--tokens", type=int, default=48, help="of every response")
    parser.add_argument("--repeats", type=int, default=2, help="timed in each process")
    parser.add_argument("--vllm", help="URL of a running server")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker)))
        return
    texts = harness.prompts(options.data, max(options.responses))
    shape = {k: getattr(options, k) for k in ("tokens", "repeats", "threads", "model", "vllm")}
    names = ["iqstar", BASE, *(["vllm"] if options.vllm else [])]
    for precision in options.precision:
        table, samples, rows = {}, {}, []
        for count in options.responses:
            common = {**shape, "precision": precision, "texts": texts[:count]}
            found = harness.alternate(
                {name: {**common, "side": name} for name in names},
                options.rounds,
                lambda s: harness.run_worker(__file__, s, options.threads),
            )
            cell = f"{count}×{options.tokens}, {precision}"
            table[cell] = {name: harness.medians(s) for name, s in found.items()}
            samples[cell] = found
            slow = table[cell][BASE]
            for name, row in table[cell].items():
                row["tokens_per_second"] = row["tokens"] / row["seconds"]
                row["ratio"] = row["tokens_per_second"] * slow["seconds"] / slow["tokens"]
                keys = ("tokens_per_second", "ratio", "sync_seconds", "peak_rss_mib")
                rows.append([f"{name}, {cell}", *(row[k] for k in keys)])
        columns = ["engine", "tokens/s", "ratio", "of it transfer, s", "peak RSS, MiB"]
        shown = harness.table("Rollouts", columns, rows)
        harness.finish(options, f"rollouts-{precision}", [shown], table=table, samples=samples)


if __name__ == "__main__":
    main()
