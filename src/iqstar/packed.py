"""Weights of linear layers in the layout in which a CPU multiplies few rows by them.

A token of a rollout multiplies a few rows by every matrix of the model. PyTorch hands such products
to libraries that lay the matrix out anew each time, or cannot use all of the processor for so few
rows. Packed once, for all tokens of a rollout, they take about half the time in float32
(docs/decisions/022-packed-weights.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def weights_packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Packs the matrices of a model's linear layers, for products without gradient.

    Only on CPUs, in float32 and bfloat16, and where PyTorch has oneDNN; elsewhere nothing changes.
    Under autocast the packed copies stand in for those that it makes of float32 weights; else they
    take as much memory as the matrices. They are given up at the end. Results differ by rounding.

    Args:
        model: Its weights must not change meanwhile.
        rows: That products will have, for the most part; any other number is served too.
    """
    packed: list[nn.Module] = []
    try:
        for layer in model.modules():
            # A subclass may compute something else, as may a layer whose forward was replaced.
            if type(layer) is nn.Linear and "forward" not in vars(layer):
                forward = _packed_forward(layer, rows)
                if forward is not None:
                    vars(layer)["forward"] = MethodType(forward, layer)
                    packed.append(layer)
        yield
    finally:
        for layer in packed:
            del vars(layer)["forward"]


def _packed_forward(layer: nn.Linear, rows: int) -> Any:
    """A forward pass with the layer's matrix packed as it is now; None where that is not served."""
    dtype = _product_dtype(layer.weight)
    if dtype is None:
        return None
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), rows)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(dtype), weight, bias, "none", [], ""
        )
        return product

    return forward


def _product_dtype(weight: Tensor) -> torch.dtype | None:
    """In which dtype a linear layer multiplies by a weight; None where it cannot be packed."""
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return None  # spread over ranks, or on another device
    dtype = weight.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return dtype if _served(dtype) else None


def _served(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch packs matrices of a dtype on this processor."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32
