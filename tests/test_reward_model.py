"""The reward-model judge against the model itself."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from iqstar.errors import InputError
from iqstar.judges import RewardModelJudge, scores_of
from iqstar.judges.base import warn_once
from iqstar.mdp import Message, Prompt
from tiny import reward_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reward_folder(tmp_path_factory.mktemp("reward"))


def ask(text: str) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text),))


PROMPTS = [ask("Hi"), ask("What is the meaning of all this, please?"), ask("And you?")]
RESPONSES = ["Hello there, friend.", "42", "I am fine, thank you for asking me that."]


def text_of(prompt: Prompt, response: str) -> str:
    (turn,) = prompt.messages
    return (
        f"<|im_start|>user\n{turn.content}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
    )


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer(pad="own")(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def logit(folder: str, ids: list[int]) -> float:
    """The model's own answer to one row, without padding."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    return float(model(input_ids=torch.tensor([ids])).logits)


def test_scores_are_the_models_logits(folder):
    wanted = [logit(folder, ids_of(text_of(p, r))) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert len(set(wanted)) == 3
    for size in (1, 2, 8):  # padding changes nothing, and every score finds its place
        judge = RewardModelJudge(folder, batch_size=size)
        assert judge.score(PROMPTS, RESPONSES) == pytest.approx(wanted, abs=1e-5)
    assert judge.score([], []) == []
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        judge.score(PROMPTS[:2], ["a"])


def test_a_model_without_a_pad_token(tmp_path, folder):
    bare = reward_folder(tmp_path, pad=None)
    wanted = [logit(bare, ids_of(text_of(p, r))) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    found = RewardModelJudge(bare, batch_size=8).score(PROMPTS, RESPONSES)
    assert found == pytest.approx(wanted, abs=1e-5)


def test_a_long_prompt_loses_its_beginning(folder):
    prompt = ask("word " * 50 + "end")
    ids = ids_of(text_of(prompt, "Fine."))
    wanted = logit(folder, [ids[0], *ids[-39:]])  # the template's BOS stays
    judge = RewardModelJudge(folder, max_length=40)
    assert judge.score([prompt], ["Fine."]) == pytest.approx([wanted], abs=1e-5)
    assert judge.score([PROMPTS[0]], ["Fine."]) == RewardModelJudge(folder).score(
        [PROMPTS[0]], ["Fine."]
    )


def test_a_response_is_never_cut(folder, caplog):
    warn_once.cache_clear()
    judge = RewardModelJudge(folder, max_length=40)
    long = "a response of many words " * 6
    scores = judge.score([PROMPTS[0]] * 3, ["Short.", long, "Fine."])
    assert math.isnan(scores[1])
    assert scores[::2] == pytest.approx(
        RewardModelJudge(folder).score([PROMPTS[0]] * 2, ["Short.", "Fine."]), abs=1e-5
    )
    assert "longer than 40 tokens" in caplog.text


def test_two_texts(tmp_path):
    """As an encoder's tokenizer takes them; the tiny one's pairs are the two texts in a row."""
    plain = reward_folder(tmp_path, chat_template=False)
    with pytest.raises(InputError, match=r"chat_template: the tokenizer of .* has no chat"):
        RewardModelJudge(plain)
    judge = RewardModelJudge(plain, chat_template="pair", max_length=12)
    prompt, response = ask("a b c d e f g h i j k l m"), "no no"
    ids, own = ids_of(prompt.messages[0].content), ids_of(response)
    wanted = logit(plain, ids[len(ids) + len(own) - 12 :] + own)
    assert len(ids) + len(own) > 12
    found = judge.score([prompt, prompt], [response, "no " * 20])
    assert found == pytest.approx([wanted, math.nan], abs=1e-5, nan_ok=True)


def test_a_conversation_that_the_template_refuses(folder, caplog):
    """As Gemma's: a system message goes before the user's, what it cannot tell has no score."""
    warn_once.cache_clear()
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' or m.role == 'user' and loop.index0 % 2 %}"
        "{{ raise_exception('no') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    system = Message(role="system", content="Be brief.")
    (hi,) = PROMPTS[0].messages
    told = Prompt(messages=(system, hi))
    twice = Prompt(messages=(hi, hi))
    judge = RewardModelJudge(folder, chat_template=template)
    scores = judge.score([told, twice, PROMPTS[0], ask("Be brief.\n\nHi")], ["Yes."] * 4)
    assert [math.isnan(score) for score in scores] == [False, True, False, False]
    assert scores[0] == scores[3] != scores[2]
    assert "refuses their conversation" in caplog.text


def test_another_template(folder, tmp_path):
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    judge = RewardModelJudge(folder, chat_template=str(file))
    wanted = logit(folder, ids_of("Hi Hello there, friend. "))
    assert judge.score(PROMPTS[:1], RESPONSES[:1]) == pytest.approx([wanted], abs=1e-5)
    with pytest.raises(InputError, match="neither 'pair', nor Jinja text, nor a file"):
        RewardModelJudge(folder, chat_template="nowhere.jinja")


def test_the_trainers_precision_is_not_its_own(folder):
    judge = RewardModelJudge(folder)
    wanted = judge.score(PROMPTS, RESPONSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert judge.score(PROMPTS, RESPONSES) == wanted
    half = RewardModelJudge(folder, dtype="bfloat16").score(PROMPTS, RESPONSES)
    assert half != wanted
    assert half == pytest.approx(wanted, abs=0.5)


def test_the_version_is_that_of_what_decides(folder, tmp_path):
    first = RewardModelJudge(folder).version
    assert RewardModelJudge(folder, batch_size=1).version == first
    assert RewardModelJudge(folder, max_length=40).version != first
    assert RewardModelJudge(folder, dtype="bfloat16").version != first
    assert "/" not in first
    other = reward_folder(tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    weights = load_file(file)
    weights["score.weight"] = weights["score.weight"] + 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    digest = RewardModelJudge(other).version.partition("@")[2]
    assert digest != first.partition("@")[2]


def test_a_model_that_is_none(tmp_path, tiny):
    with pytest.raises(InputError, match=r"RewardModelJudge.model: .* is not a reward model"):
        RewardModelJudge(str(tiny))
    with pytest.raises(InputError, match="gives 3 numbers, not one"):
        RewardModelJudge(reward_folder(tmp_path / "three", labels=3))
    with pytest.raises(InputError, match=r"RewardModelJudge.model: .* does not exist"):
        RewardModelJudge("./nowhere")
    with pytest.raises(InputError, match="batch_size: must be at least 1"):
        RewardModelJudge(str(tiny), batch_size=0)


def test_devices(folder):
    assert RewardModelJudge(folder, device="cpu").device == torch.device("cpu")
    with pytest.raises(InputError, match="'nowhere' is no device"):
        RewardModelJudge(folder, device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda' is no device of this machine"):
            RewardModelJudge(folder, device="cuda")


@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "cannot be loaded"), ("headless", "lacks weights of a reward model")],
)
def test_weights_that_fail_are_an_error(tmp_path, damage, message):
    """They are read at the first response, and no later one mends them."""
    judge = RewardModelJudge(reward_folder(tmp_path))
    file = tmp_path / "model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        weights = load_file(file)
        del weights["score.weight"]
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"RewardModelJudge\.model: .*{message}"):
        scores_of(judge, PROMPTS, RESPONSES)
    assert judge.version
