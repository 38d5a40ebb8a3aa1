"""The identity of a model's weights, so that a checkpoint can name those that it leaves out."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights; tied ones count once.

    Args:
        model: A whole model: not sharded, no adapters.
    """
    with ThreadPoolExecutor() as pool:  # hashlib and copies release the interpreter's lock
        parts = list(pool.map(_digest, *zip(*model.named_parameters(), strict=True)))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _digest(name: str, weight: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
    data = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
    digest.update(data.numpy().data)
    return digest.digest()
