"""The head's kernel against the naive full-logits version: time, extra memory, gradients.

``head_loss`` scores and trains on response tokens in chunks; the naive version holds all logits
and leaves the gradient to autograd. Both include the frozen model's head where the loss needs it:

    python benchmarks/kernel.py --rounds 5

Times: both versions in turn in one process. Extra memory: one call in a fresh process, the peak of
its resident set (the kernel's own mark, reset before the call) less what was resident before and
the weight's gradient. Fixing glibc's mmap threshold there hands every freed block of 64 KiB or
more back at once, so that nothing is counted twice; the matrix library's own buffers are included.

Gradients: how far the two versions are apart, and how far each is from the same in float64, all as
norms relative to the gradient's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import harness

VOCABULARIES = (8192, 49152, 131072, 262144)
LENGTHS = (128, 512, 1024, 2048)
GOAL = (49152, 1024)
"""Where the kernel must be no slower than the naive version."""
EXACT = "float64"
"""The version that both are compared with: the naive one in float64, some rows at a time."""
PATIENCE = 20.0
"""Seconds that one version may take in all in one cell, beyond its first call."""


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """One cell: times of both versions, or the extra memory of one of them.

    Args:
        settings: ``vocab``, ``tokens``, ``dim``, ``precision``, ``loss``, ``threads``, and either
            ``repeats`` or ``version`` (``iqstar``, ``naive``), whose memory is measured.
    """
    import torch

    torch.set_num_threads(settings["threads"])
    if "version" in settings:
        return {"extra_mib": _extra(settings)}
    calls = {name: case(settings, name) for name in ("naive", "iqstar")}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gradients: dict[str, tuple] = {}
    for _ in range(1 + settings["repeats"]):
        for name, call in calls.items():
            if sum(seconds[name]) > PATIENCE and len(seconds[name]) > 1:
                continue
            started = time.perf_counter()
            gradients[name] = call()
            seconds[name].append(time.perf_counter() - started)
    exact = case(settings, EXACT)()
    return {
        **{name: found[1:] for name, found in seconds.items()},
        "gradient_difference": _apart(gradients["iqstar"], gradients["naive"]),
        "gradient_error": {name: _apart(found, exact) for name, found in gradients.items()},
    }


def _apart(some: tuple, others: tuple) -> dict[str, float]:
    """Norm of the difference relative to that of the others, of each gradient."""
    pairs = zip(("hidden", "weight"), some, others, strict=True)
    return {name: float((a - b).norm() / b.norm()) for name, a, b in pairs}


def case(settings: dict[str, Any], version: str) -> Callable[[], tuple]:
    """A forward and backward pass of one version, which returns hidden's and weight's gradient."""
    import torch
    from torch.nn.functional import linear

    from iqstar.distributions import HeadDistributions
    from iqstar.head import LanguageHead, head_loss
    from iqstar.losses import DistributionImitationLoss, RewardImitationLoss
    from iqstar.mdp import TokenCredits

    vocab, tokens, dim = (settings[k] for k in ("vocab", "tokens", "dim"))
    bf16 = settings["precision"] == "bf16-mixed"
    full = settings["loss"] == "distribution"
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=random).mul_(scale)

    hidden = normal(tokens, dim).requires_grad_()
    weight = normal(vocab, dim, scale=dim**-0.5).requires_grad_()
    frozen_hidden = hidden.detach() + normal(tokens, dim, scale=0.1)
    frozen_weight = weight.detach().to(torch.bfloat16) if bf16 else weight.detach().clone()
    actions = torch.randint(vocab, (tokens,), generator=random)
    reference, credit = normal(tokens) - 10, normal(tokens)

    def ours() -> torch.Tensor:
        target = HeadDistributions(
            frozen_hidden, LanguageHead(weight=frozen_weight, vocab_size=vocab)
        )
        ones = torch.ones(tokens)
        given = TokenCredits(actions=actions, reference=reference, credit=credit, weight=ones)
        loss = DistributionImitationLoss() if full else RewardImitationLoss()

        def token_loss(
            logits: torch.Tensor, index: torch.Tensor, aim: torch.Tensor | None
        ) -> tuple:
            return loss.per_token(logits, given[index], aim)

        head = LanguageHead(weight=weight, vocab_size=vocab)
        return head_loss(hidden, head, token_loss, target.logprobs if full else None)[0]

    def naive(rows: slice = slice(None), wide: torch.dtype = torch.float32) -> torch.Tensor:
        logprobs = linear(hidden[rows], weight).to(wide).log_softmax(-1)
        if full:
            with torch.no_grad():
                target = linear(frozen_hidden[rows], frozen_weight).to(wide).log_softmax(-1)
            return (logprobs.exp() * (logprobs - target)).sum()
        implied = logprobs.gather(-1, actions[rows, None])[:, 0] - reference[rows]
        return (0.5 * (implied - credit[rows]) ** 2).sum()

    if version == EXACT:
        hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
        frozen_hidden, frozen_weight = frozen_hidden.double(), frozen_weight.double()

    def call() -> tuple:
        hidden.grad = weight.grad = None
        if version == EXACT:
            for start in range(0, tokens, 64):
                naive(slice(start, start + 64), torch.float64).backward()
            return hidden.grad, weight.grad
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = ours() if version == "iqstar" else naive()
        total.backward()
        return hidden.grad, weight.grad

    return call


def _extra(settings: dict[str, Any]) -> float:
    """MiB at the peak of one call, beyond its inputs and the weight's gradient."""
    import memory

    version = settings["version"]
    case({**settings, "vocab": 1024, "tokens": 32}, version)()  # libraries set themselves up
    call = case(settings, version)
    memory.reset_peak()
    before = memory.resident()[0]
    _, gradient = call()
    return (memory.peak()[0] - before - gradient.nbytes) / 2**20


