"""Between messages and token ids: chat templates, where a principle goes, and how a reply ends.

The policy and the reference always see the unmodified prompt (``principle=None``); only an
estimator's context holds a principle (method §3).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iqstar.errors import InputError
from iqstar.mdp import Message
from iqstar.templates import jinja_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Names of the built-in placements of a principle; a text with both fields is the fourth way.
PLACEMENTS = ("system", "before_user", "after_user")
_KEY = "model.policy.chat_template"
_HH_STOP = "\n\nHuman:"
STOP_STRINGS = {"hh": (_HH_STOP,)}
"""Texts that end a response of a named template, besides end tokens."""
_HH_JINJA = (
    r"{% for m in messages %}{{ {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: '}"
    r".get(m['role'], '') + m['content'] }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
_PROBE = "iqstar probe"


class ChatFormat:
    r"""Turns conversations into token ids and token ids into text, for one tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer; it is not changed, and no token is added to it.
        template: None takes the tokenizer's own chat template. ``hh`` is the plain format of
            HH-RLHF for base models (``\n\nHuman: …\n\nAssistant:``). Anything else is Jinja text
            or the path of a ``.jinja`` file.
        generation_eos: Further end-of-sequence ids, from the model's generation config.
        model_vocab_size: Rows of the model's output layer, an upper limit of ``vocab_size``.

    Attributes:
        tokenizer: The tokenizer.
        template: The Jinja text, ``hh``, or None for the tokenizer's own.
        eos_ids: Every id that ends a response: the tokenizer's, the generation config's, and the
            special token that the chat template writes after an assistant turn.
        end_of_turn: The ids that follow a *complete* reply of a data set: what the template writes
            after it, up to and including the first special token; else the EOS token.
        pad_id: The padding id. It may equal an EOS id: masks come from lengths, never from values.
        stop_strings: Texts that end a response besides ``eos_ids``.
        vocab_size: Ids below it mean something; further rows of an output layer are padding.

    Raises:
        InputError: If there is no chat template, or the one given cannot be read or rendered.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    eos_ids: tuple[int, ...]
    end_of_turn: tuple[int, ...]
    pad_id: int
    stop_strings: tuple[str, ...]
    vocab_size: int

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        generation_eos: int | Sequence[int] | None = (),
        model_vocab_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = _read_template(tokenizer, template)
        self.stop_strings = STOP_STRINGS.get(self.template or "", ())
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        if model_vocab_size is not None:
            self.vocab_size = min(self.vocab_size, model_vocab_size)
        # SentencePiece tokenizers put a space before any text they encode; within a turn that
        # space would be a token too many.
        self._adds_space = tokenizer.tokenize("a")[0].startswith("▁")
        self._warned = False
        self._takes_system = self._probe_system()
        self._lead, tail = (" ", ()) if self.template == "hh" else self._probe_reply()
        eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        eos += [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or ())
        eos += tail[-1:]
        self.eos_ids = tuple(dict.fromkeys(eos))
        self.end_of_turn = tail or self.eos_ids[:1]
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad) if pad is not None else next(iter(self.eos_ids), 0)

    def prompt_ids(
        self,
        messages: Sequence[Message],
        principle: str | None = None,
        placement: str = "after_user",
    ) -> list[int]:
        """Token ids of a conversation up to where the assistant's reply begins.

        The template alone decides about a BOS token (``hh``: the tokenizer does); there are never
        two of them.

        Args:
            messages: The turns, oldest first.
            principle: What the reply is told to follow; None leaves the prompt unmodified. It is
                never cut.
            placement: ``system``: the system message, after a blank line where there is one
                already. It takes the place of a default system message that some templates write
                where there is none (SmolLM2's does). Where a template takes no system message, the
                text goes before the first user turn, with a warning. ``before_user`` and
                ``after_user``: before or after the last user turn, with a blank line between. Any
                text with ``{prompt}`` and ``{principle}``: what the last user turn becomes.

        Raises:
            InputError: If the placement is unknown, the principle is empty or got lost in the
                template, or the template rejects the conversation.
        """
        check_placement(placement)
        if principle is None:
            text = self._render(messages)
        else:
            principle = principle.strip()
            if not principle:
                raise InputError("principle: it is empty; write what the reply shall follow")
            text = self._render(place_principle(messages, principle, placement))
            if principle not in text:
                raise InputError(
                    f"placement: the chat template drops or rewrites a principle placed by "
                    f"{placement!r}; choose another one of {', '.join(PLACEMENTS)}"
                )
        if self.template != "hh":
            return self._encode(text)
        return [*self._leading_bos(), *self._encode(text, plain=True)]

    def jinja(self) -> str | None:
        """Jinja text of a template that is not the tokenizer's own, to be saved with a model."""
        if self.template == "hh":
            return ("{{ bos_token }}" if self._leading_bos() else "") + _HH_JINJA
        return self.template

    def _leading_bos(self) -> list[int]:
        """The BOS id, if the tokenizer puts one before a text."""
        bos = self.tokenizer.bos_token_id
        return [int(bos)] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []

    def response_ids(self, text: str, complete: bool = True) -> list[int]:
        """Token ids of a data set's reply, as they would follow :meth:`prompt_ids`.

        Names of special tokens inside ``text`` are plain text: a reply cannot end itself early.

        Args:
            text: The reply.
            complete: Whether it ended by itself; then ``end_of_turn`` is appended.
        """
        if self._lead.strip():
            ids = self._follow(self._lead) + self._follow(text, plain=True)
        else:
            ids = self._follow(self._lead + text, plain=True)
        return ids + list(self.end_of_turn) if complete else ids

    def decode(self, ids: Sequence[int], stop_strings: Sequence[str] | None = None) -> str:
        """Text of response ids, without special tokens and without what a stop string cuts off.

        Args:
            ids: Of the response.
            stop_strings: Where the text ends; None for those of the format.
        """
        text: Any = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for stop in self.stop_strings if stop_strings is None else stop_strings:
            text = text.partition(stop)[0]
        return text.removeprefix(self._lead) if self._lead.isspace() else text

    def count(self, text: str) -> int:
        """Number of tokens of plain text, without special tokens."""
        return len(self._encode(text, plain=True))

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=plain, verbose=False
        )
        return [int(i) for i in encoded["input_ids"]]

    def _follow(self, text: str, plain: bool = False) -> list[int]:
        """Ids of text that continues a turn, without SentencePiece's leading space."""
        if self._adds_space:
            anchor, both = self._encode("\n", plain), self._encode("\n" + text, plain)
            if both[: len(anchor)] == anchor:
                return both[len(anchor) :]
        return self._encode(text, plain)

    def _render(self, messages: Sequence[Message], prompt: bool = True, fold: bool = True) -> str:
        """Text of a conversation, with the head of the assistant's turn where ``prompt``."""
        if fold and not self._takes_system and any(m.role == "system" for m in messages):
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "The chat template takes no system message: its text goes before the first "
                    "user turn instead.",
                    stacklevel=3,
                )
            messages = fold_system(messages)
        if self.template == "hh":
            return _render_hh(messages)
        # jinja2 is a dependency of transformers' templates, and as heavy as they are.
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": m.role, "content": m.content} for m in messages],
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(m.role for m in messages)
            raise InputError(
                f"{_KEY}: the chat template cannot render a conversation of the roles {roles}: "
                f"{error}. Set {_KEY} to a template that can (`hh`, or a .jinja file)"
            ) from error

    def _probe_system(self) -> bool:
        """Whether the template takes a system message: some raise, some drop it silently."""
        user = Message(role="user", content="a")
        self._render([user], fold=False)  # A template that cannot do this is the user's to mend.
        try:
            return _PROBE in self._render(
                [Message(role="system", content=_PROBE), user], fold=False
            )
        except InputError:
            return False

    def _probe_reply(self) -> tuple[str, tuple[int, ...]]:
        """What the template writes between prompt and reply, and the ids that end a reply."""
        user = Message(role="user", content="a")
        try:
            text = self._render([user, Message(role="assistant", content=_PROBE)], prompt=False)
        except InputError:
            return "", ()
        before, found, after = text.rpartition(_PROBE)
        if not found:
            return "", ()
        prompt = self._render([user])
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        added = self.tokenizer.added_tokens_decoder
        special = {*self.tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)}
        tail = self._follow(after)
        for position, token in enumerate(tail):
            if token in special:
                return lead, tuple(tail[: position + 1])
        return lead, ()


