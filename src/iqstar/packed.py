"""Weights of linear layers in the layout in which a CPU multiplies few rows by them.

A token of a rollout multiplies a few rows by every matrix of the model. In float32, PyTorch hands
such products to a library that lays the matrix out anew each time. Packed once, for all tokens,
they take half to nine tenths of the time (docs/decisions/022-packed-weights.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from iqstar.recomputed import checkpointed_linear, linear


@contextmanager
def weights_packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Packs the matrices of a model's linear layers, for products without gradient.

    Only float32 on a CPU, outside of autocast, where PyTorch has oneDNN; elsewhere nothing changes.
    The packed copies take as much memory as the matrices, and are given up at the end. Results
    differ by rounding.

    Args:
        model: Its weights must not change meanwhile.
        rows: That products will have, for the most part; any other number is served too.
    """
    packed: list[tuple[nn.Module, Any]] = []
    try:
        for layer in model.modules():
            if packable(layer):
                forward = MethodType(_packed_forward(layer, rows), layer)
                packed.append((layer, vars(layer).get("forward")))
                vars(layer)["forward"] = forward
        yield
    finally:
        for layer, own in packed:
            del vars(layer)["forward"]
            if own is not None:
                vars(layer)["forward"] = own


def packable(layer: nn.Module) -> bool:
    """Whether a layer is a linear one whose products are faster packed."""
    # A subclass may compute something else, as may a layer whose forward others replaced.
    own = vars(layer).get("forward")
    alike = (None, linear, checkpointed_linear)
    if type(layer) is not nn.Linear or getattr(own, "__func__", own) not in alike:
        return False
    weight = layer.weight
    return (
        type(weight) is nn.Parameter  # not spread over ranks
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and _has_operators()
    )


def _has_operators() -> bool:
    """Whether this build of PyTorch has oneDNN, with operators that are not public."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _packed_forward(layer: Any, rows: int) -> Any:
    """A forward pass with the layer's matrix packed as it is now."""
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
        return product

    return forward
