"""The pairwise judge against a stand-in server: orders, cache, retries, silence, nonsense."""

from __future__ import annotations

import json
import math
import socket
import time

import pytest

from chat_stand_in import chat_stand_in, completion, prefers, shown
from iqstar.errors import InputError
from iqstar.judges import Comparison, PairwiseJudge, Tally, WinRateJudge
from iqstar.judges.base import warn_once
from iqstar.judges.pairwise import parse_verdict
from iqstar.mdp import Message, Prompt

PROMPT = Prompt(messages=(Message(role="user", content="Who are you?"),))
KEY = "sk-not-to-be-seen"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Warnings are told once a process, which all tests share."""
    warn_once.cache_clear()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def judge(tmp_path):
    """Makes judges at an address that do not wait long."""

    def make(url: str, **given) -> PairwiseJudge:
        settings = {"backoff": 0.001, "timeout": 5.0, "cache": str(tmp_path / "answers.jsonl")}
        return PairwiseJudge(**{"model": "judge", "url": url, **settings, **given})

    return make


def one(judge: PairwiseJudge, first: str = "good", second: str = "bad") -> Comparison:
    (comparison,) = judge.compare([PROMPT], [first], [second])
    return comparison


def test_both_orders_are_asked(judge):
    with chat_stand_in(prefers("good")) as server:
        assert one(judge(server.url)) == Comparison(verdict="win", orders=("win", "win"))
        assert sorted(map(shown, server.asked)) == [("bad", "good"), ("good", "bad")]
        assert one(judge(server.url), "bad", "good").verdict == "loss"
        assert one(judge(server.url), "good", "very good").verdict == "tie"
    for body in server.asked:
        assert body["model"] == "judge"
        assert body["temperature"] == 0
        assert "[user]\nWho are you?" in body["messages"][-1]["content"]


def test_pairs_keep_their_places(judge):
    firsts = ["good 0", "bad 1", "good 2", "bad 3", "so so 4"]
    seconds = ["bad 0", "good 1", "good 2!", "bad 3!", "good 4"]
    with chat_stand_in(prefers("good")) as server:
        found = judge(server.url).compare([PROMPT] * 5, firsts, seconds)
    assert [c.verdict for c in found] == ["win", "loss", "tie", "tie", "loss"]
    assert all(c.consistent for c in found)
    with pytest.raises(ValueError, match="2 prompts, 1 and 2 responses"):
        judge(server.url).compare([PROMPT] * 2, ["a"], ["b", "c"])


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_verdict_that_follows_the_order_is_a_tie(judge, letter):
    with chat_stand_in(lambda body: completion(f"[[{letter}]]")) as server:
        comparison = one(judge(server.url))
    assert comparison.verdict == "tie"
    assert not comparison.consistent
    assert set(comparison.orders) == {"win", "loss"}
    assert Tally.of([comparison]) == Tally(wins=0, ties=1, losses=0, inconsistent=1, missing=0)


def test_a_win_in_one_order_only_is_a_tie(judge):
    """Shown first it wins, shown second it ties."""
    answers = {("good", "bad"): "[[A]]", ("bad", "good"): "[[C]]"}
    with chat_stand_in(lambda body: completion(answers[shown(body)])) as server:
        assert one(judge(server.url)).verdict == "tie"


def test_tally():
    verdicts = ["win", "win", "tie", "loss", None]
    pairs = [Comparison(verdict=v, orders=(v, v)) for v in verdicts]
    tally = Tally.of(pairs)
    assert tally == Tally(wins=2, ties=1, losses=1, inconsistent=0, missing=1)
    assert tally.win_rate == 2.5 / 4
    assert math.isnan(Tally.of(pairs[-1:]).win_rate)


def test_known_answers_are_not_asked_for(judge):
    with chat_stand_in(prefers("good")) as server:
        first = one(judge(server.url))
        assert len(server.asked) == 2
        assert one(judge(server.url)) == first
        assert len(server.asked) == 2
        # All that may decide an answer makes it another question.
        for change in (
            {"model": "other"},
            {"criterion": "Which is shorter?"},
            {"options": {"temperature": 1}},
        ):
            other = judge(server.url, **change)
            assert other.version != judge(server.url).version
            before = len(server.asked)
            assert one(other) == first
            assert len(server.asked) == before + 2
        one(judge(server.url), "good!")
        assert len(server.asked) == 10


def test_an_interrupted_file_goes_on(judge, tmp_path):
    file = tmp_path / "answers.jsonl"
    with chat_stand_in(prefers("good")) as server:
        one(judge(server.url))
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])  # in the middle of the second answer
        assert one(judge(server.url)).verdict == "win"
        assert len(server.asked) == 3
        one(judge(server.url))
        assert len(server.asked) == 3
    assert len(file.read_bytes().splitlines()) == 3  # one of them is the cut one


def test_options_may_take_fields_out(judge):
    with chat_stand_in(prefers("good")) as server:
        one(judge(server.url, options={"max_tokens": None, "max_completion_tokens": 9}))
    assert "max_tokens" not in server.asked[0]
    assert server.asked[0]["max_completion_tokens"] == 9


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failure_that_passes_is_retried(judge, status):
    seen: set[tuple[str, str]] = set()

    def answer(body):
        if shown(body) in seen:
            return prefers("good")(body)
        seen.add(shown(body))
        return status, "busy"

    with chat_stand_in(answer) as server:
        assert one(judge(server.url)).verdict == "win"
    assert len(server.asked) == 4


def test_pauses_grow_and_heed_the_server(judge, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with chat_stand_in(lambda body: (503, "busy")) as server:
        one(judge(server.url, backoff=1.0, retries=3, workers=1))
        first = pauses[:3]
        assert 0.7 < first[0] < 1.3 < first[1] < 2.6 < first[2] < 5.1
        pauses.clear()
        server.headers["Retry-After"] = "30"
        one(judge(server.url, retries=1, workers=1), "other")
        assert pauses == [30.0, 30.0]
        server.headers["Retry-After"] = "86400"
        pauses.clear()
        one(judge(server.url, retries=1, workers=1), "another")
        assert max(pauses) == 60.0


def test_a_time_out_is_no_verdict(judge, caplog):
    with chat_stand_in(lambda body: completion("[[A]]")) as server:
        server.answer = lambda body: (200, str(server.closing.wait(10)))
        start = time.monotonic()
        found = one(judge(server.url, timeout=0.1, retries=1))
        assert time.monotonic() - start < 5
    assert found == Comparison(verdict=None, orders=(None, None))
    assert Tally.of([found]).missing == 1
    assert len(server.asked) == 4
    (record,) = caplog.records
    assert "timed out" in record.message
    assert "counted as missing" in record.message


@pytest.mark.parametrize(
    "answer",
    [
        (200, "<html>Welcome</html>"),
        (200, "[]"),
        (200, '{"choices": []}'),
        completion(None),
        completion("I like both."),
        completion("[[A]] or rather [[B]]"),
        completion("[A]"),
        (400, "too long"),
    ],
)
def test_nonsense_is_no_verdict(judge, tmp_path, answer, caplog):
    with chat_stand_in(lambda body: answer) as server:
        found = one(judge(server.url, retries=2, workers=1))
        assert found.verdict is None
        assert found.orders == (None, None)
        times = 1 if answer[0] == 400 else 3
        assert len(server.asked) == 2 * times
        assert not (tmp_path / "answers.jsonl").exists()
        assert len(caplog.records) == 1
        server.answer = prefers("good")
        assert one(judge(server.url)).verdict == "win"


def test_a_model_without_verdicts_is_given_up_and_the_remedy_told(judge, caplog, monkeypatch):
    """As one that thinks beyond its tokens: it answers at once, so nothing is waited for."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    firsts = [f"good {i}" for i in range(50)]
    with chat_stand_in(lambda body: completion("<think>Let me see")) as server:
        thinking = judge(server.url, backoff=1.0, retries=1, workers=1)
        found = thinking.compare([PROMPT] * 50, firsts, ["bad"] * 50)
    assert [c.verdict for c in found] == [None] * 50
    assert len(server.asked) == 8 * 2
    assert set(pauses) == {0.0}
    assert "options.max_tokens" in caplog.text


