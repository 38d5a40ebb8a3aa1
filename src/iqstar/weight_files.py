"""The policy's weights of this moment as files that another program loads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from iqstar.errors import InputError
from iqstar.export import SHARD_SIZE, Dtype, untie
from iqstar.policy import CausalLM
from iqstar.pretrained import quiet_transformers
from iqstar.sharding import full_state_dict, is_sharded

_MEMORY = Path("/dev/shm")


@torch.no_grad()
def effective_weights(actor: CausalLM) -> dict[str, Tensor]:
    """What the policy computes with, by the names of the plain model; the policy is left alone.

    Adapters are merged: W + scale · B A, the sum in float32, kept in main memory. Sharded weights
    are gathered there, on rank 0; other ranks get nothing, and must call this all the same.

    Raises:
        InputError: If there are adapters on other than linear layers.
    """
    adapted = hasattr(actor.model, "peft_config")
    prefix = "model.base_model.model." if adapted else "model."
    state = full_state_dict(actor) if is_sharded(actor) else actor.state_dict()
    weights = {name.removeprefix(prefix): tensor.detach() for name, tensor in state.items()}
    return _merged(weights, actor.plain) if adapted and weights else weights


def _merged(weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    layers = dict(model.named_modules())
    merged = {}
    for name, tensor in weights.items():
        owner, is_base, kind = name.partition(".base_layer.")
        if is_base and kind == "weight":
            merged[f"{owner}.weight"] = (
                tensor.float() + _delta(weights, owner, layers[owner])
            ).cpu()
        elif is_base:
            merged[f"{owner}.{kind}"] = tensor
        elif ".lora_" not in name:
            merged[name] = tensor
    return merged


def _delta(weights: Mapping[str, Tensor], owner: str, layer: Any) -> Tensor:
    """What the adapters of a layer add to its weight."""
    (adapter,) = layer.active_adapters
    pair = [weights.get(f"{owner}.lora_{side}.{adapter}.weight") for side in "AB"]
    if pair[0] is None or pair[1] is None:
        raise InputError(
            f"model.policy.lora.target_modules: {owner} is not a linear layer, and only adapters "
            "of those can be merged for a rollout server; leave it out, or use GenerateRollout"
        )
    delta = pair[1].float() @ pair[0].float() * layer.scaling[adapter]
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


@contextmanager
def weight_folder(
    actor: CausalLM, weights: dict[str, Tensor], dtype: Dtype, parent: str | None, key: str
) -> Iterator[Path]:
    """A folder with weights in Hugging Face format, which is gone at the end of the block.

    Args:
        actor: The policy.
        weights: Its effective weights; they are given up when they have been written.
        dtype: In which they are written.
        parent: Where; None for shared memory (``/dev/shm``) if it has room, else the temporary
            folder.
        key: The YAML key that names ``parent``, for messages.

    Raises:
        InputError: If they cannot be written.
    """
    model, kind = actor.plain, getattr(torch, dtype)
    written = {n: w.to("cpu", kind if w.is_floating_point() else None) for n, w in weights.items()}
    untie(written, model.all_tied_weights_keys)
    parent = parent or _roomy(sum(w.nbytes for w in written.values()))
    try:
        folder = Path(tempfile.mkdtemp(prefix="iqstar-weights-", dir=parent))
    except OSError as error:
        raise _cannot_write(key, parent, error) from error
    try:
        try:
            with quiet_transformers(bars=False):
                model.save_pretrained(folder, state_dict=written, max_shard_size=SHARD_SIZE)
        except (OSError, SafetensorError) as error:
            raise _cannot_write(key, parent, error) from error
        written.clear()
        weights.clear()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _roomy(size: int) -> str:
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * size:
        return str(_MEMORY)
    return tempfile.gettempdir()


def _cannot_write(key: str, parent: str, error: Exception) -> InputError:
    return InputError(
        f"{key}: the weights for vLLM cannot be written to {parent} ({error}); "
        "make room there, or name another folder that the vLLM server can read"
    )
