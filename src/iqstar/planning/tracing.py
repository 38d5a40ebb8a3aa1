"""Runs code on tensors without contents, and counts the bytes and FLOPs it would take.

PyTorch's fake tensors have a shape, a dtype and a device, but no memory: a 13B model takes
megabytes and a training step seconds. What autograd keeps, what autocast casts and what gradient
checkpointing computes anew is thus found by running it, not by a formula for each architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operation → its FLOPs: PyTorch's table of products, and attention on CPUs, which it lacks.

Causal attention is counted in full."""


class Trace(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are still alive, and their maximum.

    Args:
        known: Tensors from before, which do not count, nor do views of them.

    Attributes:
        live: Bytes alive now.
        peak: Their maximum since the start, or since it was set.
        flops: Floating-point operations of all products so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return output

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self._free, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made inside are fake ones on the CPU, whose kernels decide what is computed."""
    with FakeTensorMode():
        yield


def fake_weights(*models: nn.Module) -> None:
    """Replaces weights and buffers, such as those on the meta device, by fake ones, in place.

    To be called inside of :func:`without_memory`. Tensors that are shared stay shared.
    """
    made: dict[Tensor, Tensor] = {}
    for module in (m for model in models for m in model.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if tensor not in made:
                        made[tensor] = _fake(tensor)
                    tensors[name] = made[tensor]  # type: ignore[assignment]


def _fake(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
