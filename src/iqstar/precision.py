"""Which precision a run gets where none is named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from iqstar.errors import InputError

_SIZE, _ROUNDS = 256, 20


def default_precision(accelerator: str = "auto") -> str:
    """``bf16-mixed`` where bfloat16 products are faster than float32 ones, ``32-true`` elsewhere.

    Args:
        accelerator: The trainer's.
    """
    if torch.cuda.is_available() and accelerator != "cpu":
        fast_gpu = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if fast_gpu else "32-true"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    bf16 = supported is not None and supported() and bfloat16_is_faster()
    return "bf16-mixed" if bf16 else "32-true"


def check_precision(precision: str) -> None:
    """Refuses what cannot train here, and warns of what trains badly.

    Args:
        precision: The trainer's.

    Raises:
        InputError: If it scales losses.
    """
    if precision in ("16", "16-mixed"):
        raise InputError(
            f"trainer.precision: {precision} is not supported, because its loss scaling expects "
            "gradients that overflow, which stop a run here; use bf16-mixed or 32-true"
        )
    if precision in ("bf16-true", "16-true"):
        rank_zero_warn(
            f"trainer.precision: {precision} holds the trained weights in 16 bits too, whatever "
            "model.policy.dtype says; most steps of usual learning rates are rounded away in them. "
            "bf16-mixed multiplies in bfloat16 and trains float32 weights"
        )


def bfloat16_is_faster() -> bool:
    """Tries out matrix products on this processor, for about 50 ms.

    Its flags do not tell: where a virtual machine hides the tile units (AMX), the other bfloat16
    instructions of some processors run at half the speed of float32's. The two differ by factors
    of 0.6 to 6, and the fastest of many small products counts, so that other work on the machine
    does not change the answer.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # no waiting for one that other work holds up
    for _ in range(_ROUNDS):
        for dtype in best:
            matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
            start = time.perf_counter()
            torch.nn.functional.linear(matrix, matrix)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 1.2 * best[torch.bfloat16] < best[torch.float32]


def product_dtype(tensor: Tensor) -> torch.dtype:
    """In which dtype a matrix product reads a tensor here: under autocast in that one's.

    Args:
        tensor: Of floating-point numbers.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


@contextmanager
def casts_kept(device: torch.device) -> Iterator[None]:
    """Under autocast, casts each weight once, not at every product; forgets the casts at the end.

    Lightning turns autocast's cache off, so that a token of a rollout would cast all weights anew.
    For code without gradient, in which no weight changes.

    Args:
        device: Where the products are.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype=dtype, cache_enabled=True):
        try:
            yield
        finally:
            torch.clear_autocast_cache()
