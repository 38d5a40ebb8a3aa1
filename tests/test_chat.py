"""Chat formats: prompts, principles, replies and how they end."""

from __future__ import annotations

import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from iqstar.chat import ChatFormat
from iqstar.errors import InputError
from iqstar.mdp import Message
from tiny import BOS, EOS, tiny_tokenizer

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}"
    "{% if m['role'] != 'system' %}[{{ m['content'] }}]{% endif %}"
    "{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<system>You are Tiny.{% endif %}"
    + DROPS_SYSTEM.replace(
        "{% if m['role'] != 'system' %}[{{ m['content'] }}]{% endif %}",
        "<{{ m['role'] }}>{{ m['content'] }}",
    )
)
WITH_BOS = "{{ bos_token }}" + NO_SYSTEM


def user(text: str) -> Message:
    return Message(role="user", content=text)


def system(text: str) -> Message:
    return Message(role="system", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def text_of(chat: ChatFormat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids)


@pytest.fixture
def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer())


def turn(role: str, text: str) -> str:
    return f"{BOS}{role}\n{text}{EOS}\n"


HEAD = f"{BOS}assistant\n"


def test_prompt_renders_template_with_generation_prompt(chat):
    ids = chat.prompt_ids([user("Hi"), assistant("Hello"), user("Why?")])
    expected = turn("user", "Hi") + turn("assistant", "Hello") + turn("user", "Why?") + HEAD
    assert text_of(chat, ids) == expected


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("system", turn("system", "Be kind.") + turn("user", "A") + turn("user", "B")),
        ("before_user", turn("user", "A") + turn("user", "Be kind.\n\nB")),
        ("after_user", turn("user", "A") + turn("user", "B\n\nBe kind.")),
        ("<{principle}|{prompt}>", turn("user", "A") + turn("user", "<Be kind.|B>")),
    ],
)
def test_placements(chat, placement, expected):
    ids = chat.prompt_ids([user("A"), user("B")], "Be kind.", placement)
    assert text_of(chat, ids) == expected + HEAD


def test_system_placement_merges_with_system_message(chat):
    ids = chat.prompt_ids([system("S"), user("A")], "Be kind.", "system")
    assert text_of(chat, ids) == turn("system", "S\n\nBe kind.") + turn("user", "A") + HEAD


def test_fields_in_a_prompt_are_plain_text(chat):
    ids = chat.prompt_ids([user("say {principle}")], "P", "{prompt}/{principle}")
    assert text_of(chat, ids) == turn("user", "say {principle}/P") + HEAD


def test_messages_are_not_changed(chat):
    messages = [system("S"), user("A")]
    chat.prompt_ids(messages, "P", "system")
    chat.prompt_ids(messages, "P", "after_user")
    assert messages == [system("S"), user("A")]


def test_placement_and_principle_errors(chat):
    with pytest.raises(InputError, match=r"placement.*system, before_user, after_user"):
        chat.prompt_ids([user("A")], "P", "sideways")
    with pytest.raises(InputError, match="empty"):
        chat.prompt_ids([user("A")], "  \n")
    with pytest.raises(InputError, match="no user turn"):
        chat.prompt_ids([assistant("A")], "P")


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_template_without_system_role_folds_and_warns_once(template):
    chat = ChatFormat(tiny_tokenizer(), template=template)
    messages = [user("A"), assistant("B"), user("C")]
    with pytest.warns(UserWarning, match="no system message"):
        ids = chat.prompt_ids(messages, "Be kind.", "system")
    assert ids == chat.prompt_ids([user("Be kind.\n\nA"), *messages[1:]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids == chat.prompt_ids([system("Be kind."), *messages])


def test_principle_replaces_a_default_system_message():
    chat = ChatFormat(tiny_tokenizer(), template=DEFAULT_SYSTEM)
    assert text_of(chat, chat.prompt_ids([user("A")])) == "<system>You are Tiny.<user>A"
    assert text_of(chat, chat.prompt_ids([user("A")], "P", "system")) == "<system>P<user>A"


def test_principle_lost_in_the_template_raises():
    template = "{% for m in messages %}{{ m['content'][:9] }}{% endfor %}"
    chat = ChatFormat(tiny_tokenizer(), template=template)
    with pytest.raises(InputError, match="drops or rewrites"):
        chat.prompt_ids([user("A" * 9)], "Be kind.")


def test_bos_is_never_doubled():
    chat = ChatFormat(tiny_tokenizer(), template=WITH_BOS)
    assert chat.prompt_ids([user("A")]).count(chat.tokenizer.bos_token_id) == 1


def test_template_sources(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(NO_SYSTEM)
    ids = ChatFormat(tiny_tokenizer(), template=NO_SYSTEM).prompt_ids([user("A")])
    assert ChatFormat(tiny_tokenizer(False), template=str(path)).prompt_ids([user("A")]) == ids
    with pytest.raises(InputError, match=r"model\.policy\.chat_template.*`hh`.*Jinja file"):
        ChatFormat(tiny_tokenizer(False))
    with pytest.raises(InputError, match=r"missing\.jinja.*nor a file"):
        ChatFormat(tiny_tokenizer(), template="missing.jinja")
    with pytest.raises(InputError, match=r"model\.policy\.chat_template"):
        ChatFormat(tiny_tokenizer(), template="{% for %}")
    path.write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(InputError, match=r"model\.policy\.chat_template: .*chat\.jinja.*UTF-8"):
        ChatFormat(tiny_tokenizer(), template=str(path))


def test_template_that_rejects_a_conversation_raises():
    template = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}x"
    chat = ChatFormat(tiny_tokenizer(), template=template)
    with pytest.raises(InputError, match="user, assistant, user: too many"):
        chat.prompt_ids([user("A"), assistant("B"), user("C")])


# --- how replies end -----------------------------------------------------------------------------


def test_end_of_turn_is_what_the_template_writes(chat):
    eos = chat.tokenizer.eos_token_id
    assert chat.end_of_turn == (eos,)
    ids = chat.response_ids("Yes.")
    assert ids[-1] == eos
    assert chat.response_ids("Yes.", complete=False) == ids[:-1]
    whole = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "A"}, {"role": "assistant", "content": "Yes."}], tokenize=False
    )
    assert text_of(chat, chat.prompt_ids([user("A")]) + ids) + "\n" == whole


