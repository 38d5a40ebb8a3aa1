"""Pairs of replies: what DPO trains on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from iqstar.data import JSONL, BeaverTailsPairs, HHPairs, JSONLPairs, SafeRLHFPairs
from iqstar.data.beavertails import audit_answers
from iqstar.data.categories import categories_by_prompt
from iqstar.data.jsonl import parse_row
from iqstar.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"
HH = SHARED / "hh_rlhf" / "harmless-base_test_a.jsonl.gz"
BEAVER = SHARED / "beavertails" / "30k_test_a.jsonl.gz"
real_files = pytest.mark.skipif(not HH.exists(), reason="needs the shared data sets")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def pairs_of(data):
    data.setup()
    prompts = [*data.train_prompts, *data.heldout_prompts]
    return {p.messages[-1].content: (p.response, p.rejected) for p in prompts}


def dialogue(question, reply):
    return f"\n\nHuman: {question}\n\nAssistant: {reply}"


def test_hh_pairs_are_the_final_replies(tmp_path):
    rows = [
        {"chosen": dialogue("a", "yes"), "rejected": dialogue("a", "no")},
        {"chosen": dialogue("b", "same"), "rejected": dialogue("b", "same")},
        {"chosen": dialogue("c", "yes"), "rejected": dialogue("other", "no")},
        {"chosen": dialogue("d", "yes"), "rejected": dialogue("d", "")},
    ]
    data = HHPairs(path=write(tmp_path / "hh.jsonl", rows), val_prompts=None)
    assert pairs_of(data) == {"a": ("yes", "no")}
    assert data.report.skipped == {
        "pair with equal replies": 1,
        "pair whose prompts differ": 1,
        "pair with an empty reply": 1,
    }


def test_a_subset_of_the_hub_is_one_of_its_configurations():
    assert SafeRLHFPairs().hub_options() == {"split": "train"}
    assert SafeRLHFPairs(subset="alpaca-7b").hub_options() == {
        "split": "train",
        "name": "alpaca-7b",
    }


def test_pairs_of_later_turns_are_none_after_the_first(tmp_path):
    """A conversation that is cut loses its pair, and hides no other one's."""
    longer = dialogue("a", "hm") + dialogue("why?", "")
    rows = [
        {"chosen": longer + "because", "rejected": longer + "so"},
        {"chosen": dialogue("a", "yes"), "rejected": dialogue("a", "no")},
    ]
    data = HHPairs(path=write(tmp_path / "hh.jsonl", rows), val_prompts=None, first_turn_only=True)
    assert pairs_of(data) == {"a": ("yes", "no")}
    assert data.report.skipped == {"pair of a later turn": 1}


def test_heldout_rows_keep_the_response_of_the_data_set(tmp_path):
    """Judges that compare with it need it."""
    pairs = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in "abcd"]
    heldout = [{"messages": [{"role": "user", "content": "e"}], "response": "hello"}]
    data = JSONLPairs(
        path=write(tmp_path / "pairs.jsonl", pairs),
        heldout_path=write(tmp_path / "heldout.jsonl", heldout),
        val_prompts=None,
    )
    data.setup()
    assert [p.response for p in data.heldout_prompts] == ["hello"]


def test_beavertails_pairs_a_safe_answer_with_an_unsafe_one(tmp_path):
    def row(prompt, response, safe):
        return {"prompt": prompt, "response": response, "is_safe": safe}

    rows = [
        row("a", "bad", False),
        row("b", "fine", True),
        row("a", "good", True),
        row("a", "better", True),
        row("b", "finer", True),
    ]
    data = BeaverTailsPairs(path=write(tmp_path / "b.jsonl", rows), val_prompts=None)
    assert pairs_of(data) == {"a": ("good", "bad")}


def test_a_pair_is_in_the_categories_of_all_its_prompts_rows(tmp_path):
    """The safe response, which the row is of, falls into none."""
    rows = [
        {"prompt": "a", "response": r, "is_safe": not harms, "category": dict.fromkeys("xyz", False)
         | dict.fromkeys(harms, True)}
        for r, harms in (("bad", "x"), ("good", ""), ("worse", "y"))
    ]  # fmt: skip
    data = BeaverTailsPairs(path=write(tmp_path / "b.jsonl", rows), val_prompts=None)
    data.setup("validate")
    (prompt,) = data.heldout_prompts
    assert categories_by_prompt(data, [prompt]) == {prompt.messages: {"x", "y"}}


def test_labels_that_are_text_are_no_labels(tmp_path):
    """As a detour over CSV leaves them: "False" would count as true."""
    rows = [{"prompt": "q", "response": f"a {s}", "is_safe": s} for s in ("True", "False")]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: is_safe must be true or false"):
        pairs_of(BeaverTailsPairs(path=path, val_prompts=0))
    assert audit_answers(rows)["safe"] == 0
    assert audit_answers(rows)["details"]["no_label"] == 2


def test_a_response_that_is_no_text_is_named_by_its_own_line(tmp_path):
    rows = [{"prompt": "q", "response": r, "is_safe": r == "a"} for r in ("a", 3)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"rows\.jsonl:2: response must be text"):
        pairs_of(BeaverTailsPairs(path=path, val_prompts=0))


def test_saferlhf_prefers_the_safer_response(tmp_path):
    rows = [
        {"prompt": q, "response_0": "x", "response_1": "y", "safer_response_id": safer}
        for q, safer in (("a", 0), ("b", 1))
    ]
    data = SafeRLHFPairs(path=write(tmp_path / "s.jsonl", rows), val_prompts=None)
    assert pairs_of(data) == {"a": ("x", "y"), "b": ("y", "x")}


