"""Layers that keep less for their backward pass, and compute as before.

autograd keeps the inputs and results of every small operation of a norm and of a gated activation,
and for each linear layer its input, under autocast as a copy of its own, beside one of the weight:
half of all activations. Here a norm keeps its input, a gated activation its two factors, and a
linear layer that reads their results nothing (:mod:`iqstar.recomputed`); what else the backward
pass needs it computes again. The forward pass gives the same bits, the gradient differs by rounding
(docs/decisions/021-lean-layers.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from iqstar.recomputed import checkpointed_linear, follows_from, linear

Forward = Callable[[Any, Tensor], Tensor]
"""A layer's forward pass: (the layer, its input) → its output."""
_FACTORS = ("gate_proj", "up_proj", "down_proj")
"""The linear layers of a gated activation, as all architectures with separate ones name them."""
_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
)
"""Of weights and inputs that are tried; the last one is a norm's under autocast."""


def keep_less(model: nn.Module, checkpointed: bool = False) -> None:
    """Replaces the forward pass of layers that compute as ours do, in place.

    What a norm or an activation computes is tried out on small tensors, so that an architecture
    with another one stays as it is. The weights may be on the meta device.

    Args:
        model: With its adapters, if it has some.
        checkpointed: Whether its blocks are computed again as a whole.
    """
    for layer in model.modules():
        forward = _same_as(layer)
        if forward is linear and checkpointed:
            forward = checkpointed_linear
        if forward is not None:
            layer.forward = MethodType(forward, layer)


class _RMSNorm(torch.autograd.Function):
    """weight · x / √(mean x² + eps), in float32; keeps x."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*rows dim"], weight: Float[Tensor, " dim"], eps: float
    ) -> tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows 1"]]:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return _scaled(x, weight, scale), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x.to(torch.float32) * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = grad.to(torch.float32) * weight.to(torch.float32)
        along = torch.linalg.vecdot(grad_x, unit).unsqueeze(-1) / x.shape[-1]
        grad_x = grad_x.addcmul_(unit, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class _Gated(torch.autograd.Function):
    """activation(gate) · up; keeps these two."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _product(activation, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.activation(gate)
        (grad_gate,) = torch.autograd.grad(active, gate, grad * up)
        return grad_gate, active.detach().mul_(grad), None


def _scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)


def _scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    unit = (x.to(torch.float32) * scale).to(x.dtype)
    return unit.mul_(weight) if unit.dtype == weight.dtype else weight * unit


def _product(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    active: Tensor = activation(gate)
    return active.mul_(up)


def _norm(layer: Any, hidden_states: Tensor) -> Tensor:
    weight, eps = layer.weight, layer.variance_epsilon
    if not torch.is_grad_enabled():  # without the overhead, which counts in rollouts
        return _scaled(hidden_states, weight, _scale(hidden_states, eps))
    normed, scale = _RMSNorm.apply(hidden_states, weight, eps)
    return follows_from(normed, _scaled, hidden_states, weight, scale)


def _gated(layer: Any, x: Tensor) -> Tensor:
    gate, up, activation = layer.gate_proj(x), layer.up_proj(x), layer.act_fn
    if torch.is_grad_enabled():
        active = _Gated.apply(gate, up, activation)
        active = follows_from(active, partial(_product, activation), gate, up)
    else:
        active = _product(activation, gate, up)
    output: Tensor = layer.down_proj(active)
    return output


def _same_as(layer: Any) -> Forward | None:
    """Which of our forward passes gives a layer's own bits; None if none does."""
    if type(layer) is nn.Linear:  # a subclass may change its input, or see more of it
        return None if "forward" in vars(layer) else linear
    if hasattr(layer, "variance_epsilon") and list(layer.state_dict()) == ["weight"]:
        small = _like(layer)
        small.weight = nn.Parameter(_numbers(4))
        return _if_agreed(_norm, small, _DTYPES)
    if set(layer._modules) == {*_FACTORS, "act_fn"} and not layer.act_fn.state_dict():
        small = _like(layer)
        for number, name in enumerate(_FACTORS):
            factor = nn.Linear(4, 4, bias=False, device="meta")
            factor.weight = nn.Parameter(_numbers(4, 4) + number)
            setattr(small, name, factor)
        x = _numbers(4)
        alone = layer.act_fn(x).data_ptr() != x.data_ptr()  # its result is overwritten
        return _if_agreed(_gated, small, _DTYPES[:2]) if alone else None
    return None


def _like(layer: Any) -> Any:
    """A layer with another's code and settings, for weights of 4 dimensions."""
    small = copy.copy(layer)
    for kind in ("_parameters", "_modules", "_buffers"):
        setattr(small, kind, dict(getattr(layer, kind)))
    return small


@torch.no_grad()
def _if_agreed(ours: Forward, small: Any, dtypes: Sequence[Any]) -> Forward | None:
    """Ours, if it takes what the layer takes and gives what it gives."""
    own = type(small).forward
    if len(signature(own).parameters) != 2:  # itself and its input
        return None
    for weights, given in dtypes:
        small.to(weights)
        for size in (3.0, 1e-4):  # what is added to a variance shows in small numbers
            x = (size * _numbers(5, 4)).to(given)
            try:
                if not torch.equal(own(small, x), ours(small, x)):
                    return None
            except Exception:  # it takes or does something else
                return None
    return ours


def _numbers(*shape: int) -> Tensor:
    """Numbers of both signs, without a draw: the run's random state is not ours to change."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32, device="cpu") + 1).view(shape)