def fits(vocab: int, tokens: int) -> bool:
    """Whether six arrays of all logits, as the naive version may hold, fit into free memory."""
    import psutil

    return 6 * 4 * vocab * tokens + 20 * vocab * 576 < 0.9 * psutil.virtual_memory().available


def main() -> None:
    """Measures every cell, a result file for each precision."""
    parser = harness.parser(__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed", "32-true"])
    parser.add_argument("--losses", nargs="+", default=["distribution", "sampled"])
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--dim", type=int, default=576, help="of hidden states")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker)))
        return

    for precision in options.precision:
        measure(precision, options)


def measure(precision: str, options: argparse.Namespace) -> None:
    """Every cell of a precision, and its result file."""

    def run(settings: dict[str, Any], **env: str) -> harness.Sample:
        return harness.run_worker(__file__, settings, options.threads, **env)

    cells, rows = [], []
    common = {"dim": options.dim, "threads": options.threads}
    for loss, vocab, tokens in product(options.losses, options.vocab, options.lengths):
        cell = {**common, "precision": precision, "loss": loss, "vocab": vocab, "tokens": tokens}
        if not fits(vocab, tokens):
            cells.append({**cell, "skipped": "the naive version does not fit into free memory"})
            continue
        found = run({**cell, "repeats": options.rounds})
        small_blocks = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        extra = {
            name: run({**cell, "version": name}, **small_blocks)["extra_mib"]
            for name in ("iqstar", "naive")
        }
        middle = {
            k: harness.medians([{"s": s} for s in found[k]])["s"] for k in ("iqstar", "naive")
        }
        ratio = middle["iqstar"] / middle["naive"]
        cells.append({**cell, **found, "median": middle, "ratio": ratio, "extra_mib": extra})
        errors = found["gradient_error"]
        apart = (found["gradient_difference"], errors["iqstar"], errors["naive"])
        worst = (f"{max(of.values()):.1e}" for of in apart)
        name = f"{precision}, {loss}, {vocab}×{tokens}"
        rows.append([name, *middle.values(), ratio, *extra.values(), *worst])
    columns = ["cell", "s", "naive, s", "ratio", "extra MiB", "naive"]
    columns += ["gradients differ by", "from float64", "naive's from float64"]
    shown = harness.table("Scoring and loss over the head", columns, rows)
    harness.finish(options, f"kernel-{precision}", [shown], cells=cells)


if __name__ == "__main__":
    main()
