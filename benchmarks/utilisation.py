"""How near the update comes to the rate at which its own matrix products run alone.

The update is all that follows the rollout: frozen scorings, forward and backward pass, heads, and
the optimiser's step. Its products (op, shapes, dtype, layout) are recorded once; then, in the same
process and in turn, updates are timed and each product is timed alone:

    python benchmarks/utilisation.py --rounds 5

Utilisation = Σ seconds of the products alone / seconds of the update. Only products that were
executed count: the floating-point operations are those of the recorded shapes, the rate of
products is their sum over the sum of their seconds alone, thus weighted by these operations.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import harness
from iqstar.allocator import allow_huge_pages

SIDES = {"principle": {}, "contrastive": {}, "principle, LoRA 8": {"lora": 8}}
TEXT = "It depends on the weather, on the season and on how far you would like to walk that day. "


def flops(shapes: tuple) -> int:
    """Floating-point operations of ``(…, m, k) @ (k, n)`` or ``(b, m, k) @ (b, k, n)``."""
    left, right = shapes
    count = 2 * right[-1]
    for size in left:
        count *= size
    return count


def recorder() -> Any:
    """A mode that counts the matrix products that are executed under it, in ``products``."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    # Where each op has its factors.
    factors = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1, aten._int_mm: 0}

    class Products(TorchDispatchMode):
        """See above."""

        def __init__(self) -> None:
            super().__init__()
            self.products: Counter[tuple] = Counter()
            self.attention = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            first = factors.get(func.overloadpacket)
            if first is not None:
                pair = args[first : first + 2]
                shapes = tuple(tuple(t.shape) for t in pair)
                strides = tuple(t.stride() for t in pair)
                self.products[shapes, strides, str(pair[0].dtype)] += 1
            elif "attention" in func.name():
                self.attention += 1
            return func(*args, **(kwargs or {}))

    return Products()


def alone(product: tuple, repeats: int) -> float:
    """Median seconds of one product alone, on operands of its shapes and layout."""
    import torch

    shapes, strides, dtype = product
    kind = getattr(torch, dtype.removeprefix("torch."))
    pair = []
    for shape, stride in zip(shapes, strides, strict=True):
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        pair.append(torch.randn(size).to(kind).as_strided(shape, stride))
    multiply = torch.bmm if len(shapes[0]) == 3 else torch.mm
    multiply(*pair)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        multiply(*pair)
        seconds.append(time.perf_counter() - started)
    return harness.medians([{"s": s} for s in seconds])["s"]


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains on fixed responses; times updates, and their products before and after.

    Args:
        settings: ``prompts``, ``tokens``, ``steps``, ``precision``, ``estimator``, ``model``,
            ``threads``, and where it applies ``lora``.
    """
    allow_huge_pages()  # as the command does, before torch is imported
    import tempfile
    from pathlib import Path

    import torch
    from lightning.pytorch import Callback, Trainer

    from iqstar import InverseQStar, LoRASpec, PolicySpec
    from iqstar.data import JSONL
    from iqstar.estimators import ContrastiveEstimator, PrincipleEstimator
    from iqstar.rollouts import DatasetRollout
    from step_iqstar import ANTIPRINCIPLE, PRINCIPLE

    torch.set_num_threads(settings["threads"])
    mode, updates = recorder(), []
    record = 1  # the step that is recorded, after one that warms up

    class Update(Callback):
        """Records one step and times those after it."""

        def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
            if trainer.global_step == record:
                mode.__enter__()
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            updates.append(time.perf_counter() - self.started)
            if trainer.global_step == record + 1:
                mode.__exit__(None, None, None)

    lora = settings.get("lora")
    estimator = (
        PrincipleEstimator(PRINCIPLE)
        if settings["estimator"] == "principle"
        else ContrastiveEstimator(PRINCIPLE, ANTIPRINCIPLE)
    )
    module = InverseQStar(
        PolicySpec(
            model=settings["model"],
            attn_implementation="grouped",
            lora=LoRASpec(rank=lora, alpha=2 * lora) if lora else None,
        ),
        estimator,
        rollout=DatasetRollout(max_new_tokens=settings["tokens"]),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        rows = ({"prompt": t, "response": TEXT * 9} for t in settings["texts"])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = JSONL(str(file), batch_size=settings["prompts"], val_prompts=0, shuffle=False)
        trainer = Trainer(
            precision=settings["precision"],
            max_steps=record + 1 + settings["steps"],
            **harness.TRAINER,
            callbacks=[Update()],
        )
        trainer.fit(module, datamodule=data)
    if mode.attention:
        raise SystemExit("fused attention has products that are not recorded; choose another")
    update = harness.medians([{"s": s} for s in updates[record + 1 :]])["s"]
    rates = {p: alone(p, settings["repeats"]) for p in mode.products}
    ideal = sum(count * rates[p] for p, count in mode.products.items())
    work = sum(count * flops(p[0]) for p, count in mode.products.items())
    largest = sorted(mode.products, key=lambda p: -mode.products[p] * rates[p])[:12]
    return {
        "update": update,
        "products": ideal,
        "gflop": work / 1e9,
        "gflop_per_second": work / ideal / 1e9,
        "utilisation": ideal / update,
        "largest": [
            {
                "shapes": p[0],
                "dtype": p[2],
                "count": mode.products[p],
                "seconds": mode.products[p] * rates[p],
                "gflop_per_second": flops(p[0]) / rates[p] / 1e9,
            }
            for p in largest
        ],
    }


def main() -> None:
    """Measures every side in turn, for each precision."""
    parser = harness.parser(__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed", "32-true"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help=" | ".join(SIDES))
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--tokens", type=int, default=48, help="of every response")
    parser.add_argument("--steps", type=int, default=3, help="updates timed in each process")
    parser.add_argument("--repeats", type=int, default=5, help="of each product alone")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker)))
        return
    keys = ("prompts", "tokens", "steps", "repeats", "threads", "model")
    shape = {k: getattr(options, k) for k in keys}
    texts = harness.prompts(options.data, options.prompts * (options.steps + 2))
    for precision in options.precision:
        common = {**shape, "precision": precision, "texts": texts}
        sides = {
            f"{name}, {precision}": {**common, **SIDES[name], "estimator": name.partition(",")[0]}
            for name in options.sides
        }
        samples = harness.alternate(
            sides, options.rounds, lambda s: harness.run_worker(__file__, s, options.threads)
        )
        table = {
            name: harness.medians([{k: v for k, v in s.items() if k != "largest"} for s in found])
            for name, found in samples.items()
        }
        columns = ("update", "products", "gflop", "gflop_per_second", "utilisation")
        rows = [[name, *(row[c] for c in columns)] for name, row in table.items()]
        titles = ["side", "update, s", "its products alone, s", "GFLOP", "GFLOP/s", "utilisation"]
        shown = harness.table("Utilisation", titles, rows)
        harness.finish(options, f"utilisation-{precision}", [shown], table=table, samples=samples)


if __name__ == "__main__":
    main()
