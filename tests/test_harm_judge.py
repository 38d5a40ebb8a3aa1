"""The harm judge: its features against scikit-learn's, its file, its command, its quality."""

from __future__ import annotations

import gzip
import io
import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cli_tools import error_of
from iqstar.baselines import PPO
from iqstar.cli import main
from iqstar.errors import InputError
from iqstar.judges import HarmJudge, VaderJudge
from iqstar.judges.base import warn_once
from iqstar.judges.harm import HarmModel, features, prompt_key, split_of
from iqstar.judges.harm_training import Example, _fitted, cross_validate, train
from iqstar.mdp import Message, Prompt
from iqstar.policy import PolicySpec

DATA = Path(__file__).parents[2] / "shared" / "data"
BEAVER = DATA / "beavertails" / "30k_test_a.jsonl.gz"
HELPFUL = DATA / "hh_rlhf" / "helpful-base_train_sample500.jsonl.gz"


def ask(*turns: str) -> Prompt:
    roles = ["user", "assistant"] * len(turns)
    return Prompt(
        messages=tuple(Message(role=r, content=t) for r, t in zip(roles, turns, strict=False))
    )


def examples(count: int = 60, first: int = 0) -> list[Example]:
    """Safe ones help, unsafe ones harm; each prompt has one of each."""
    return [
        Example(
            prompt=ask(f"What about the number {i} here?"),
            response=f"You can {'help' if safe else 'hurt'} your neighbour {i % 7} times.",
            safe=safe,
        )
        for i in range(first, first + count // 2)
        for safe in (True, False)
    ]


@pytest.fixture(scope="module")
def model() -> HarmModel:
    pytest.importorskip("sklearn")
    return train(examples(), {"made": "up"})


@pytest.fixture
def rows(tmp_path):
    """The examples as BeaverTails has them."""
    file = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": e.prompt.messages[0].content, "response": e.response, "is_safe": e.safe}
        for e in examples()
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_features():
    found = features(ask("Ignored?", "Yes.", "Hello, you"), "Hello I do")
    assert found == [
        *("hello", "you", "r_hello", "r_do"),
        *("hello you", "you r_hello", "r_hello r_do"),
    ]


def test_probabilities_are_those_of_scikit_learn(model):
    vectorizer, classifier = _fitted(examples())
    others = [
        *examples(6),
        Example(prompt=ask("Hurt me"), response="hurt hurt hurt, can help", safe=False),
        Example(prompt=ask("zzz"), response="", safe=True),
    ]
    theirs = classifier.predict_proba(vectorizer.transform(others))[:, 1]
    assert list(classifier.classes_) == [False, True]
    ours = [model.probability(e.prompt, e.response) for e in others]
    assert ours == pytest.approx(list(theirs), abs=1e-9)
    assert max(ours) - min(ours) > 0.1


def test_the_file_holds_the_judge(model, tmp_path):
    file = tmp_path / "harm.npz"
    model.save(file)
    judge = HarmJudge(str(file))
    prompts = [ask("What about the number 3?")] * 2
    texts = ["You can help them.", "You can hurt them."]
    scores = judge.score(prompts, texts)
    assert scores[0] > 0.5 > scores[1]
    assert scores == pytest.approx([model.probability(prompts[0], t) for t in texts], abs=1e-5)
    assert judge.name == "harm"
    assert judge.model.info["made"] == "up"
    model.save(tmp_path / "again.npz")
    assert HarmJudge(str(tmp_path / "again.npz")).version == judge.version
    other = train(examples(40), {})
    other.save(tmp_path / "other.npz")
    assert HarmJudge(str(tmp_path / "other.npz")).version != judge.version
    with np.load(file, allow_pickle=False) as arrays:  # raises at anything but plain arrays
        assert all(arrays[name].dtype != object for name in arrays.files)


def test_trained_prompts_are_known(model, tmp_path, caplog):
    model.save(tmp_path / "harm.npz")
    judge = HarmJudge(str(tmp_path / "harm.npz"))
    assert judge.trained_on(ask("  what about the NUMBER 3 here?", "Sure", "And then?"))
    assert not judge.trained_on(ask("What about the number 300 here?"))
    warn_once.cache_clear()
    judge.score([ask("What about the number 300 here?")], ["Yes."])
    assert not caplog.records
    judge.score([ask("What about the number 3 here?")] * 2, ["Yes.", "No."])
    judge.score([ask("What about the number 3 here?")], ["Yes."])
    assert len(caplog.records) == 1
    assert "was trained on some of these prompts" in caplog.text


def test_a_reward_and_its_measure_share_no_prompt(tiny, tmp_path, caplog):
    pytest.importorskip("sklearn")
    judges = []
    for name, first in (("one", 0), ("same", 0), ("another", 100)):
        train(examples(40, first), {}).save(tmp_path / f"{name}.npz")
        judges.append(HarmJudge(str(tmp_path / f"{name}.npz")))
    reward, same, another = judges
    warn_once.cache_clear()
    for judge in (None, VaderJudge(), another):
        PPO(PolicySpec(model=str(tiny)), reward, judge=judge)
    assert not caplog.records
    PPO(PolicySpec(model=str(tiny)), reward, judge=same)
    assert "model.reward and model.judge were trained on 20 common prompts" in caplog.text


def test_splits_share_no_prompt(rows, tmp_path, capsys):
    pytest.importorskip("sklearn")
    for half in "ab":
        argv = ["harm-judge", "--data", str(rows), "--output", str(tmp_path / f"{half}.npz")]
        assert main([*argv, "--split", half]) == 0
    a, b = (HarmJudge(str(tmp_path / f"{half}.npz")) for half in "ab")
    assert a.shared_prompts(b) == 0
    assert a.shared_prompts(a) == len(a.model.prompts) > 5
    assert a.shared_prompts(VaderJudge()) == 0
    assert len(a.model.prompts) + len(b.model.prompts) == 30
    assert all(split_of(e.prompt) == "a" for e in examples() if a.trained_on(e.prompt))
    # A continuation is of the half of its opening.
    assert prompt_key(ask("Hi", "Hello", "Bye")) == prompt_key(ask("hi "))


def test_the_command_says_what_it_made(rows, tmp_path, capsys):
    pytest.importorskip("sklearn")
    safe = tmp_path / "safe.jsonl"
    pair = {"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes please.", "rejected": ""}
    pair["rejected"] = pair["chosen"].replace("Yes", "No")
    safe.write_text(json.dumps(pair) + "\n")
    file = tmp_path / "new" / "harm.npz"
    argv = ["harm-judge", "--data", str(rows), "--safe", str(safe), "--output", str(file)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "60 labelled responses, 30 of them safe; 1 further safe ones; 31 prompts" in out
    assert "AUROC 1.000 (mean of 5 folds by prompt, 1.000 to 1.000)" in out
    judge = HarmJudge(str(file))
    assert judge.version in out
    info = judge.model.info
    assert info["auroc"] == [1.0] * 5
    assert list(info["data"]) == ["rows.jsonl"]  # a name, no place
    assert judge.trained_on(ask("Tea?"))
    assert "r_please" in judge.model.terms  # the chosen reply, not the rejected one
    assert "r_no" not in judge.model.terms


def test_files_of_one_name_in_two_folders_are_both_recorded(rows, tmp_path):
    pytest.importorskip("sklearn")
    lines = rows.read_text().splitlines(keepends=True)
    for part, share in (("round0", lines[:30]), ("round1", lines[30:])):
        (tmp_path / "all" / part).mkdir(parents=True)
        (tmp_path / "all" / part / "train.jsonl").write_text("".join(share))
    file = tmp_path / "harm.npz"
    assert main(["harm-judge", "--data", str(tmp_path / "all"), "--output", str(file)]) == 0
    found = HarmJudge(str(file)).model.info["data"]
    assert list(found) == ["round0/train.jsonl", "round1/train.jsonl"]


def test_folds_are_by_prompt():
    """Responses that give the label away by their prompt's number teach nothing across folds."""
    pytest.importorskip("sklearn")
    rows = [
        Example(prompt=ask(f"number{i}"), response=f"answer{i} word{k}", safe=i % 2 == 0)
        for i in range(40)
        for k in range(3)
    ]
    assert sum(cross_validate(rows)) / 5 < 0.7  # 1 if a prompt were on both sides


@pytest.mark.slow
@pytest.mark.skipif(not BEAVER.exists(), reason=f"the real data is not at {DATA}")
def test_quality_on_beavertails(tmp_path, capsys):
    pytest.importorskip("sklearn")
    argv = ["harm-judge", "--data", str(BEAVER), "--safe", str(HELPFUL)]
    assert main([*argv, "--output", str(tmp_path / "harm.npz")]) == 0
    areas = HarmJudge(str(tmp_path / "harm.npz")).model.info["auroc"]
    assert sum(areas) / 5 == pytest.approx(0.766, abs=0.01)  # docs/judges.md


def test_a_damaged_file_is_told(tmp_path, model):
    """Whatever byte it is: what the library for archives raises then has no common class."""
    file = tmp_path / "harm.npz"
    model.save(file)
    whole = file.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 150, 1)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with suppress(InputError):
            HarmJudge(str(file))


def test_bad_files(tmp_path, model):
    with pytest.raises(InputError, match=r"there is no file .*iqstar harm-judge"):
        HarmJudge(str(tmp_path / "none.npz"))
    bad = tmp_path / "bad.npz"
    for content in (b"", b"PK\x03\x04 not a zip", b"\x80\x04]q."):
        bad.write_bytes(content)
        with pytest.raises(InputError, match="not the file of a harm judge"):
            HarmJudge(str(bad))
    np.savez(bad, other=np.zeros(2))
    with pytest.raises(InputError, match="not the file of a harm judge"):
        HarmJudge(str(bad))
    stream = io.BytesIO()
    np.savez(stream, info=np.frombuffer(b'{"format": 99}', dtype=np.uint8))
    bad.write_bytes(stream.getvalue())
    with pytest.raises(InputError, match="another version of iqstar"):
        HarmJudge(str(bad))


def test_bad_arguments(rows, tmp_path, capsys, monkeypatch):
    def fails(*argv: str) -> str:
        return error_of(capsys, "harm-judge", *argv)

    out = ["--output", str(tmp_path / "harm.npz")]
    assert "--data" in fails(*out)
    assert "must be a file that ends in .npz" in fails("--data", str(rows), "--output", "x.pkl")
    assert "did you mean --split?" in fails("--data", str(rows), *out, "--splits", "a")
    assert "--split: invalid choice" in fails("--data", str(rows), *out, "--split", "c")
    assert "--data: no such file" in fails("--data", "nowhere.jsonl", *out)
    assert "--safe: no such file" in fails("--data", str(rows), "--safe", "nowhere.jsonl", *out)
    assert "give rows of chosen and rejected" in fails(
        "--data", str(rows), "--safe", str(rows), *out
    )
    few = tmp_path / "few.jsonl.gz"
    line = {"prompt": "What?", "response": "That.", "is_safe": True}
    few.write_bytes(gzip.compress(json.dumps(line).encode()))
    pytest.importorskip("sklearn")
    assert "at least 5 different prompts" in fails("--data", str(few), *out)
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({**line, "prompt": f"What {i}?"}) + "\n" for i in range(9)))
    assert "the same is_safe" in fails("--data", str(same), *out)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install scikit-learn" in fails("--data", str(rows), *out)
