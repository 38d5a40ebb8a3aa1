"""Judges."""

from __future__ import annotations

import sys

import pytest

from iqstar.errors import InputError
from iqstar.judges import Judge, VaderJudge
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
    with pytest.raises(InputError, match=r"pip install 'iqstar\[judges\]'"):
        VaderJudge()
