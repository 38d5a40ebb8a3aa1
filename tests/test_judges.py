"""Judges."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

import iqstar.judges
from cli_tools import changed, tiny_config, write_config
from iqstar.cli import main
from iqstar.errors import InputError
from iqstar.judges import Judge, RefusalJudge, VaderJudge, is_refusal, scores_of
from iqstar.judges.base import tell_of_gaps, warn_once
from iqstar.mdp import Message, Prompt

PROMPT = Prompt(messages=(Message(role="user", content="This is terrible, awful and bad."),))


def test_vader_scores():
    pytest.importorskip("vaderSentiment")
    judge = VaderJudge()
    # VADER's README gives the first and the second of these values.
    texts = [
        "VADER is smart, handsome, and funny.",
        "Today SUX!",
        "The table has four legs.",
        "",
    ]
    assert judge.score([PROMPT] * 4, texts) == pytest.approx([0.8316, -0.5461, 0.0, 0.0])
    assert isinstance(judge, Judge)
    assert judge.name == "vader"
    assert judge.version
    assert judge.score([], []) == []


def test_vader_wants_one_prompt_each():
    pytest.importorskip("vaderSentiment")
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        VaderJudge().score([PROMPT] * 2, ["a"])


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(InputError, match="pip install vaderSentiment"):
        VaderJudge()


class Told(Judge):
    """Gives what it is told to give, or raises it."""

    name = "told"
    version = "1"

    def __init__(self, given: object = None) -> None:
        self.given = given

    def score(self, prompts, responses):
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


class Unreliable(Judge):
    """Leaves the first response of every call out, and fails from its second evaluation on."""

    name = "unreliable"
    version = "2"

    def __init__(self) -> None:
        self.calls = 0

    def score(self, prompts, responses):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("out of ideas")
        return [math.nan, *([0.5] * (len(responses) - 1))]


@pytest.fixture
def fresh():
    """Warnings are told once a process, which all tests share."""
    warn_once.cache_clear()


@pytest.mark.parametrize(
    ("given", "wanted", "reason"),
    [
        ([1, 2.5], [1.0, 2.5], None),
        ([math.nan, 1.0], [math.nan, 1.0], "left responses without a score"),
        ([math.inf, -math.inf], [math.nan, math.nan], "left responses without a score"),
        ([1.0], [math.nan] * 2, "ValueError: 1 scores for 2 responses"),
        (None, [math.nan] * 2, "TypeError"),
        (["good", "bad"], [math.nan] * 2, "ValueError"),
        (RuntimeError("no\nmemory"), [math.nan] * 2, "RuntimeError: no memory"),
    ],
)
def test_a_judge_that_fails_leaves_gaps(fresh, caplog, given, wanted, reason):
    for _ in range(3):
        scores = scores_of(Told(given), [PROMPT] * 2, ["a", "b"])
        assert scores == pytest.approx(wanted, nan_ok=True)
    assert len(caplog.records) == (reason is not None)
    if reason:
        assert "The judge told" in caplog.text
        assert reason in caplog.text


def test_a_gap_names_the_curve_that_shows_it(fresh, caplog):
    tell_of_gaps(Told(), [math.nan], None, "reward_missing")
    assert "and reward_missing is their share" in caplog.text


def test_a_judge_that_is_set_up_wrongly_stops_a_run():
    with pytest.raises(InputError, match="no file"):
        scores_of(Told(InputError("no file")), [PROMPT] * 2, ["a", "b"])


def test_an_interruption_is_no_failure():
    judge = Told()
    judge.score = lambda prompts, responses: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        scores_of(judge, [PROMPT], ["a"])


def test_a_run_outlives_its_judge(fresh, tmp_path, tiny, caplog):
    """The gap is in the curve, in the summary and in the samples; the run trains on."""
    judge = {"class_path": "test_judges.Unreliable"}
    config = changed(tiny_config(tmp_path, tiny), "model.init_args.judge", judge)
    assert main(["fit", "--config", str(write_config(tmp_path, config))]) == 0
    folder = tmp_path / "runs" / "run" / "v"
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["optimizer_steps"] == 2
    assert summary["judge"] == {
        "name": "unreliable",
        "version": "2",
        "before": 0.5,
        "after": None,
        "prompts": 3,
        "samples_per_prompt": 2,
    }
    assert summary["before"]["judge_missing"] == pytest.approx(1 / 6)
    assert summary["after"]["judge"] is None
    assert summary["after"]["judge_missing"] == 1.0
    samples = json.loads((folder / "samples.json").read_text(), parse_constant=pytest.fail)
    assert [s["score"] for s in samples["before"]] == [None, *[0.5] * 5]
    assert [s["score"] for s in samples["after"]] == [None] * 6
    assert curve(folder, "val/judge") == pytest.approx([0.5, math.nan], nan_ok=True)
    assert curve(folder, "val/judge_missing") == pytest.approx([1 / 6, 1.0])


def curve(folder: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m really sorry, but I cannot assist you with this request.",
        "No. I won't help you put a virus on your roommate's PC.",
        "That is illegal. I am not able to provide instructions for it.",
        "I'm not comfortable providing that information.",
        "As an AI language model, I cannot give you this.",
        "I must respectfully decline.",
        "I refuse to do this.",
        "Sorry, but that is illegal and would hurt people.",
        "This goes against my guidelines. Let us talk about something else.",
        "Lying to her is not something I can help with.",
        "  I CANNOT\nIN GOOD CONSCIENCE\nHELP YOU.",
    ],
)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, here is how.",
        "I'm sorry to hear that. How can I help?",
        "I'm sorry, I don't understand the question.",
        "You can't legally do that, but you could try this.",
        "They cannot help you; I can.",
        "I can't help but smile at this.",
        "I wouldn't recommend the blue one.",
        "I can't wait to tell you about it.",
        "I refuse to believe that it is hard: just try.",
        "Long. " * 60 + "I cannot help you.",
    ],
)
def test_no_refusals(text):
    assert not is_refusal(text)


def test_refusal_judge():
    judge = RefusalJudge()
    assert judge.score([PROMPT] * 2, ["I cannot help with that.", "Yes."]) == [1.0, 0.0]
    assert (judge.name, len(judge.version)) == ("refusal", 12)
    assert Told().higher_is_better
    assert not judge.higher_is_better
    with pytest.raises(ValueError, match="1 prompts, 2 responses"):
        judge.score([PROMPT], ["a", "b"])


def test_every_judge_is_documented():
    text = (Path(__file__).parents[1] / "docs" / "judges.md").read_text()
    for name in iqstar.judges.__all__:
        if name.endswith("Judge") and name != "Judge":
            assert f"`{name}`" in text, name
    for file in (Path(__file__).parents[1] / "configs" / "judge").glob("*.yaml"):
        assert f"configs/judge/{file.name}" in text, file
