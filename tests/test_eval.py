"""``iqstar eval``: tables by hand, a run from end to end, a page that nothing escapes from."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from cli_tools import changed, error_of, tiny_config, write_config
from iqstar import InverseQStar
from iqstar.cli import main
from iqstar.commands import eval as command
from iqstar.data import BeaverTails
from iqstar.data.categories import categories_by_prompt
from iqstar.errors import InputError
from iqstar.estimators import NullEstimator
from iqstar.judges import HarmJudge, Judge, RefusalJudge, VaderJudge, WinRateJudge
from iqstar.loading import load_policy, load_reference
from iqstar.mdp import Message, Prompt
from iqstar.metrics import distinct_n
from iqstar.paired_responses import (
    Pair,
    Response,
    Telling,
    read_pairs,
    sample_pairs,
    write_pairs,
)
from iqstar.policy import PolicySpec
from iqstar.report.build import build_report, judge_report, safety_report
from iqstar.report.figures import histogram, means, outcome_bar, scatter
from iqstar.report.kept import stamp
from iqstar.report.measures import distinct_interval, kl_interval
from iqstar.report.page import page
from iqstar.report.scores import Scores, distinct_judges, score_pairs
from iqstar.report.tables import SafetyRow, outcomes, safety_table
from iqstar.rollouts import GenerateRollout
from tiny import CHAT_TEMPLATE

NAN = float("nan")
EVIL = "</td><script>alert('x')</script><img src=http://evil.example/a.png> [bold]"


class CountingJudge(Judge):
    """Scores by the number of vowels; harmless."""

    name = "vowels"
    version = "1"
    measures_safety = False

    def score(self, prompts, responses):
        return [sum(r.count(v) for v in "aeiou") / (1 + len(r)) for r in responses]


class SafetyJudge(CountingJudge):
    """Takes the same for a probability."""

    name = "safety"
    measures_safety = True


class BrokenJudge(Judge):
    """Cannot be reached."""

    name = "broken"
    version = "2"

    def score(self, prompts, responses):
        raise ConnectionError("no route\nto <b>host</b>")


def ask(text):
    return (Message(role="user", content=text),)


def pair(number, policy="yes", reference="no", sample=0, tokens=2, kl=0.5):
    return Pair(
        number=number,
        sample=sample,
        seed=7,
        messages=ask(f"question {number}"),
        policy=Response(text=policy, tokens=tokens, truncated=False, kl=kl),
        reference=Response(text=reference, tokens=3, truncated=True),
    )


def scored(name, policy, reference, **options):
    return Scores(name=name, version="1", policy=policy, reference=reference, **options)


# ---- tables, by hand


def test_win_tie_lose():
    policy, reference = [0.5, 0.5, 0.5, NAN, 0.1], [0.5, 0.39, 0.6, 0.0, 0.9]
    assert outcomes(policy, reference) == ["tie", "win", "loss", None, "loss"]
    assert outcomes(policy, reference, margin=0.2) == ["tie", "tie", "tie", None, "loss"]


def test_judge_report():
    report = judge_report(
        scored("j", [1.0, 0.0, NAN, 0.5], [0.0, 0.0, 1.0, 1.0]), [0, 0, 1, 1], 0.0
    )
    assert (report["wins"], report["ties"], report["losses"]) == (1, 1, 1)
    assert report["win_share"]["value"] == pytest.approx(1 / 3)
    assert report["policy"]["value"] == pytest.approx(0.5)
    assert report["reference"]["value"] == pytest.approx(0.5)
    # Only pairs that are scored on both sides: (1 + 0 − ½)/3, not ½ − ½.
    assert report["difference"]["value"] == pytest.approx(1 / 6)
    assert report["unscored"] == {"policy": 1, "reference": 0}
    # Prompt 0 gains ½ in the mean of its two responses, prompt 1 loses ½.
    assert report["difference"]["low"] == pytest.approx(-0.5)
    assert report["difference"]["high"] == pytest.approx(0.5)


def test_safety_table():
    rows = safety_table(
        units=[0, 0, 1, 2, 3],
        categories=[{"weapons", "drugs"}, {"weapons", "drugs"}, {"drugs"}, (), {"drugs"}],
        safety=[0.9, 0.2, 0.5, 0.4, NAN],
        compared=["win", "loss", "tie", "win", "win"],
    )
    empty = dict.fromkeys(vars(rows[0]), 0)
    drugs = {"prompts": 3, "safe_better": 1, "unsafe_worse": 1, "safe_tie": 1, "unscored": 1}
    weapons = {"prompts": 1, "safe_better": 1, "unsafe_worse": 1}
    total = {**drugs, "prompts": 4, "unsafe_better": 1}
    assert rows == [
        SafetyRow(**{**empty, "category": "drugs", **drugs}),
        SafetyRow(**{**empty, "category": "weapons", **weapons}),
        SafetyRow(**{**empty, "category": "no category", "prompts": 1, "unsafe_better": 1}),
        SafetyRow(**{**empty, "category": "all prompts", **total}),
    ]
    strict = safety_table([0], [{"drugs"}], [0.9], ["win"], threshold=0.95)
    assert (strict[0].safe_better, strict[0].unsafe_better) == (0, 1)


def test_a_judge_without_scores_decides_nothing():
    """Neither what is better nor what is safe, where another one can; and gaps are told of."""
    pairs = [pair(0), pair(1)]
    categories = {p.messages: {"drugs"} for p in pairs}
    gone = scored("gone", [NAN, NAN], [NAN, NAN], error="no route", measures_safety=True)
    harm = scored("harm", [0.9, 0.2], [0.1, NAN], measures_safety=True)
    report = build_report({}, pairs, [gone, harm], categories)
    assert (report["safety"]["judge"], report["safety"]["better_by"]) == ("harm", "harm")
    assert report["notes"] == [
        "the judge gone failed: no route",
        "the judge harm left 1 of 4 responses without a score; its figures are of the others",
    ]


def test_which_judge_decides_what():
    pairs = [pair(0), pair(1)]
    categories = {p.messages: {"drugs"} for p in pairs}
    kind = scored("kind", [1.0, 0.0], [0.0, 1.0])
    harm = scored("harm", [0.9, 0.8], [0.1, 0.9], measures_safety=True)

    def table(scores, name=None):
        return safety_report(pairs, scores, categories, 0.0, 0.5, name)

    both = table([kind, harm])[0]
    assert (both["judge"], both["better_by"]) == ("harm", "kind")
    assert both["safe_share"]["policy"]["value"] == 1
    assert both["safe_share"]["reference"]["value"] == 0.5
    alone = table([harm])[0]
    assert (alone["judge"], alone["better_by"]) == ("harm", "harm")
    assert (alone["rows"][0]["safe_better"], alone["rows"][0]["safe_worse"]) == (1, 1)
    assert table([kind, harm], "kind")[0]["judge"] == "kind"
    refusal = scored("refusal", [1.0, 1.0], [0.0, 0.0], higher_is_better=False)
    assert table([refusal, harm])[0]["better_by"] == "harm"
    assert table([refusal, harm, kind])[0]["better_by"] == "kind"
    assert "no judge measures safety" in table([kind])[1]
    assert "names no categories" in safety_report(pairs, [harm], {}, 0.0, 0.5, None)[1]


def test_scores_say_whether_more_is_better():
    assert not score_pairs(RefusalJudge(), "refusal", [pair(0)]).higher_is_better
    assert score_pairs(CountingJudge(), "vowels", [pair(0)]).higher_is_better


def test_categories_are_the_union_over_a_prompts_rows(tmp_path):
    def row(prompt, response, **category):
        names = {"drugs": False, "weapons": False, **category}
        return {"prompt": prompt, "response": response, "category": names, "is_safe": True}

    rows = [
        row("How?", "a", drugs=True),
        row(" How? ", "b", weapons=True),
        row("Why?", "c"),
        row("Other?", "d", drugs=True),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = BeaverTails(path=str(file))
    found = categories_by_prompt(data, [Prompt(messages=ask("How?")), Prompt(messages=ask("Why?"))])
    assert found == {ask("How?"): {"drugs", "weapons"}, ask("Why?"): set()}
    assert categories_by_prompt(data, [Prompt(messages=ask("Never?"))]) == {}


# ---- figures with intervals


def test_kl_is_a_mean_over_tokens():
    rows = [pair(0, kl=1.0, tokens=1).policy, pair(1, kl=2.0, tokens=3).policy]
    found = kl_interval(rows, [0, 1])
    assert found.value == pytest.approx(3 / 4)
    assert (found.low, found.high) == pytest.approx((2 / 3, 1.0))
    assert math.isnan(kl_interval([pair(0).reference], [0]).value)


def test_distinct_n_and_its_jackknife():
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdef", k=9)) for _ in range(12)]
    units = [i // 3 for i in range(12)]
    found = distinct_interval(texts, units, 2)
    left_out = [
        distinct_n([t for t, u in zip(texts, units, strict=True) if u != unit], 2)
        for unit in range(4)
    ]
    mean = sum(left_out) / 4
    error = math.sqrt(3 / 4 * sum((d - mean) ** 2 for d in left_out))
    assert found.value == pytest.approx(distinct_n(texts, 2))
    assert found.high - found.value == pytest.approx(1.959964 * error)
    assert found.value - found.low == pytest.approx(1.959964 * error)
    assert math.isnan(distinct_interval(["a b"], [0], 2).low)
    assert math.isnan(distinct_interval(["a"], [0], 2).value)


# ---- judges


def test_judges_of_one_name():
    first, second = CountingJudge(), CountingJudge()
    other = CountingJudge()
    other.version = "9"
    found = distinct_judges([first, second, SafetyJudge()])
    assert list(found) == ["vowels", "safety"]
    assert found["vowels"] is first
    assert list(distinct_judges([first, other])) == ["vowels 1", "vowels 9"]


def test_a_judge_with_the_wrong_number_of_scores():
    judge = CountingJudge()
    judge.score = lambda prompts, responses: [math.inf]
    found = score_pairs(judge, "vowels", [pair(0), pair(1)])
    assert found.error == "ValueError: 1 scores for 2 responses"
    assert all(map(math.isnan, found.policy + found.reference))
    found = score_pairs(judge, "vowels", [pair(0)])
    assert found.error is None
    assert math.isnan(found.policy[0])


def test_a_judge_that_compares_compares_the_two_sides():
    class Longer(WinRateJudge):
        version = "1"

        def __init__(self):
            pass

        def score(self, prompts, responses):
            sides = zip(prompts, responses, strict=True)
            return [float(len(r) > len(p.response)) for p, r in sides]

    found = score_pairs(Longer(), "longer", [pair(0, "long", "short"), pair(1, "longest", "short")])
    assert (found.policy, found.reference) == ([0.0, 1.0], [1.0, 0.0])


def test_the_harm_judge_measures_safety_and_says_what_it_was_trained_on():
    judge = HarmJudge.__new__(HarmJudge)
    judge.version = "1"
    judge.score = lambda prompts, responses: [0.5] * len(responses)
    judge.trained_on = lambda prompt: prompt.messages == ask("question 1")
    pairs = [pair(0), pair(1), pair(1, sample=1)]
    assert score_pairs(judge, "harm", pairs).measures_safety
    assert not score_pairs(VaderJudge(), "vader", pairs).measures_safety
    (note,) = command.known_prompts({"harm": judge, "vader": VaderJudge()}, pairs)
    assert note.startswith("the judge harm was trained on 1 of the 2 prompts")


# ---- sampling


def test_both_sides_are_sampled_with_the_same_numbers(tiny):
    spec = PolicySpec(model=str(tiny))
    chat = spec.chat()
    batches = [[Prompt(messages=ask(f"Hi {i}")) for i in range(2)], [Prompt(messages=ask("Ho"))]]
    options = {"like": GenerateRollout(5), "samples": 3, "seed": 1}
    same = list(sample_pairs(load_reference(spec, chat), batches, **options))
    assert [(p.number, p.sample) for p in same] == [(n, s) for n in range(3) for s in range(3)]
    assert all(p.policy.text == p.reference.text and p.policy.kl == 0 for p in same)
    assert [p.messages[0].content for p in same[::3]] == ["Hi 0", "Hi 1", "Ho"]
    policy = load_policy(spec, chat)
    with torch.no_grad():
        policy.actor.plain.get_output_embeddings().weight.mul_(1.5)
    moved = list(sample_pairs(policy, batches, **options))
    assert [p.reference for p in moved] == [p.reference for p in same]
    assert all(p.policy.kl > 0 for p in moved)
    assert all(1 <= p.policy.tokens <= 5 for p in moved)


def test_a_told_policy_answers_another_prompt_and_is_compared_on_its_own_tokens(tiny):
    spec = PolicySpec(model=str(tiny))
    policy = load_reference(spec, spec.chat())
    chat, net = policy.actor.chat, policy.actor.model
    batches = [[Prompt(messages=ask(f"Hi {i}")) for i in range(3)]]
    options = {"like": GenerateRollout(5), "samples": 2, "seed": 1}
    telling = Telling(principle=" Be kind. ", placement="after_user")
    plain = list(sample_pairs(policy, batches, **options))
    pairs = list(sample_pairs(policy, batches, telling=telling, **options))
    assert [p.reference for p in pairs] == [p.reference for p in plain]
    assert [p.messages for p in pairs] == [p.messages for p in plain]
    assert any(p.policy.text != p.reference.text for p in pairs)
    told = [Prompt(messages=ask(f"Hi {i}\n\nBe kind.")) for i in range(3)]
    rollout = GenerateRollout(5, 2).sample(policy.actor, told, 1.0, pairs[0].seed)
    for row, (found, ids) in enumerate(zip(pairs, rollout.responses, strict=True)):
        assert found.policy.text == chat.decode(ids)
        logps = []
        for context in (
            chat.prompt_ids(ask(f"Hi {row // 2}"), "Be kind.", "after_user"),
            chat.prompt_ids(ask(f"Hi {row // 2}")),
        ):
            logits = net(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
            logps.append(logits[:, : chat.vocab_size].double().log_softmax(-1))
        kl = (logps[0].exp() * (logps[0] - logps[1])).sum()
        assert found.policy.kl == pytest.approx(float(kl), rel=1e-4)
        assert kl > 0


def test_pairs_come_back_from_their_file(tmp_path):
    pairs = [pair(0, "a\u2028b\r\n\x85c", '"'), pair(1)]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


# ---- the page


class Reader(HTMLParser):
    """Collects tags and text, and fails where they are not nested."""

    EMPTY = ("meta", "rect", "circle", "path")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def planted():
    """A report whose every text is hostile."""
    pairs = [pair(0, EVIL, "no"), pair(1, "yes", EVIL)]
    pairs[0] = Pair(**{**vars(pairs[0]), "messages": ask(EVIL)})
    scores = [
        scored(EVIL, [0.9, 0.1], [0.2, 0.3], measures_safety=True),
        scored("gone", [NAN, NAN], [NAN, NAN], error=EVIL),
    ]
    about = {
        "iqstar": "0",
        "policy": {"kind": "checkpoint", "path": EVIL},
        "reference": EVIL,
        "settings": {"seed_everything": 0, "--policy": EVIL},
    }
    report = build_report(about, pairs, scores, {pairs[0].messages: {EVIL}}, notes=[EVIL])
    return report, pairs, scores


def check_self_contained(text):
    read = Reader(text)
    assert not {"script", "img", "link", "iframe", "a"} & set(read.tags)
    names = {name for name, _ in read.attributes}
    assert not {n for n in names if n.startswith("on")} | names & {"src", "href", "style"}
    assert re.findall(r"(?i)url\(|@import", text) == []
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes
    return read


def test_page_escapes_every_text():
    text = page(*planted())
    read = check_self_contained(text)
    assert "<script" not in text
    assert "<img" not in text
    assert read.text.count("alert('x')") >= 8
    assert read.tags.count("svg") == 4  # of the judge that has scores
    assert "No score." in read.text


def test_report_is_plain_json():
    report, _, _ = planted()
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text) == report
    assert report["judges"][1]["policy"] == {"value": None, "low": None, "high": None}
    assert report["sides"]["reference"]["kl"]["value"] is None


def test_plots():
    values = {"policy": [0.0, 1.0, NAN], "reference": [0.5]}
    bars = re.findall(r'class="policy" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"',
                      histogram("h", values))  # fmt: skip
    heights = [float(height) for _, height in bars]
    assert [i for i, h in enumerate(heights[:20]) if h] == [0, 19]
    assert heights[0] == heights[19] == pytest.approx(76)  # half of the reference's one bin
    assert all(float(a[0]) < float(b[0]) for a, b in pairwise(bars[:20]))
    assert histogram("h", {"policy": [NAN], "reference": []}) == ""
    assert scatter("s", {"policy": [(3.0, NAN)], "reference": []}) == ""
    assert scatter("s", {"policy": [(3.0, 1.0)], "reference": [(3.0, 1.0)]}).count("<circle") == 2
    assert outcome_bar("o", {"wins": 0, "ties": 0, "losses": 0}) == ""
    assert "loss 3" in outcome_bar("o", {"wins": 1, "ties": 0, "losses": 3})
    nothing = {"value": None, "low": None, "high": None}
    assert means("m", {"policy": nothing, "reference": nothing}) == ""


# ---- the command


@pytest.fixture
def config(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judged = changed(tiny_config(tmp_path, tiny), "model.init_args.judge", {
        "class_path": "test_eval.CountingJudge"
    })  # fmt: skip
    fast = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-2}}
    return changed(judged, "model.init_args.optimizer", fast)


@pytest.fixture
def trained(tmp_path, config):
    """A run of two steps, its config, and its checkpoint."""
    file = write_config(tmp_path, config)
    assert main(["fit", "--config", str(file)]) == 0
    return file, tmp_path / "runs" / "run" / "v"


def test_the_settings_that_a_run_keeps_serve_other_commands(trained, tmp_path, capsys):
    """They hold Lightning's own options and the command line's, but not what it went on from."""
    file, run = trained
    last = ["--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert main(["fit", "--config", str(file), *last]) == 0
    kept = run / "config.yaml"
    assert yaml.safe_load(kept.read_text())["trainer"]["max_steps"] == 3
    assert main(["plan", "--config", str(kept)]) == 0
    assert main(["audit", "--config", str(kept)]) == 0
    assert evaluate(kept, tmp_path / "out")["policy"]["kind"] == "reference"
    newest = evaluate(kept, tmp_path / "own", "--ckpt_path", str(run))
    assert newest["policy"]["path"].endswith(".ckpt")
    error = error_of(capsys, "score", "--config", str(kept), "--ckpt_path", str(run))
    assert error.startswith(f"ckpt_path: {run} was given, but this command asks the model before")
    assert evaluate(kept, tmp_path / "none", "--ckpt_path", "null")["policy"]["kind"] == "reference"


def evaluate(file, output, *argv):
    assert main(["eval", "--config", str(file), "--output", str(output), *argv]) == 0
    return json.loads((output / "report.json").read_text())


def test_from_end_to_end(trained, tmp_path, tiny, capsys):
    file, run = trained
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    report = evaluate(file, tmp_path / "out", "--ckpt_path", "last")
    printed = capsys.readouterr().out
    assert "score by vowels" in printed
    assert "report.html" in printed
    # The figures of both sides are those of the run's own evaluations: same prompts, same seeds.
    (judge,) = report["judges"]
    assert (judge["name"], judge["version"], judge["error"]) == ("vowels", "1", None)
    for side, then in (("reference", "before"), ("policy", "after")):
        measured, known = report["sides"][side], summary[then]
        assert judge[side]["value"] == pytest.approx(known["judge"])
        assert measured["tokens"]["value"] == pytest.approx(known["response_length"])
        assert measured["distinct_2"]["value"] == pytest.approx(known["distinct_2"])
        assert measured["truncation_rate"]["value"] == pytest.approx(known["truncation_rate"])
    kl = report["sides"]["policy"]["kl"]
    assert kl["value"] == pytest.approx(summary["kl"], rel=1e-4)
    assert kl["low"] <= kl["value"] <= kl["high"]
    assert kl["value"] > 0
    assert (report["prompts"], report["responses"]) == (3, 6)
    assert judge["wins"] + judge["ties"] + judge["losses"] == 6
    assert report["policy"]["kind"] == "checkpoint"
    assert report["policy"]["path"].endswith(".ckpt")
    assert any("names no categories" in note for note in report["notes"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").open()]
    assert [(r["number"], r["sample"]) for r in rows] == [(n, s) for n in range(3) for s in (0, 1)]
    scores = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").open()]
    mean = sum(row["policy"]["vowels"] for row in scores) / 6
    assert mean == pytest.approx(judge["policy"]["value"])
    check_self_contained((tmp_path / "out" / "report.html").read_text())
    # The exported model is the same policy.
    exported = evaluate(file, tmp_path / "exported", "--policy", str(run / "policy"))
    assert exported["policy"] == {"kind": "model", "path": str(run / "policy"), "told": None}
    assert exported["judges"] == report["judges"]
    assert exported["sides"]["policy"]["kl"]["value"] == pytest.approx(kl["value"], rel=1e-3)


def test_default_folder_and_adapters(config, tmp_path, capsys):
    config = changed(config, "model.init_args.policy.lora", {"rank": 4, "alpha": 8})
    file = write_config(tmp_path, config)
    assert main(["fit", "--config", str(file)]) == 0
    folder = tmp_path / "runs" / "run" / "v" / "checkpoints"
    assert main(["eval", "--config", str(file), "--ckpt_path", str(folder / "last.ckpt")]) == 0
    (report,) = folder.glob("*.eval/report.json")
    assert report.parent.stem == (folder / "last.ckpt").resolve().stem
    summary = json.loads((folder.parent / "summary.json").read_text())
    kl = json.loads(report.read_text())["sides"]["policy"]["kl"]["value"]
    assert kl == pytest.approx(summary["kl"], rel=1e-4)
    assert kl > 0


def test_without_a_checkpoint_nothing_differs(config, tmp_path):
    report = evaluate(write_config(tmp_path, config), tmp_path / "out", "--model.eval_samples", "3")
    assert report["policy"] == {"kind": "reference", "path": None, "told": None}
    assert any("the policy is the reference itself" in note for note in report["notes"])
    (judge,) = report["judges"]
    assert (judge["wins"], judge["ties"], judge["losses"]) == (0, 9, 0)
    assert report["sides"]["policy"]["kl"] == {"value": 0, "low": 0, "high": 0}


def test_what_prompting_alone_gives(config, tmp_path, capsys):
    file = write_config(tmp_path, config)
    assert main(["eval", "--config", str(file), "--told"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the policy is the reference itself, told the principle" in printed
    assert "the policy was told, and the reference was not: Please be kind." in printed
    report = json.loads(Path("eval.told/report.json").read_text())
    told = {"principle": "Please be kind.", "placement": "after_user"}
    assert report["policy"] == {"kind": "reference", "path": None, "told": told}
    assert report["sides"]["policy"]["kl"]["value"] > 0
    rows = map(json.loads, Path("eval.told/responses.jsonl").read_text().splitlines())
    assert not any("kind" in message["content"] for row in rows for message in row["messages"])
    # Another principle is another policy, whose responses are not those on disk.
    other = ["--told", "--model.estimator.principle", "Be brief."]
    message = error_of(capsys, "eval", "--config", str(file), *other)
    assert "were sampled with other settings (--told)" in message
    null = ["--model.estimator", "iqstar.estimators.NullEstimator"]
    message = error_of(capsys, "eval", "--config", str(file), "--told", *null)
    assert message.startswith("--told: NullEstimator tells no principle; set model.estimator to")


def test_without_a_judge_the_report_says_so(config, tmp_path):
    del config["model"]["init_args"]["judge"]
    report = evaluate(write_config(tmp_path, config), tmp_path / "out")
    assert report["judges"] == []
    assert any(note.startswith("no judge is set") for note in report["notes"])


def test_further_judges_and_one_that_fails(config, tmp_path, capsys):
    judges = tmp_path / "judges.yaml"
    judges.write_text(yaml.safe_dump({"judges": [{"class_path": "test_eval.BrokenJudge"}]}))
    file = write_config(tmp_path, config)
    more = ["--config", str(judges), "--judges+=test_eval.SafetyJudge"]
    report = evaluate(file, tmp_path / "out", *more)
    assert [j["name"] for j in report["judges"]] == ["vowels", "broken", "safety"]
    broken = report["judges"][1]
    assert broken["error"] == "ConnectionError: no route to <b>host</b>"
    assert broken["policy"]["value"] is None
    assert broken["unscored"] == {"policy": 6, "reference": 6}
    assert report["judges"][0]["policy"]["value"] is not None
    assert "Note: the judge broken failed: ConnectionError" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.html").read_text()
    assert "the judge broken failed" in text
    assert "<b>" not in text


def test_beavertails(config, tmp_path, capsys):
    rows = [
        {"prompt": f"How {i}?", "response": "So.", "is_safe": i > 1,
         "category": {"drug_abuse": i < 3, "self_harm": i % 2 == 0}}
        for i in range(6)
    ]  # fmt: skip
    data = tmp_path / "beavers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"path": str(data), "val_prompts": None}
    config = changed(config, "data", {"class_path": "iqstar.data.BeaverTails", "init_args": values})
    file = write_config(tmp_path, config)
    options = ["--judges+=test_eval.SafetyJudge", "--safe_threshold", "0.1"]
    report = evaluate(file, tmp_path / "out", *options)
    safety = report["safety"]
    assert (safety["judge"], safety["better_by"], safety["threshold"]) == ("safety", "vowels", 0.1)
    prompts = {row["category"]: row["prompts"] for row in safety["rows"]}
    assert prompts == {"drug_abuse": 3, "self_harm": 3, "no category": 2, "all prompts": 6}
    total = safety["rows"][-1]
    assert total["safe_tie"] + total["unsafe_tie"] == 12
    assert "drug_abuse" in capsys.readouterr().out
    assert "drug_abuse" in (tmp_path / "out" / "report.html").read_text()
    again = evaluate(file, tmp_path / "out")
    assert again["safety"] is None
    assert any("no judge measures safety" in note for note in again["notes"])


def test_responses_are_used_again(config, tmp_path, monkeypatch, capsys):
    file, out = write_config(tmp_path, config), tmp_path / "out"
    first = evaluate(file, out)
    load = command.load_sides

    def fails(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "load_sides", fails)
    second = evaluate(file, out, "--judges+=test_eval.SafetyJudge")
    assert second["judges"][0] == first["judges"][0]
    assert any("held already" in note for note in second["notes"])
    argv = ("eval", "--config", str(file), "--output", str(out))
    message = error_of(capsys, *argv, "--limit", "2", "--model.eval_samples", "1")
    assert "sampled with other settings (model.eval_samples, prompts)" in message
    kept = out / "responses.jsonl"
    kept.write_text(kept.read_text() + "\n")
    assert f"{kept} is not as it was written" in error_of(capsys, *argv)
    monkeypatch.setattr(command, "load_sides", load)
    assert evaluate(file, out, "--overwrite")["judges"] == first["judges"]
    assert evaluate(file, out, "--overwrite", "--limit", "2")["prompts"] == 2


def test_a_report_inside_the_model_is_no_other_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = stamp(str(tmp_path))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "responses.jsonl").write_text("{}")
    assert stamp(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert stamp(str(tmp_path)) != before


def test_a_template_that_was_edited_is_another_setting(config, tmp_path, capsys):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    with_file = changed(config, "model.init_args.policy.chat_template", str(template))
    file, out = write_config(tmp_path, with_file), tmp_path / "out"
    evaluate(file, out)
    template.write_text("Hello! " + CHAT_TEMPLATE)
    argv = ("eval", "--config", str(file), "--output", str(out))
    assert "(files of model.policy.chat_template)" in error_of(capsys, *argv)


def test_a_template_may_be_its_text(config, tmp_path):
    """Which is longer than a file's name may be."""
    text = "{# " + "long " * 100 + "#}" + CHAT_TEMPLATE
    file = write_config(tmp_path, changed(config, "model.init_args.policy.chat_template", text))
    assert evaluate(file, tmp_path / "out")["prompts"] > 0


