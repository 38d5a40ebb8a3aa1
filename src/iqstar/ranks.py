"""What the processes of a run agree on; with one process, each function is the identity.

Every rank must make the same calls in the same order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def world_size() -> int:
    """Number of processes of this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def global_sum(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, on the tensor's device."""
    return _reduced(value, distributed.ReduceOp.SUM)


def global_max(value: int, device: torch.device) -> int:
    """Largest of the ranks' numbers.

    Args:
        value: This rank's.
        device: Of the run; the process group's back-end works on no other.
    """
    if world_size() == 1:
        return value
    return int(_reduced(torch.tensor(value, device=device), distributed.ReduceOp.MAX))


def gather(value: T) -> list[T]:
    """The ranks' objects, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    distributed.all_gather_object(values, value)
    return values


def _reduced(value: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total, op=operation)
    return total


def even_spans(
    total: int, size: int, device: torch.device, empty: bool = False
) -> list[tuple[int, int]]:
    """Start and stop of spans of about equal length, at most ``size`` if possible.

    Every rank gets equally many, so that each makes as many forward passes as the others, which
    sharded models need.

    Args:
        total: This rank's number of items, at least 1.
        size: Largest length of a span.
        device: Of the run.
        empty: Whether a rank with few items may get empty spans; otherwise those of the others
            may become longer than ``size``.
    """
    parts = global_max(-(-total // size), device)
    if not empty:
        parts = min(parts, -global_max(-total, device))
    return list(pairwise(total * k // parts for k in range(parts + 1)))
