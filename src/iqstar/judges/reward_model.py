"""A reward model: a transformer with one output, trained by somebody on preferences."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from iqstar.chat import fold_system
from iqstar.errors import InputError
from iqstar.judges.base import Judge, check_pairs, warn_once
from iqstar.mdp import Message, Prompt
from iqstar.pretrained import load_tokenizer, loading, resolve_model
from iqstar.templates import jinja_text

KEY = "RewardModelJudge"
"""Named in errors, since any key of a YAML may hold a judge."""
PAIR = "pair"
KIND = "ForSequenceClassification"

Row = Mapping[str, list[int]]


class RewardModelJudge(Judge):
    """The logit of a Hugging Face sequence-classification model with one output.

    Scores have no unit: compare those of one model only. A conversation that is too long loses
    the beginning of its prompt. A response that does not fit by itself has no score: it is never
    cut. Nothing but the tokenizer is loaded before the first response is scored; the model is then
    beside the policy on the same device.

    Args:
        model: A folder or a hub id.
        revision: Of a hub model.
        chat_template: How the conversation is written; null: the tokenizer's own template.
            ``pair`` gives prompt and response to the tokenizer as two texts, which encoders such
            as DeBERTa are trained with. Else Jinja text, or the path of a ``.jinja`` file.
        batch_size: Responses in one forward pass.
        max_length: Tokens of a conversation; null takes what the model can read.
        dtype: Of the weights and of the computation, whatever ``trainer.precision`` is.
        device: ``auto`` takes the process's GPU if there is one, else the CPU.
        trust_remote_code: Run code that a hub model ships.

    Raises:
        InputError: If there is no such model, or it is not one that gives one number.
    """

    name = "reward_model"

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        chat_template: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        for key, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise InputError(f"{KEY}.{key}: must be at least 1, got {value}")
        self.model = model
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = _device(device)
        self._options: dict[str, Any] = {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        self._source = resolve_model(model, key=f"{KEY}.model")
        self.config = self._load_config()
        self.tokenizer: Any = load_tokenizer(model, key=f"{KEY}.model", **self._options)
        self.tokenizer.truncation_side = "left"
        self._template = self._read_template(chat_template)
        readable = getattr(self.config, "max_position_embeddings", None) or math.inf
        # What a tokenizer without a limit says is a number far beyond any model's.
        own = min(readable, self.tokenizer.model_max_length)
        self.max_length = min(own, math.inf if max_length is None else max_length)

    @cached_property
    def version(self) -> str:  # type: ignore[override]
        """The model's name with 12 digits of what it computes: its files, format and numbers."""
        return f"{Path(self.model).name}@{self._identity()[:12]}"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The model's logit for each response; see :meth:`Judge.score`."""
        check_pairs(prompts, responses)
        rows = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        fitting = [(i, row) for i, row in enumerate(rows) if row is not None]
        if len(fitting) < len(rows):
            warn_once(
                f"The judge {self.name} gives some responses no score: they are longer than "
                f"{self.max_length} tokens with the end of their turn, and are not cut, or its "
                "chat template refuses their conversation"
            )
        fitting.sort(key=lambda item: len(item[1]["input_ids"]))  # rows of like length together
        scores = [math.nan] * len(rows)
        # Without a token for padding the model takes a row's last token only if it is alone.
        size = 1 if self._reward_model.config.pad_token_id is None else self.batch_size
        for start in range(0, len(fitting), size):
            part = fitting[start : start + size]
            for (place, _), score in zip(part, self._forward([r for _, r in part]), strict=True):
                scores[place] = score
        return scores

    @torch.no_grad()
    def _forward(self, rows: Sequence[Row]) -> list[float]:
        length = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": self._reward_model.config.pad_token_id or 0}
        batch = {
            name: torch.tensor(
                [r[name] + [padding.get(name, 0)] * (length - len(r[name])) for r in rows],
                device=self.device,
            )
            for name in rows[0]
        }
        # An evaluation may run under the trainer's autocast, which is the policy's business.
        with torch.autocast(self.device.type, enabled=False):
            logits: Any = self._reward_model(**batch).logits
        return [float(score) for score in logits.squeeze(-1).float()]

    @cached_property
    def _reward_model(self) -> Any:
        with loading(self.model, self._source, "a reward model", f"{KEY}.model"):
            loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                self._source,
                config=self.config,
                dtype=getattr(torch, self.dtype),
                output_loading_info=True,
                **self._options,
            )
        if missing := sorted(info["missing_keys"]):
            raise InputError(
                f"{KEY}.model: {self.model} lacks weights of a reward model ({missing[0]} among "
                "them); give one that was saved with its head"
            )
        return loaded.to(self.device).eval()

    # -- from a conversation to ids ----------------------------------------------------------

    def _encode(self, prompt: Prompt, response: str) -> Row | None:
        """What the model reads; None where it can read nothing, or the response is too long."""
        if self._template == PAIR:
            return self._encode_pair("\n\n".join(m.content for m in prompt.messages), response)
        text = self._render([*prompt.messages, Message(role="assistant", content=response)])
        if text is None:
            return None
        ids = self._ids(text)
        if len(ids) > self.max_length:
            bos = self.tokenizer.bos_token_id
            head = ids[:1] if bos is not None and ids[0] == bos else []
            begins = text.rfind(response.strip())  # templates strip what they place
            if begins < 0 or len(head) + len(self._ids(text[begins:])) > self.max_length:
                return None
            ids = head + ids[len(ids) - int(self.max_length) + len(head) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _render(self, messages: Sequence[Message]) -> str | None:
        """A conversation, its system message in the first user turn where it may have none."""
        from jinja2 import TemplateError

        for turns in (messages, fold_system(messages)):
            with suppress(TemplateError):
                return str(
                    self.tokenizer.apply_chat_template(
                        [{"role": m.role, "content": m.content} for m in turns],
                        chat_template=self._template,
                        tokenize=False,
                    )
                )
        return None

    def _encode_pair(self, prompt: str, response: str) -> Row | None:
        added = self.tokenizer.num_special_tokens_to_add(pair=True)
        if len(self._ids(response)) + added >= self.max_length:
            return None  # no token of the prompt would be left
        limit = None if math.isinf(self.max_length) else int(self.max_length)
        cut = {"truncation": "only_first", "max_length": limit} if limit else {}
        return dict(self.tokenizer(prompt, response, **cut))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    # -- checks ------------------------------------------------------------------------------

    def _load_config(self) -> Any:
        key = f"{KEY}.model"
        with loading(self.model, self._source, "a model", key):
            config = transformers.AutoConfig.from_pretrained(self._source, **self._options)
        named = [*(config.architectures or ()), *(getattr(config, "auto_map", None) or ())]
        if not any(KIND in name for name in named):
            raise InputError(
                f"{key}: {self.model} is not a reward model (its architectures are "
                f"{config.architectures}); give one that ends in {KIND}"
            )
        if config.num_labels != 1:
            raise InputError(
                f"{key}: {self.model} gives {config.num_labels} numbers, not one; give a reward "
                "model with a single output"
            )
        return config

    def _read_template(self, given: str | None) -> str | None:
        if given is None:
            if not self.tokenizer.chat_template:
                raise InputError(
                    f"{KEY}.chat_template: the tokenizer of {self.model} has no chat template; "
                    f"give a .jinja file, or {PAIR!r} for an encoder of two texts"
                )
            return None
        return given if given == PAIR else jinja_text(given, f"{KEY}.chat_template", repr(PAIR))

    def _identity(self) -> str:
        settings = [self._template, str(self.max_length), self.dtype]
        digest = hashlib.sha256(json.dumps(settings).encode())
        commit = getattr(self.config, "_commit_hash", None)
        folder = Path(self._source)
        digest.update(str(commit).encode())
        if folder.is_dir():
            for file in sorted(p for p in folder.iterdir() if p.is_file()):
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA
        raise InputError(
            f"{KEY}.device: {name!r} is no device of this machine ({str(error).splitlines()[0]}); "
            "use auto, cpu, cuda or cuda:0"
        ) from error
    return torch.device(name)  # cuda is each rank's own, once Lightning has set it