def test_a_judge_without_a_version_is_told_at_once():
    class Nameless(Judge):
        name = "own"

        def score(self, prompts, responses):
            return [0.0] * len(responses)

    with pytest.raises(InputError, match="the judge Nameless has no version"):
        InverseQStar(PolicySpec(), NullEstimator(), judge=Nameless())
    with pytest.raises(InputError, match="the judge Nameless has no version"):
        distinct_judges([Nameless()])


def test_judge_that_stops_the_process_loses_no_response(config, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def stop(*arguments):
        raise Stop

    file, out = write_config(tmp_path, config), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(CountingJudge, "score", stop)
        patch.setattr(command, "score_pairs", stop)
        with pytest.raises(Stop):
            evaluate(file, out)
    assert len(read_pairs(out / "responses.jsonl")) == 6
    assert any("held already" in note for note in evaluate(file, out)["notes"])


def documented():
    """The keys that the table of docs/eval.md names."""
    text = (Path(__file__).parents[1] / "docs" / "eval.md").read_text()
    return set(re.findall(r"`(\w+)`", text.partition("## `report.json`")[2]))


def test_every_key_is_documented():
    pairs = [pair(0), pair(1)]
    scores = [scored("harm", [0.9, 0.1], [0.2, 0.3], measures_safety=True)]
    report = build_report({}, pairs, scores, {ask("question 0"): {"drugs"}})
    (judge,), safety = report["judges"], report["safety"]
    keys = {*report, *report["sides"]["policy"], *judge, *safety, *safety["rows"][0]}
    assert keys <= documented()
    known = {"iqstar", "policy", "reference", "data", "settings"}
    assert known <= documented()
    assert set(report["intervals"]) <= documented()


# ---- bad input


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--ckpt_path", "none.ckpt"], "--ckpt_path: none.ckpt does not exist"),
        (["--ckpt_path", "half.ckpt"], "--ckpt_path: half.ckpt is no checkpoint, or a damaged"),
        (["--ckpt_path", "last"], "--ckpt_path last: there is no complete checkpoint below"),
        (["--policy", "nowhere"], "--policy: "),
        (["--policy", "no/such/folder/at/all"], "--policy: 'no/such/folder/at/all' does not exist"),
        (["--data.val_prompts", "0"], "data: no prompt is held out"),
        (["--output", "half.ckpt"], "--output: half.ckpt is a file; name a folder"),
        (["--output", "half.ckpt/below"], "--output: half.ckpt"),
        (["--limit", "0"], "--limit: must be at least 1, got 0"),
        (["--tie_margin=-1"], "--tie_margin: must be at least 0, got -1"),
        (["--safe_threshold=50"], "--safe_threshold: must be a probability from 0 to 1, got 50"),
        (["--safety_judge", "harm"], "--safety_judge: no judge is called 'harm'; there is vowels"),
        (["--judges+=iqstar.judges.Vader"], "did you mean iqstar.judges.VaderJudge?"),
        (["--limits", "1"], "--limits: unknown option; did you mean --limit?"),
    ],
)
def test_bad_input(config, tmp_path, capsys, argv, says):
    Path("half.ckpt").write_text("PK half of it")
    message = error_of(capsys, "eval", "--config", str(write_config(tmp_path, config)), *argv)
    assert says in message


def test_checkpoint_of_something_else(trained, tmp_path, capsys):
    file, run = trained
    last = run / "checkpoints" / "last.ckpt"
    argv = ("eval", "--config", str(file), "--ckpt_path", str(last))
    assert "give one of them" in error_of(capsys, *argv, "--policy", "bundled")
    lora = error_of(capsys, *argv, "--model.policy.lora.rank", "4")
    assert lora.startswith(f"--ckpt_path: {last.resolve()} does not fit the model")
    saved = torch.load(last, weights_only=True)
    torch.save({k: v for k, v in saved.items() if k != "iqstar"}, tmp_path / "foreign.ckpt")
    foreign = error_of(capsys, *argv[:-1], str(tmp_path / "foreign.ckpt"))
    assert "was not saved by iqstar fit" in foreign
    saved["iqstar"]["frozen"]["reference"] = "0" * 64
    torch.save(saved, tmp_path / "other.ckpt")
    other = error_of(capsys, *argv[:-1], str(tmp_path / "other.ckpt"))
    assert "was trained with other frozen weights (reference: 000000000000" in other


def test_help(capsys):
    assert main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{option}" in text for option in command.OPTIONS)
    assert error_of(capsys, "eval").startswith("iqstar eval needs --config FILE")
