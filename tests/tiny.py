"""Tiny random models and tokenizers, built in memory: what the fast tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Frequent English pairs and triples; they make tokens of several characters, as real ones have.
# fmt: off
_MERGES = (
    ("t", "h"), ("th", "e"), ("i", "n"), ("in", "g"), ("a", "n"), ("an", "d"), ("e", "r"),
    ("o", "u"), ("y", "ou"), ("r", "e"), ("o", "n"), ("i", "s"), ("l", "l"), ("Ġ", "the"),
    ("Ġ", "a"), ("Ġ", "you"), ("Ġ", "i"), ("Ġ", "s"), ("Ġ", "and"),
)
# fmt: on
#: The model's vocabulary is larger than the tokenizer's, as it is for many real models.
VOCAB_SIZE = 320


def tiny_tokenizer(
    chat_template: bool = True, pad: Literal["eos", "own"] | None = "eos"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 280 tokens that encodes and restores any text.

    Ids 0 and 1 are ``<|im_start|>`` (BOS) and ``<|im_end|>`` (EOS); no token is added by encoding.

    Args:
        chat_template: Whether it has a ChatML template (without a default system message).
        pad: ``"eos"`` pads with the EOS token, ``"own"`` with ``<|pad|>``; None has no pad token.
    """
    special = [BOS, EOS, *([PAD] if pad == "own" else [])]
    tokens = [*special, *sorted(ByteLevel.alphabet()), *(a + b for a, b in _MERGES)]
    backend = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(_MERGES)))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token={"eos": EOS, "own": PAD, None: None}[pad],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat_template else None
    return tokenizer


def tiny_model(
    dtype: torch.dtype = torch.float32,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    tie: bool = True,
    **config: Any,
) -> LlamaForCausalLM:
    """A random two-layer Llama of about 30 thousand weights; the global RNG is left alone.

    Args:
        dtype: Of its weights.
        vocab_size: Rows of its embedding; those past the tokenizer's vocabulary are padding.
        seed: Of its weights.
        tie: Whether input and output embeddings are one tensor.
        config: Further fields of ``LlamaConfig``.
    """
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tie,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        # Wide enough that the next-token distributions are far from uniform.
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**fields, **config}))
    return model.to(dtype).eval()


def tiny_folder(
    folder: Path,
    *,
    chat_template: bool = True,
    pad: Literal["eos", "own"] | None = "eos",
    **model: Any,
) -> Path:
    """Saves a tiny model and its tokenizer as a Hugging Face folder and returns that folder."""
    tiny_model(**model).save_pretrained(folder)
    tiny_tokenizer(chat_template, pad).save_pretrained(folder)
    return folder


def reward_folder(folder: Path, pad: int | None = 2, labels: int = 1, **tokenizer: Any) -> str:
    """Saves a random reward model of the tiny model's size and its tokenizer.

    Args:
        folder: Where to.
        pad: The model's pad token; 2 is ``<|pad|>``.
        labels: Numbers that it gives.
        tokenizer: Arguments of :func:`tiny_tokenizer`.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=pad,
        num_labels=labels,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer(**{"pad": "own", **tokenizer}).save_pretrained(folder)
    return str(folder)