def check_placement(placement: str) -> None:
    """Raises an InputError unless ``placement`` is one that :meth:`ChatFormat.prompt_ids` knows."""
    if placement in PLACEMENTS or ("{prompt}" in placement and "{principle}" in placement):
        return
    raise InputError(
        f"placement: {placement!r} is not known; use one of {', '.join(PLACEMENTS)}, or a text "
        "with both {prompt} and {principle}"
    )


def place_principle(messages: Sequence[Message], principle: str, placement: str) -> list[Message]:
    """The conversation with the principle in its place; see :meth:`ChatFormat.prompt_ids`.

    Raises:
        InputError: If the placement is unknown, or there is no user turn to place it at.
    """
    check_placement(placement)
    out = list(messages)
    if placement == "system":
        if out and out[0].role == "system":
            out[0] = replace(out[0], content=f"{out[0].content}\n\n{principle}")
        else:
            out.insert(0, Message(role="system", content=principle))
        return out
    last = max((i for i, m in enumerate(out) if m.role == "user"), default=None)
    if last is None:
        raise InputError("placement: the conversation has no user turn; use placement `system`")
    form = {
        "before_user": "{principle}\n\n{prompt}",
        "after_user": "{prompt}\n\n{principle}",
    }.get(placement, placement)
    fields = {"{prompt}": out[last].content, "{principle}": principle}
    # One pass, so that a prompt that contains "{principle}" stays as it is.
    content = re.sub(r"\{prompt\}|\{principle\}", lambda found: fields[found.group()], form)
    out[last] = replace(out[last], content=content)
    return out


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The system messages' text before the first user turn, with a blank line between."""
    system = [m.content for m in messages if m.role == "system"]
    out = [m for m in messages if m.role != "system"]
    first = next((i for i, m in enumerate(out) if m.role == "user"), None)
    if first is None:
        return [Message(role="user", content="\n\n".join(system)), *out]
    out[first] = replace(out[first], content="\n\n".join([*system, out[first].content]))
    return out


def _render_hh(messages: Sequence[Message]) -> str:
    r"""HH-RLHF's own format: turns of ``\n\nHuman: `` and ``\n\nAssistant: ``, no special token."""
    heads = {"system": "", "user": f"{_HH_STOP} ", "assistant": "\n\nAssistant: "}
    return "".join(heads[m.role] + m.content for m in messages) + "\n\nAssistant:"


def _read_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    """Jinja text of ``template``, or ``hh``, or None where the tokenizer has its own."""
    if template is None:
        if not tokenizer.chat_template:
            raise InputError(
                f"{_KEY}: the tokenizer has no chat template; set {_KEY} to `hh` (plain "
                "Human/Assistant turns, for base models) or to a Jinja file"
            )
        return None
    return template if template == "hh" else jinja_text(template, _KEY, "`hh`")
