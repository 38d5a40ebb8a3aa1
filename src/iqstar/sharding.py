"""Fully sharded models (FSDP2): each transformer block, and the rest, spread over the ranks.

A block's weights are whole on a rank only while it computes. The rest of a model (embeddings,
last norm, output head) is gathered at its first use and stays whole until the backward pass, so
that the losses, which need the head's weight, may use it after the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from iqstar.errors import InputError
from iqstar.ranks import global_max


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of any decoder: the members of the module list that holds most weights.

    Raises:
        InputError: If the model has no module list.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"trainer.strategy: {type(model).__name__} has no list of transformer blocks to shard; "
            "use ddp for this model"
        )
    return [*max(lists, key=_bytes)]


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    methods: tuple[str, ...],
    offload: bool = False,
    dtype: torch.dtype | None = None,
) -> int:
    """Spreads a model's weights over a device mesh, in place; they move to the mesh's device.

    Args:
        model: A module around a decoder. Weights of one block, and those outside of the blocks,
            are gathered together.
        mesh: One-dimensional.
        methods: Names of the model's methods, besides ``forward``, that run it.
        offload: Keep the shards in main memory, and copy them to the device when gathered.
        dtype: Autocast's. Trained matrices are gathered in it, which halves what is sent and
            held and changes no bit: autocast would cast them at every product.

    Returns:
        Bytes of all blocks when they are gathered.
    """
    gathered = 0
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for block in transformer_blocks(model):
        gathered += _bytes(block)
        if dtype is not None and (matrices := _trained_matrices(block)):
            weights = [p for m in matrices for p in m.parameters()]
            gathered -= sum(p.numel() * max(p.itemsize - dtype.itemsize, 0) for p in weights)
            mixed = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            fully_shard(matrices, mesh=mesh, mp_policy=mixed, offload_policy=policy)
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy, reshard_after_forward=False)
    for name in methods:
        register_fsdp_forward_method(model, name)
    return gathered


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _trained_matrices(block: nn.Module) -> list[nn.Module]:
    """The linear layers of a block, if all are trained; beside adapters they are frozen."""
    linear: list[nn.Module] = [m for m in block.modules() if isinstance(m, nn.Linear)]
    return linear if all(p.requires_grad for m in linear for p in m.parameters()) else []


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was applied to a model."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole_blocks(model: nn.Module, size: int, device: torch.device) -> Iterator[bool]:
    """All blocks gathered, once, for many forward passes; inside one of the model's methods.

    Where the memory of a rank's GPU does not allow it, blocks are gathered at every forward pass
    as ever, and all ranks must make equally many.

    Args:
        model: A model, sharded or not.
        size: What :func:`shard` returned.
        device: Where the model computes.

    Yields:
        Whether forward passes need no communication, so that ranks may make different numbers.
    """
    blocks = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    if not is_sharded(model) or not blocks:
        yield True
        return
    if not _fit(size, device):
        yield False
        return
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield True
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
            block.reshard()


def _fit(size: int, device: torch.device) -> bool:
    """Whether all ranks have room for so many bytes and, as a margin, half as many again."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return not global_max(int(size * 1.5 > free), device)


def give_up_gathered(model: nn.Module) -> None:
    """Leaves of a sharded model only what this rank holds for good; of others nothing changes.

    What a forward pass gathered last stays gathered, where no backward pass follows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is the same on all ranks, gathered if it is spread over them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's whole weights in main memory, on rank 0; empty on other ranks. All must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state