def test_end_of_turn_that_is_not_the_eos_token():
    tokenizer = tiny_tokenizer(pad="own")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '.<|pad|>\n' }}{% endfor %}"
    chat = ChatFormat(tokenizer, generation_eos=[7, 1])
    dot = tokenizer.convert_tokens_to_ids(".")
    assert chat.end_of_turn == (dot, tokenizer.pad_token_id)
    assert chat.eos_ids == (1, 7, tokenizer.pad_token_id)


def test_template_without_end_token_uses_eos():
    chat = ChatFormat(tiny_tokenizer(), template=DROPS_SYSTEM, generation_eos=5)
    assert chat.end_of_turn == (1,)
    assert chat.eos_ids == (1, 5)


def test_space_before_a_reply_is_kept():
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    chat = ChatFormat(tiny_tokenizer(), template=template)
    ids = chat.response_ids("the cat")
    assert text_of(chat, ids) == f" the cat{EOS}"
    assert chat.decode(ids) == "the cat"


def test_special_tokens_in_a_reply_are_text(chat):
    ids = chat.response_ids(f"a{EOS}b")
    assert ids.count(chat.tokenizer.eos_token_id) == 1
    assert chat.decode(ids) == f"a{EOS}b"


def test_pad_and_vocab_size():
    assert ChatFormat(tiny_tokenizer(pad="own")).pad_id == 2
    assert ChatFormat(tiny_tokenizer(pad="eos")).pad_id == 1
    assert ChatFormat(tiny_tokenizer(pad=None)).pad_id == 1
    n = max(tiny_tokenizer().get_vocab().values()) + 1
    assert ChatFormat(tiny_tokenizer(), model_vocab_size=320).vocab_size == n
    assert ChatFormat(tiny_tokenizer(), model_vocab_size=n - 3).vocab_size == n - 3
    assert ChatFormat(tiny_tokenizer()).vocab_size == n


def test_count(chat):
    assert chat.count("") == 0
    assert chat.count("the") == 1
    assert chat.count(EOS) > 1


# --- hh ------------------------------------------------------------------------------------------


def test_hh_format():
    chat = ChatFormat(tiny_tokenizer(False), template="hh")
    messages = [system("S"), user("A"), assistant("B"), user("C")]
    expected = "S\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:"
    assert text_of(chat, chat.prompt_ids(messages)) == expected
    merged = text_of(chat, chat.prompt_ids(messages, "P", "system"))
    assert merged == expected.replace("S\n", "S\n\nP\n", 1)
    assert chat.stop_strings == ("\n\nHuman:",)
    ids = chat.response_ids("the end")
    assert text_of(chat, ids) == f" the end{EOS}"
    assert chat.decode(ids) == "the end"
    assert chat.end_of_turn == (1,)


def test_hh_decode_cuts_the_stop_string():
    chat = ChatFormat(tiny_tokenizer(False), template="hh")
    assert chat.decode(chat.response_ids("Yes.\n\nHuman: And", complete=False)) == "Yes."


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space before every text, and BOS added by encoding."""
    pieces = ["<s>", "</s>", "<0x0A>", *"▁abcdefghijklmnopqrstuvwxyzHA:[]."]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_hh_adds_bos_where_the_tokenizer_does():
    ids = ChatFormat(sentencepiece_like(), template="hh").prompt_ids([user("hi")])
    assert ids[0] == 0
    assert ids.count(0) == 1


def test_sentencepiece_space_is_not_added_inside_a_turn():
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    chat = ChatFormat(sentencepiece_like(), template=template)
    tokens = chat.tokenizer.convert_ids_to_tokens(chat.response_ids("a b", complete=False))
    assert tokens == ["[", "a", "▁", "b"]
    hh = ChatFormat(sentencepiece_like(), template="hh")
    tokens = hh.tokenizer.convert_ids_to_tokens(hh.response_ids("a b", complete=False))
    assert tokens == ["▁", "a", "▁", "b"]


def test_tokenizer_without_eos():
    tokenizer = tiny_tokenizer(False)
    tokenizer.eos_token = tokenizer.pad_token = None
    chat = ChatFormat(tokenizer, template="hh")
    assert (chat.eos_ids, chat.end_of_turn, chat.pad_id) == ((), (), 0)
