"""Linear layers that do not keep their input where it is cheap to compute again.

The gradient of a weight needs the layer's input. Where that is the result of a norm or of a gated
activation, what it follows from is kept anyway, so a linear layer keeps how it is computed again
(:func:`follows_from`), not the input; nor does it keep the weight's copy in autocast's dtype. The
forward pass gives the same bits, and under autocast layers that read one tensor share its cast
(docs/decisions/021-lean-layers.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from iqstar.precision import product_dtype

_CAST = "iqstar_cast"
"""Note on a tensor that was cast: the cast."""
_ORIGIN = "iqstar_origin"
"""Note on a tensor that is cheap to compute: its recipe and what that needs."""


class Recipe:
    """How a tensor is computed again; those that read it share the result.

    The first one in the backward pass computes it, the last one lets it go (or the graph does, if
    the result of some reader is not used). A recipe holds no tensor before, so that a checkpointed
    layer keeps none by it.

    Args:
        compute: From the tensors that it follows from.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute = compute
        self._readers = 0
        self._made: Tensor | None = None

    def expect_reader(self) -> None:
        """Counts one call of :meth:`make` that will come."""
        self._readers += 1

    def make(self, origin: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The tensor.

        Args:
            origin: What it follows from.
            dtype: In which it is wanted.
        """
        made = self._made
        if made is None or made.dtype != dtype:
            made = self._compute(*origin).to(dtype)
        self._readers -= 1
        self._made = made if self._readers > 0 else None
        return made


def follows_from(tensor: Tensor, compute: Callable[..., Tensor], *origin: Tensor) -> Tensor:
    """Notes on a tensor how it is computed again, for linear layers that read it.

    Args:
        tensor: The tensor.
        compute: Gives the same bits from ``origin``, quickly and without a draw.
        origin: Tensors that the backward pass keeps anyway.

    Returns:
        The tensor itself.
    """
    if tensor.requires_grad:
        _note(tensor, _ORIGIN, (Recipe(compute), origin))
    return tensor


def _note(tensor: Tensor, name: str, what: Any) -> None:
    setattr(tensor, name, (_version(tensor), what))


def _noted(tensor: Tensor, name: str) -> Any:
    """What was noted on a tensor, or on one that it is a view of, if it is what it was."""
    version, what = getattr(tensor, name, (None, None))
    if what is not None:
        return what if version == _version(tensor) else None
    whole = tensor._base  # FSDP hands some layers their input in a view
    if whole is None or (whole.shape, whole.stride()) != (tensor.shape, tensor.stride()):
        return None
    return _noted(whole, name)


def _version(tensor: Tensor) -> int:
    """Counts changes in place; of inference tensors nobody does."""
    return 0 if tensor.is_inference() else tensor._version


def linear(layer: nn.Linear, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
    """The forward pass of a linear layer: x·Wᵀ + b.

    Args:
        layer: The layer.
        x: Its input.
    """
    read = cast_once(x)
    if torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad):
        output: Tensor = _Linear.apply(x, read, layer.weight, layer.bias, _noted(x, _ORIGIN))
        return output
    return nn.functional.linear(read, layer.weight, layer.bias)


def checkpointed_linear(
    layer: nn.Linear, x: Float[Tensor, "*rows inputs"]
) -> Float[Tensor, "*rows outputs"]:
    """As :func:`linear`, in a layer that is computed again as a whole: with gradient, as ever.

    PyTorch stops computing a checkpointed layer again once it has all that is kept; of its last
    product it needs the inputs only, where our function would have to be through with it.

    Args:
        layer: The layer.
        x: Its input.
    """
    read = x if torch.is_grad_enabled() else cast_once(x)
    return nn.functional.linear(read, layer.weight, layer.bias)


def cast_once(x: Tensor) -> Tensor:
    """Under autocast, a tensor's cast without gradient; all who ask share it.

    The cast goes with the tensor, as long as that lives. What needs no cast stays as it is.

    Args:
        x: What a product reads.
    """
    dtype = product_dtype(x)
    if x.dtype == dtype:
        return x
    cast: Tensor | None = _noted(x, _CAST)
    if cast is None or cast.dtype != dtype:
        cast = x.detach().to(dtype)
        _note(x, _CAST, cast)
    return cast


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b; keeps W, and x only if it has no recipe.

    The gradients of layers that share a cast add up in the dtype of x, as autocast's do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        read: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        origin: tuple[Recipe, tuple[Tensor, ...]] | None,
    ) -> Tensor:
        ctx.recipe = None
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[2]:
            kept = (read,)
            if origin is not None:
                ctx.recipe, kept = origin
                ctx.recipe.expect_reader()
        ctx.save_for_backward(weight, *kept)
        ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return nn.functional.linear(read, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(ctx.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[2]:
            x = kept[0] if ctx.recipe is None else ctx.recipe.make(tuple(kept), grad.dtype)
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_weight, grad_bias, None
