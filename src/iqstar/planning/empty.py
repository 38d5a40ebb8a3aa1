"""Models without contents, and how many bytes their weights have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iqstar import attention
from iqstar.chat import ChatFormat
from iqstar.errors import InputError
from iqstar.loading import make_policy
from iqstar.planning.footprint import Weights
from iqstar.policy import CausalLM, Policy, PolicySpec
from iqstar.sharding import transformer_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Precisions under which Lightning converts all weights."""


class _Vocabulary(ChatFormat):
    """All of a chat format that a model without contents needs."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size


def empty_policy(
    spec: PolicySpec,
    config: PretrainedConfig,
    precision: str,
    reference: bool = True,
    held: str | None = None,
) -> Policy:
    """A policy and, where it is kept, its reference, on the meta device.

    Args:
        spec: How it is loaded.
        config: Its architecture.
        precision: The trainer's.
        reference: Whether there is one.
        held: In which precision that is held, if not in the trainer's.
    """
    from transformers import AutoModelForCausalLM

    if spec.attn_implementation == attention.NAME:
        attention.register()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, spec.dtype),
                attn_implementation=spec.attn_implementation,
                trust_remote_code=spec.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise InputError(f"model.policy: the model cannot be built: {error}") from error
    chat = _Vocabulary(config.get_text_config().vocab_size)
    with torch.device("meta"):
        policy = make_policy(CausalLM(model, chat), spec, held or precision, reference)
    for lm in (policy.actor, policy.frozen):
        if lm is not None and precision in TRUE:
            lm.to(TRUE[precision])
    return policy


def weights_of(
    model: nn.Module, chosen: Callable[[Tensor], Tensor | None] = lambda p: p
) -> Weights:
    """Bytes of a model's weights, or of what ``chosen`` makes of each."""
    blocks = [_bytes(block, chosen) for block in transformer_blocks(model)]
    total = _bytes(model, chosen)
    return Weights(blocks=sum(blocks), block=max(blocks), rest=total - sum(blocks))


def _bytes(module: nn.Module, chosen: Callable[[Tensor], Tensor | None]) -> int:
    return sum(t.nbytes for p in module.parameters() if (t := chosen(p)) is not None)


def packed_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Bytes of the matrices that generating packs on a CPU, in float32 (:mod:`iqstar.packed`)."""
    if dtype is not None:
        return 0
    matrices = (m.weight for m in model.modules() if type(m) is nn.Linear)
    return sum(w.nbytes for w in matrices if w.dtype == torch.float32)


def cast_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Bytes of the copies in its dtype that autocast keeps of a model's trained matrices."""
    from transformers.pytorch_utils import Conv1D

    if dtype is None:
        return 0
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    weights = {p for m in layers for p in m.parameters(recurse=False)}
    trained = [p for p in weights if p.requires_grad and p.dtype == torch.float32]
    return sum(p.numel() for p in trained) * dtype.itemsize
