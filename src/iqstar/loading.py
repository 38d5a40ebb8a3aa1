"""Loads the policy and its frozen models, and checks that their log-probs can be computed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from iqstar import attention
from iqstar.adapters import leave_casts_to_autocast, with_adapters
from iqstar.admission import KNOWN, can_drop_padding, can_share, check_head, check_sampling, silence
from iqstar.allocator import tune_malloc
from iqstar.chat import ChatFormat
from iqstar.errors import InputError
from iqstar.fingerprint import fingerprint
from iqstar.lean import keep_less
from iqstar.policy import AUTOCAST, CausalLM, Policy, PolicySpec
from iqstar.pretrained import load_model


def load_policy(
    spec: PolicySpec, chat: ChatFormat, precision: str = "32-true", reference: bool = True
) -> Policy:
    """Loads the policy, and freezes its reference.

    Args:
        spec: What to load.
        chat: The tokenizer's chat format, from :meth:`PolicySpec.chat`.
        precision: The trainer's; under autocast the matrices of frozen weights are held in its
            dtype, which changes no bit of any product and halves their memory.
        reference: Whether to keep a frozen copy; with adapters there is none anyway.

    Raises:
        InputError: If the model cannot be loaded, or its output head is not understood.
    """
    tune_malloc()
    return make_policy(load_whole(spec, chat), spec, precision, reference)


def load_reference(spec: PolicySpec, chat: ChatFormat, precision: str = "32-true") -> Policy:
    """The policy before any training, for what needs nothing but its reference.

    Arguments as :func:`load_policy`. With adapters or without, the reference is the same model.
    """
    model = load_whole(spec, chat)
    keep_less(model.model)
    _freeze(model, precision)
    return Policy(actor=model, frozen=model, spec=spec)


def make_policy(
    actor: CausalLM, spec: PolicySpec, precision: str = "32-true", reference: bool = True
) -> Policy:
    """The policy and its frozen reference, from a model that is loaded; arguments as above.

    It computes nothing, so the weights may be on the meta device.

    Raises:
        InputError: If autocast does not know the dtype of the weights.
    """
    if spec.dtype == "float64" and precision in AUTOCAST:
        raise InputError(
            f"model.policy.dtype: float64 does not go with trainer.precision: {precision}, which "
            "casts float32 only; set the precision to 64-true or 32-true, or the dtype to float32"
        )
    if spec.lora is not None:
        actor.model.requires_grad_(False)
        _cast_matrices(actor.model, precision)
        actor.model = with_adapters(actor.model, spec.lora)
        if precision in AUTOCAST:
            leave_casts_to_autocast(actor.model)
        keep_less(actor.model, spec.gradient_checkpointing)
        frozen = None
    else:
        keep_less(actor.model, spec.gradient_checkpointing)
        frozen = _frozen_copy(actor, precision) if reference else None
        actor.requires_grad_(True)
    if spec.gradient_checkpointing:
        actor.model.gradient_checkpointing_enable({"use_reentrant": False})
        if spec.lora is not None:
            actor.model.enable_input_require_grads()
    actor.train()
    return Policy(actor=actor, frozen=frozen, spec=spec)


def load_frozen(
    model: str, spec: PolicySpec, policy: ChatFormat, precision: str, key: str
) -> CausalLM:
    """Loads a frozen model beside the policy, as the policy is loaded: on one numeric path.

    Args:
        model: What ``PolicySpec.model`` may be.
        spec: How the policy is loaded. Without a ``chat_template`` the model's own counts, and the
            policy's where it has none, as base models.
        policy: The policy's chat format; both tokenizers must map the same tokens to the same ids.
        precision: The trainer's.
        key: The YAML key that named the model, for messages.

    Raises:
        InputError: If the vocabularies differ.
    """
    spec = spec.beside(model)
    chat = spec.chat(key, otherwise=policy.tokenizer.chat_template)
    ours, theirs = policy.tokenizer.get_vocab(), chat.tokenizer.get_vocab()
    if ours != theirs:
        differing = len(set(ours.items()) ^ set(theirs.items()))
        raise InputError(
            f"{key}: the vocabulary of {model!r} ({len(theirs)} tokens) differs from the policy's "
            f"({len(ours)} tokens) in {differing} entries, so their log-probs are not comparable; "
            "choose a model of the same family, or leave the key out to use the reference itself"
        )
    if chat.vocab_size != policy.vocab_size:
        raise InputError(
            f"{key}: {model!r} has {chat.vocab_size} rows of output for its vocabulary, the policy "
            f"{policy.vocab_size}, though their tokenizers agree; resize the smaller one's "
            "embeddings (resize_token_embeddings) and save it anew"
        )
    frozen = load_whole(spec, chat, key)
    keep_less(frozen.model)
    _freeze(frozen, precision)
    return frozen


def load_whole(spec: PolicySpec, chat: ChatFormat, key: str = "model.policy.model") -> CausalLM:
    """The model as it comes, without its noise in training: scoring and sampling must agree.

    Args:
        spec: What to load; its adapters are not put on.
        chat: Its chat format.
        key: The YAML key that named it, for messages.
    """
    if spec.attn_implementation == attention.NAME:
        attention.register()
    later = spec.attn_implementation not in (None, *KNOWN)
    model = load_model(
        spec.model,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=None if later else spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
        revision=spec.revision,
        key=key,
    )
    silence(model)
    lm = CausalLM(model, chat)
    check_head(lm, key)
    check_sampling(lm, key)
    if later:
        _switch_attention(lm, str(spec.attn_implementation))
    lm.sharing, lm.padding_free = (  # both are tried out on a model that does neither
        spec.share_prefixes and not spec.gradient_checkpointing and can_share(lm),
        spec.padding_free and can_drop_padding(lm),
    )
    lm.fingerprint = fingerprint(model)
    return lm


def _switch_attention(lm: CausalLM, name: str) -> None:
    """Takes an attention that the checks above cannot run: on a GPU, and in 16 bits, only."""
    try:
        lm.model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model.policy.attn_implementation: {name} cannot be used ({reason}); install its "
            f"package, or take one of {', '.join(KNOWN)}"
        ) from error


def _frozen_copy(actor: CausalLM, precision: str) -> CausalLM:
    """Under autocast its matrices are cast as they are copied: never is all of it held twice."""
    weights = [p for m in _matrices(actor.model) for p in m.parameters(recurse=False)]
    dtype = AUTOCAST.get(precision)
    cast: dict[int, Any] = {}  # what deepcopy takes for copied already
    if dtype is not None:
        cast = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in weights}
    frozen = copy.deepcopy(actor, cast)
    _freeze(frozen, precision)
    return frozen


def _freeze(model: CausalLM, precision: str) -> None:
    model.requires_grad_(False)
    model.eval()
    _cast_matrices(model.model, precision)


def _cast_matrices(model: nn.Module, precision: str) -> None:
    """Holds frozen matrices in autocast's dtype; embeddings, norms and tied heads stay as they are.

    Autocast would cast them at every product, to the same bits.
    """
    if (dtype := AUTOCAST.get(precision)) is not None:
        for module in _matrices(model):
            module.to(dtype)


def _matrices(model: nn.Module) -> list[nn.Module]:
    """The layers whose products autocast takes in its dtype."""
    from transformers.pytorch_utils import Conv1D

    tied: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    return [layer for layer in layers if layer.weight is not tied]
