"""The trained policy in Hugging Face format, or as a PEFT adapter: whole, or not there at all."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from iqstar.atomic import sync_file, written_beside
from iqstar.chat import ChatFormat
from iqstar.errors import InputError
from iqstar.policy import Policy, PolicySpec
from iqstar.pretrained import quiet_transformers, resolve_model

Dtype = Literal["float32", "bfloat16", "float16"]
SHARD_SIZE = "5GB"
"""Largest file of weights, as transformers writes sizes."""
CARD = "README.md"
TAG = "\n- iqstar\n"
"""In the front matter of the card of every exported folder."""


def export_policy(
    policy: Policy,
    folder: Path,
    *,
    card: str,
    weights: Mapping[str, Tensor] | None = None,
    dtype: Dtype | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> Path:
    """Writes a policy with its tokenizer, chat template, generation config and model card.

    With LoRA, an adapter that PEFT loads onto the base model.

    Args:
        policy: The policy; it is left as it was.
        folder: Where to; what is there is replaced when all has been written.
        card: The text of README.md.
        weights: Those of ``policy.actor.model``, where it does not hold all of them itself.
        dtype: Of the written weights; None for that of the trained ones.
        max_shard_size: Of one file of weights; adapters are one file always.

    Returns:
        The folder.

    Raises:
        InputError: If it cannot be written; what was there before is then left as it was.
    """
    check_shard_size(max_shard_size, "max_shard_size")
    model, chat = policy.actor.model, policy.actor.chat
    adapted = hasattr(model, "peft_config")
    held = model.state_dict() if weights is None else weights
    written = _cast({n: w for n, w in held.items() if not adapted or "lora_" in n}, dtype)
    with _whole_folder(folder) as part, quiet_transformers(bars=False):
        if adapted:
            # Its test for a resized embedding would look the base model up on the hub.
            model.save_pretrained(part, state_dict=written, save_embedding_layers=False)
            edit_json(part / "adapter_config.json", **base_model(policy.spec))
            model.get_base_model().generation_config.save_pretrained(part)
        else:
            untie(written, model.all_tied_weights_keys)
            model.save_pretrained(part, state_dict=written, max_shard_size=max_shard_size)
            if dtype is not None:
                edit_json(part / "config.json", dtype=dtype)
        # Into the file, since transformers refuses to save some models' own settings once changed.
        settings = {"_from_model_config": False, **token_ids(chat)}
        edit_json(part / "generation_config.json", **settings)
        tokenizer = copy.deepcopy(chat.tokenizer)
        if template := chat.jinja():
            tokenizer.chat_template = template
        tokenizer.save_pretrained(part)
        (part / CARD).write_text(card, encoding="utf-8")
    return folder


def token_ids(chat: ChatFormat) -> dict[str, Any]:
    """What ``generate`` must know: every id that ends a response, and the padding."""
    eos = list(chat.eos_ids)
    return {"eos_token_id": eos[0] if len(eos) == 1 else eos, "pad_token_id": chat.pad_id}


def base_model(spec: PolicySpec) -> dict[str, str | None]:
    """What PEFT loads an adapter onto: a hub id with its revision, or a folder."""
    source = resolve_model(spec.model)
    local = Path(source).is_dir()
    name = str(Path(source).resolve()) if local else source
    return {"base_model_name_or_path": name, "revision": None if local else spec.revision}


def check_shard_size(size: str, key: str) -> None:
    """Raises an InputError unless a size is written as transformers reads it."""
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", size, flags=re.IGNORECASE):
        raise InputError(f"{key}: {size!r} is no size; write it like 500MB or {SHARD_SIZE}")


def check_replaceable(folder: Path, key: str, remedy: str) -> None:
    """Raises an InputError where an export would replace something else than an earlier one."""
    if folder.is_dir() and any(folder.iterdir()) and not _is_exported(folder):
        raise InputError(
            f"{key}: {folder} holds something else than an exported model, which would be lost; "
            f"{remedy}"
        )


def _is_exported(folder: Path) -> bool:
    """Whether a folder is ours, and not, say, the base model's."""
    try:
        return TAG in (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def edit_json(file: Path, **values: Any) -> None:
    """Sets top-level keys of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8")) | values
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


def _cast(weights: Mapping[str, Tensor], dtype: Dtype | None) -> dict[str, Tensor]:
    if dtype is None:
        return dict(weights)
    kind = getattr(torch, dtype)
    return {n: w.to("cpu", kind) if w.is_floating_point() else w for n, w in weights.items()}


def untie(weights: dict[str, Tensor], tied: Mapping[str, str]) -> None:
    """Leaves tied weights out: a cast or gathered copy no longer shows that they are one."""
    for name, source in tied.items():
        if source in weights:
            weights.pop(name, None)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside another, which takes its place at the end."""
    try:
        with written_beside(folder) as part:
            part.mkdir()
            yield part
            for file in (f for f in part.rglob("*") if f.is_file()):
                file.chmod(part.stat().st_mode & 0o666)  # safetensors' are private
                sync_file(file)
    except Exception as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        raise InputError(
            f"export: cannot write {folder} ({reason}); nothing of it was left behind. Make room "
            "there or choose another place; iqstar export makes the folder of any checkpoint"
        ) from error


def _write_failure(error: Exception) -> str | None:
    """Why something could not be written, if that is what went wrong."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # Written in Rust; the tokenizers' errors have no class of their own.
    if isinstance(error, SafetensorError) or "os error" in str(error):
        return str(error).partition(": ")[2] or str(error)
    return None