def test_one_verdict_among_the_first_is_hope(judge):
    """The second question has a verdict, the others have none: all are asked for."""

    def answer(body):
        return completion("[[C]]" if "good 1." in shown(body) else "Hard to tell.")

    firsts = [f"good {i}." for i in range(20)]
    with chat_stand_in(answer) as server:
        found = judge(server.url, retries=0, workers=1).compare([PROMPT] * 20, firsts, ["bad"] * 20)
    assert [c.verdict for c in found] == [None, "tie", *[None] * 18]
    assert len(server.asked) == 40


def test_a_refused_pair_is_no_outage(judge):
    """Four of a prompt that is too long, side by side: the others are asked all the same."""
    long = Prompt(messages=(Message(role="user", content="Much too long."),))

    def answer(body):
        if "Much too long." in body["messages"][-1]["content"]:
            return 400, "maximum context length"
        return prefers("good")(body)

    prompts = [PROMPT] * 2 + [long] * 4 + [PROMPT] * 2
    responses = [f"good {i}" for i in range(8)]
    with chat_stand_in(answer) as server:
        found = judge(server.url, workers=1).compare(prompts, responses, ["bad"] * 8)
    assert [pair.verdict for pair in found] == ["win"] * 2 + [None] * 4 + ["win"] * 2


def test_one_order_without_a_verdict_leaves_none(judge):
    def answer(body):
        return completion("[[A]]" if shown(body)[0] == "good" else "Hm.")

    with chat_stand_in(answer) as server:
        found = one(judge(server.url, retries=0))
    assert found == Comparison(verdict=None, orders=("win", None))