def test_own_pairs_may_bring_prompts_to_evaluate_on(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    heldout = [{"messages": [{"role": "user", "content": "h"}]}]
    data = JSONLPairs(
        path=write(tmp_path / "p.jsonl", rows),
        heldout_path=write(tmp_path / "h.jsonl", heldout),
    )
    data.setup("fit")
    assert [p.messages[0].content for p in data.heldout_prompts] == ["h"]
    assert len(data.train_prompts) == 4
    assert all((p.response, p.rejected) == ("yes", "no") for p in data.train_prompts)


def test_own_pairs_may_be_messages(tmp_path):
    """TRL's conversational layout."""

    def said(role, text):
        return [{"role": role, "content": text}]

    row = {"prompt": said("user", "q")}
    row |= {"chosen": said("assistant", "yes"), "rejected": said("assistant", "no")}
    data = JSONLPairs(path=write(tmp_path / "p.jsonl", [row]), val_prompts=None)
    assert pairs_of(data) == {"q": ("yes", "no")}


def test_replies_may_be_whole_conversations(tmp_path):
    """The prompt is what both begin with, there once more or not: UltraFeedback's and TRL's."""

    def talk(*texts):
        roles = ("user", "assistant") * len(texts)
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    rows = [
        {"chosen": talk("a", "hm", "b", "yes"), "rejected": talk("a", "hm", "b", "no")},
        {"prompt": "c", "chosen": talk("c", "yes"), "rejected": talk("c", "no")},
        {"prompt": "d", "chosen": talk("d", "yes"), "rejected": talk("other", "no")},
        {"chosen": talk("e", "yes"), "rejected": talk("f", "no")},
    ]
    data = JSONLPairs(path=write(tmp_path / "p.jsonl", rows), val_prompts=None)
    assert pairs_of(data) == {"b": ("yes", "no"), "c": ("yes", "no")}
    assert {len(p.messages) for p in [*data.train_prompts, *data.heldout_prompts]} == {1, 3}
    assert data.report.skipped == {"pair whose prompts differ": 2}


def test_a_missing_file_of_prompts_names_its_key(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    with pytest.raises(InputError, match=r"^data\.heldout_path: no such file"):
        JSONLPairs(path=path, heldout_path="nowhere.jsonl").setup()
    nothing = write(tmp_path / "nothing.jsonl", [{"question": "Hi"}])
    with pytest.raises(InputError, match=r"nothing\.jsonl:1: no prompt; the row has 'question'"):
        JSONLPairs(path=path, heldout_path=nothing).setup()


def test_a_reply_that_was_cut_says_so(tmp_path):
    row = {"prompt": "q", "chosen": "yes", "rejected": "no and", "rejected_complete": False}
    data = JSONLPairs(path=write(tmp_path / "p.jsonl", [row]), val_prompts=None)
    data.setup()
    (prompt,) = [*data.train_prompts, *data.heldout_prompts]
    assert (prompt.complete, prompt.rejected_complete) == (True, False)
    assert parse_row({"prompt": "q", "response": "yes"}).complete
    assert not parse_row({"prompt": "q", "response": "yes and", "complete": False}).complete


@pytest.mark.parametrize(
    ("cls", "row", "message"),
    [
        (JSONLPairs, {"prompt": "a", "chosen": "yes"}, "unknown column layout"),
        (JSONLPairs, {"chosen": "Hi! Yes", "rejected": "Hi! No"}, "no prompt; give one, or conv"),
        (JSONLPairs, {"prompt": "a", "chosen": 1, "rejected": "no"}, "chosen must be text"),
        (
            JSONLPairs,
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "no"},
            "chosen must be text, or messages up to one of the assistant",
        ),
        (
            JSONLPairs,
            {"prompt": "a", "chosen": "yes", "rejected": "no", "chosen_complete": 1},
            "chosen_complete must be true or false, found 1",
        ),
        (JSONL, {"prompt": "a", "response": "x", "complete": "no"}, "complete must be true or"),
        (
            JSONL,
            {"messages": [{"role": r, "content": "b"} for r in ("user", "assistant")]}
            | {"response": "x"},
            "the messages end with another response than response; keep one",
        ),
        (
            SafeRLHFPairs,
            {"prompt": "a", "response_0": "x", "response_1": "y", "safer_response_id": 7},
            "safer_response_id must be 0 or 1",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, cls, row, message):
    path = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InputError, match=rf"bad\.jsonl:1: {message}"):
        cls(path=path, val_prompts=None).setup()


@real_files
def test_real_pairs():
    """Every HH row with agreeing prompts and two different replies, once for each prompt."""
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    data = HHPairs(path=str(HH), val_prompts=None, max_prompt_tokens=None)
    found = pairs_of(data)
    assert data.report.rows == len(rows) == 1181
    assert len(data.heldout_prompts) > 1100
    for chosen, rejected in found.values():
        assert chosen != rejected
        assert any(row["chosen"].rstrip().endswith(chosen) for row in rows)
    with gzip.open(BEAVER, "rt", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    kinds = {(row["prompt"].strip(), row["is_safe"]) for row in answers}
    both = {prompt for prompt, safe in kinds if safe and (prompt, False) in kinds}
    beaver = BeaverTailsPairs(path=str(BEAVER), val_prompts=None)
    assert len(pairs_of(beaver)) == len(both)