def test_a_dead_endpoint_is_given_up(judge, caplog):
    with socket.socket() as held:  # nothing listens at a bound port
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        many = [f"good {i}" for i in range(50)]
        start = time.monotonic()
        slow = judge(url, retries=1, backoff=0.1, workers=1)
        found = slow.compare([PROMPT] * 50, many, many)
    assert [c.verdict for c in found] == [None] * 50
    assert time.monotonic() - start < 3  # 3 requests with a pause each, not 100
    assert len(caplog.records) == 1


def test_a_wrong_key_ends_the_asking(judge, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_stand_in(lambda body: (401, f"Incorrect API key provided: {KEY}")) as server:
        found = judge(server.url, workers=1).compare([PROMPT] * 3, ["a"] * 3, ["b"] * 3)
    assert [c.verdict for c in found] == [None] * 3
    assert len(server.asked) == 1
    assert "set the environment variable OPENAI_API_KEY" in caplog.text
    assert KEY not in caplog.text


def test_the_key_is_sent_and_kept_nowhere(judge, monkeypatch, tmp_path):
    with chat_stand_in(prefers("good")) as server:
        one(judge(server.url))
        assert server.keys == [None, None]
        monkeypatch.setenv("MY_KEY", KEY + "\n")
        other = judge(server.url, api_key_env="MY_KEY")
        one(other, "good!")
        assert server.keys[2:] == [f"Bearer {KEY}"] * 2
        assert KEY not in (tmp_path / "answers.jsonl").read_text()
        assert KEY not in repr(vars(other)) + repr(vars(other.endpoint)) + other.version
        # A redirection could carry it elsewhere.
        with chat_stand_in(prefers("good")) as elsewhere:
            server.answer = lambda body: (302, "")
            server.headers["Location"] = f"{elsewhere.url}/chat/completions"
            assert one(other, "good?").verdict is None
        assert elsewhere.asked == []


def test_win_rate_against_the_data_sets_responses(judge):
    prompts = [
        Prompt(messages=PROMPT.messages, response="bad"),
        PROMPT,
        Prompt(messages=PROMPT.messages, response="good"),
        Prompt(messages=PROMPT.messages, response="a good one"),
    ]
    with chat_stand_in(prefers("good")) as server:
        pairwise = judge(server.url)
        win_rate = WinRateJudge(pairwise)
        scores = win_rate.score(prompts, ["good", "good", "bad", "good"])
        assert win_rate.score([PROMPT], ["good"]) == pytest.approx([math.nan], nan_ok=True)
        assert len(server.asked) == 4  # the first pair and the third ask the same two questions
        silent = Prompt(messages=PROMPT.messages, response="")
        assert win_rate.score([silent], ["good"]) == [1.0]
    assert scores == pytest.approx([1.0, math.nan, 0.0, 0.5], nan_ok=True)
    assert win_rate.version == pairwise.version


def test_verdicts():
    assert parse_verdict("B is shorter, so: [[B]]") == "B"
    assert parse_verdict("[[A]] … and so [[A]]") == "A"
    assert parse_verdict("[[D]]") is None
    assert parse_verdict("") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "localhost:8000"}, r"PairwiseJudge.url: 'localhost:8000' is no address"),
        ({"url": "file:///etc/passwd"}, "PairwiseJudge.url"),
        ({"timeout": 0.0}, "PairwiseJudge.timeout: must be at least"),
        ({"retries": -1}, "PairwiseJudge.retries"),
        ({"workers": 0}, "PairwiseJudge.workers"),
    ],
)
def test_settings_that_make_no_sense(judge, given, message):
    with pytest.raises(InputError, match=message):
        judge(**{"url": "http://localhost:1/v1", **given})


def test_a_file_of_answers_that_is_none(judge, tmp_path, caplog):
    with pytest.raises(InputError, match=r"cache: .* cannot be read"):
        judge("http://localhost:1/v1", cache=str(tmp_path))
    (tmp_path / "odd.jsonl").write_text('[]\n"x"\n\xff\n{"key": 1}\n')
    (tmp_path / "file").write_text("")
    with chat_stand_in(prefers("good")) as server:
        assert one(judge(server.url, cache=str(tmp_path / "odd.jsonl"))).verdict == "win"
        # What cannot be kept is asked for all the same.
        cache = str(tmp_path / "file" / "answers.jsonl")
        assert one(judge(server.url, cache=cache), "good!").verdict == "win"
    assert "cannot be kept" in caplog.text


def test_a_line_of_the_file_names_its_model(judge, tmp_path):
    with chat_stand_in(prefers("good")) as server:
        one(judge(server.url))
    lines = [json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"key", "model", "answer"}] * 2
    assert {line["model"] for line in lines} == {"judge"}
