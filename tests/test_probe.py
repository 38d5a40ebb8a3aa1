"""The probe's statistics against values derived by hand, and the command from end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cli_tools import changed, error_of, tiny_config, write_config
from fitting import ask
from iqstar.cli import main
from iqstar.commands.labelled_credit import _batches
from iqstar.data.labelled import LAYOUTS, read_labelled
from iqstar.distributions import LogLinear, TokenDistributions
from iqstar.errors import InputError
from iqstar.estimators import OptimalPolicyEstimator
from iqstar.module import InverseQStar
from iqstar.ranking import (
    auc,
    average_ranks,
    category_figures,
    class_figures,
    credit_by_position,
    difference_without_length,
    pair_figures,
    pair_share,
    position_bins,
    response_scores,
    without_length,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
HH = SHARED / "hh_rlhf" / "harmless-base_test_a.jsonl.gz"
BEAVERTAILS = SHARED / "beavertails" / "30k_test_a.jsonl.gz"


def array(*values):
    return np.array(values, dtype=np.float64)


# ---- statistics


def test_share_counts_a_tie_half():
    """Two above, one tie, one below: (2 + ½) / 4."""
    assert pair_share(array(3, 0.1, 0, -7)) == 0.625
    assert np.isnan(pair_share(array()))


def test_auc_by_hand():
    """Preferred 3, 1; others 2, 1. Couples: 3>2, 3>1, 1<2, 1=1, so (2 + ½) / 4."""
    assert auc(array(3, 1, 2, 1), np.array([True, True, False, False])) == 0.625
    assert average_ranks(array(3, 1, 2, 1)).tolist() == [4, 1.5, 3, 1.5]


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_count_over_all_couples(seed):
    random = np.random.default_rng(seed)
    values = random.integers(0, 9, size=60).astype(np.float64)  # many ties
    preferred = random.random(60) < 0.4
    wins = [(a > b) + 0.5 * (a == b) for a in values[preferred] for b in values[~preferred]]
    assert auc(values, preferred) == pytest.approx(np.mean(wins), abs=1e-12)
    assert auc(values, ~preferred) == pytest.approx(1 - np.mean(wins), abs=1e-12)
    assert auc(-values, preferred) == pytest.approx(1 - np.mean(wins), abs=1e-12)


def test_auc_needs_both_classes():
    assert np.isnan(auc(array(1, 2), np.array([True, True])))
    assert np.isnan(auc(array(1, 2), np.array([False, False])))


def test_what_a_line_in_length_leaves():
    """Lengths 1, 2, 3 and values 1, 5, 3: slope 1, mean 3, so 1 − 2, 5 − 3, 3 − 4."""
    assert without_length(array(1, 5, 3), array(1, 2, 3)).tolist() == [-1, 2, -1]
    assert without_length(array(1, 5, 3), array(2, 2, 2)).tolist() == [-2, 2, 0]


def test_what_a_line_through_the_origin_leaves_of_a_pair():
    """Differences 3, 1 of lengths 1, −1: slope (3 − 1) / 2 = 1, so 2, 2."""
    assert difference_without_length(array(3, 1), array(1, -1)).tolist() == [2, 2]
    flip = array(1, -1)  # the second pair the other way round: its residual turns with it
    left = difference_without_length(flip * array(3, 1), flip * array(1, -1))
    assert left.tolist() == [2, -2]
    assert difference_without_length(array(3, 1), array(0, 0)).tolist() == [3, 1]


def test_scores_of_responses():
    scores = response_scores([array(1, 2, 3), array(-1)])
    assert {k: v.tolist() for k, v in scores.items()} == {
        "sum": [6, -1],
        "mean": [2, -1],
        "length": [3, 1],
    }


def test_positions():
    assert position_bins(4) == [(0, 4)]
    assert position_bins(17) == [(0, 4), (4, 8), (8, 16), (16, 32)]
    credits = [np.arange(6.0), array(2)]
    first, last = credit_by_position(credits, [0, 1], [(0, 4), (4, 8)])
    assert first[0] == 5
    assert first[1].value == pytest.approx((0 + 1 + 2 + 3 + 2) / 5)
    assert last[0] == 2
    assert last[1].value == 4.5
    assert last[1].low == last[1].high == 4.5  # one response alone has tokens there


def lines(random, lengths, slope, shift=0.0):
    """Credits whose sum is slope · length + shift, up to noise."""
    return [np.full(n, slope + (shift + random.normal(0, 0.5)) / n) for n in lengths]


def test_length_alone_is_not_credit():
    """Chosen replies are longer, and Σ A* is nothing but length: the controls say so."""
    random = np.random.default_rng(0)
    long, short = random.integers(20, 40, 300), random.integers(10, 30, 300)
    chosen, rejected = lines(random, long, 1.0), lines(random, short, 1.0)
    figures, matched = pair_figures(chosen, rejected, range(300))
    total = figures["sum"]
    assert total["share"].low > 0.7
    assert total["auc"].value == pytest.approx(figures["length"]["auc"].value, abs=0.02)
    assert total["share_without_length"].low < 0.5 < total["share_without_length"].high
    assert total["auc_without_length"].low < 0.5 < total["auc_without_length"].high
    assert 10 <= matched < 300
    assert "share_without_length" not in figures["length"]


def test_credit_beside_length_is_found():
    """Chosen replies are shorter but better: only the controls see it."""
    random = np.random.default_rng(0)
    short, long = random.integers(10, 30, 300), random.integers(20, 40, 300)
    figures, _ = pair_figures(lines(random, short, 1.0, 3.0), lines(random, long, 1.0), range(300))
    total = figures["sum"]
    assert total["auc"].high < 0.5
    assert total["auc_without_length"].low > 0.6
    assert total["share_without_length"].low > 0.6


def test_pairs_of_like_length_are_few():
    """Of ten pairs nine are matched (ratio at most 1.25): no figure below ten."""
    chosen = [np.ones(5)] * 9 + [np.ones(6)]
    rejected = [np.zeros(4)] * 10
    figures, matched = pair_figures(chosen, rejected, range(10))
    assert matched == 9
    assert "share_matched" not in figures["sum"]
    figures, matched = pair_figures(chosen[:1] * 10, rejected, range(10))
    assert matched == 10
    assert figures["mean"]["share_matched"].value == 1


def test_units_are_drawn_together():
    """All pairs of one conversation: nothing else could have been drawn."""
    random = np.random.default_rng(0)
    chosen = [random.normal(size=5) for _ in range(20)]
    rejected = [random.normal(size=5) for _ in range(20)]
    one, _ = pair_figures(chosen, rejected, ["same"] * 20)
    many, _ = pair_figures(chosen, rejected, range(20))
    assert one["sum"]["share"].low == one["sum"]["share"].high
    assert many["sum"]["share"].low < many["sum"]["share"].high


def test_categories_compare_with_all_safe_answers():
    """Twelve of theft, all below the safe ones; two of spying are too few."""
    credits = [array(1.0 + 0.1 * i) for i in range(6)] + [array(0.0)] * 12 + [array(9.0)] * 2
    safe = np.arange(20) < 6
    harms = [[]] * 6 + [["theft"]] * 12 + [["spying"]] * 2
    harms[6] = ["theft", "arson"]
    found = category_figures(response_scores(credits), safe, harms, range(20))
    assert list(found) == ["theft", "spying", "arson"]
    assert found["theft"][0] == 12
    assert found["theft"][1]["sum"]["auc"].value == 1
    assert found["spying"] == (2, None)
    assert found["arson"] == (1, None)
    every = class_figures(response_scores(credits), safe, range(20))
    assert every["mean"]["auc"].value == pytest.approx(12 / 14)
    assert every["length"]["auc"].value == 0.5


# ---- rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hh(question, chosen, rejected, other=None):
    """A row of HH-RLHF."""
    ask = f"\n\nHuman: {question}\n\nAssistant:"
    also = ask if other is None else f"\n\nHuman: {other}\n\nAssistant:"
    return {"chosen": f"{ask} {chosen}", "rejected": f"{also} {rejected}"}


def answer(prompt, response, safe, **harms):
    return {"prompt": prompt, "response": response, "is_safe": safe, "category": harms}


def test_pairs_that_cannot_be_compared_are_counted(tmp_path):
    rows = [
        hh("Hi", "Hello.", "Go."),
        hh("Hi", "Hello.", "Go."),
        hh("Hi", "Go.", "Hello."),  # the same two, told apart by labels only
        hh("Hi", "Same", "Same "),
        hh("Hi", "", "Go."),
        hh("Hi", "A", "B", other="Hey"),
        {side: "\n\nHuman: a\n\nAssistant: b\n\nHuman:\n\nAssistant: " + side
         for side in LAYOUTS["pairs"]},
    ]  # fmt: skip
    found = read_labelled(str(write(tmp_path / "rows.jsonl", rows)))
    assert found.kind == "pairs"
    assert found.rows == 7
    (item,) = found.items
    assert [r.response for r in item.responses] == ["Hello.", "Go."]
    assert found.dropped == {
        "empty response": 1,
        "equal sides": 1,
        "prompt with an empty turn": 1,
        "repeats an earlier row": 2,
        "the two prompts differ": 1,
    }


def test_labels_do_not_order_rows(tmp_path):
    def texts(flip):
        pairs = [hh(f"Say {i}", f"a{i}", f"b{i}") for i in range(30)]
        if flip:
            pairs = [{"chosen": p["rejected"], "rejected": p["chosen"]} for p in reversed(pairs)]
        found = read_labelled(str(write(tmp_path / "rows.jsonl", pairs)))
        return [item.responses[0].messages for item in found.items]

    assert texts(flip=False) == texts(flip=True)


def test_answers(tmp_path):
    rows = [
        answer("How?", "So.", False, theft=True, arson=False),
        answer("How?", " ", True),
        answer("How?", "Not so.", True),
    ]
    del rows[2]["category"]
    found = read_labelled(str(write(tmp_path / "rows.jsonl", rows)))
    assert found.kind == "answers"
    assert {(i.safe, i.harms) for i in found.items} == {(True, ()), (False, ("theft",))}
    assert found.dropped == {"empty response": 1}
    assert len({item.opening for item in found.items}) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "response": "b"}], "rows.jsonl:1: unknown column layout: found prompt"),
        ([{"chosen": "a", "rejected": "b"}], "rows.jsonl:1: no assistant turn"),
        ([answer("a", "b", "yes")], "rows.jsonl:1: is_safe must be true or false, found 'yes'"),
        ([answer("a", 3, True)], "rows.jsonl:1: prompt and response must be text"),
        ([{**answer("a", "b", True), "category": ["x"]}], "rows.jsonl:1: category must map"),
    ],
)
def test_malformed_rows_are_named(tmp_path, rows, message):
    with pytest.raises(InputError) as error:
        read_labelled(str(write(tmp_path / "rows.jsonl", rows)))
    assert message in str(error.value)


def test_two_data_sets_at_once(tmp_path):
    write(tmp_path / "a.jsonl", [hh("Hi", "Hello.", "Go.")])
    write(tmp_path / "b.jsonl", [answer("Hi", "Go.", False)])
    with pytest.raises(InputError, match=r"b\.jsonl:1: this row has prompt \+ response"):
        read_labelled(str(tmp_path))


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="--data: no such file or folder: nowhere"):
        read_labelled("nowhere")
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=r"--data: cannot read .*rows.csv; give a file that ends"):
        read_labelled(str(tmp_path / "rows.csv"))


# ---- the command


class Fixed(TokenDistributions):
    """The same log-weights at every token."""

    def __init__(self, weights: torch.Tensor, tokens: int) -> None:
        self.weights = weights
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens

    def logprobs(self, index: torch.Tensor) -> torch.Tensor:
        return self.weights.log_softmax(-1).expand(len(index), -1)


class Planted(OptimalPolicyEstimator):
    """π̂* ∝ π_ref · e^(bonus of a token): its credit is known.

    Args:
        letter: The text of the token that gets the bonus.
        bonus: In nats.
    """

    def __init__(self, letter: str = "z", bonus: float = 4.0) -> None:
        super().__init__()
        self.letter = letter
        self.bonus = bonus

    def setup(self, spec, chat, precision):
        self.weights = torch.zeros(chat.vocab_size)
        self.weights[chat.response_ids(self.letter, complete=False)] = self.bonus

    def estimate(self, scorer, reference, seed):
        vocab = reference.logprobs(torch.arange(1)).shape[-1]
        weights = torch.nn.functional.pad(self.weights, (0, vocab - len(self.weights)))
        return LogLinear([(1.0, reference), (1.0, Fixed(weights, len(reference)))])


@pytest.fixture
def config(tmp_path, tiny):
    """A run with the planted estimator, its responses cut at 12 tokens."""
    planted = {"class_path": f"{__name__}.Planted"}
    config = changed(tiny_config(tmp_path, tiny), "model.init_args.estimator", planted)
    return changed(config, "model.init_args.rollout.init_args.max_new_tokens", 12)


def probe(folder, config, data, capsys, *more):
    file = write_config(folder, config)
    capsys.readouterr()
    assert main(["probe", "--config", str(file), "--data", str(data), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def good_and_bad(count=24):
    """Pairs in which the chosen reply says z more often; lengths differ either way."""
    return [
        hh(f"Say {i}", f"z, z and z{' so' * (i % 3)}", f"b, c and d{' so' * (i % 4)}")
        for i in range(count)
    ]


def test_a_planted_preference_is_found_and_turns_with_the_labels(tmp_path, config, capsys):
    rows = good_and_bad()
    data = write(tmp_path / "pairs.jsonl", [*rows, hh("Hi", "Same", "Same")])
    report = probe(tmp_path, config, data, capsys)
    assert report["estimator"] == "Planted"
    assert report["kind"] == "pairs"
    assert (report["rows"], report["items"], report["conversations"]) == (25, 24, 24)
    assert report["dropped"] == {"equal sides": 1}
    assert report["figures"]["sum"]["share"] == {"value": 1, "low": 1, "high": 1}
    assert report["figures"]["mean"]["auc"]["value"] == 1
    assert report["figures"]["mean"]["share_matched"]["low"] == 1
    turned = write(tmp_path / "turned.jsonl",
                   [{"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows])  # fmt: skip
    other = probe(tmp_path, config, turned, capsys)
    for score, figures in report["figures"].items():
        for name, figure in figures.items():
            assert other["figures"][score][name]["value"] == pytest.approx(1 - figure["value"])
    ours, theirs = report["groups"], other["groups"]
    assert ours["chosen"] == theirs["rejected"]
    assert ours["rejected"] == theirs["chosen"]


def test_credit_by_position_is_where_it_was_planted(tmp_path, config, capsys):
    """A z is worth β (4 − log Z), any other token −β log Z, where log Z ≥ 0; here β = 2."""
    data = write(tmp_path / "p.jsonl", [hh(f"Say {i}", f"zzzz{i} it", f"bcde{i} it")
                                        for i in range(8)])  # fmt: skip
    report = probe(tmp_path, changed(config, "model.init_args.beta", 2.0), data, capsys)
    chosen, rejected = (
        report["groups"][name]["credit_by_position"] for name in ("chosen", "rejected")
    )
    assert [(place["from"], place["to"]) for place in chosen] == [(0, 3), (4, 7)]
    assert chosen[0]["tokens"] == rejected[0]["tokens"] == 32
    assert 2.0 < chosen[0]["credit"]["value"] <= 8.0
    assert rejected[0]["credit"]["value"] <= 0
    assert chosen[0]["credit"]["value"] - rejected[0]["credit"]["value"] > 4
    assert abs(chosen[1]["credit"]["value"]) < 4


def test_responses_that_the_limit_cuts(tmp_path, config, capsys):
    """Marked and counted; sides that agree up to the cut are equal."""
    same = "b" * 12
    rows = [*good_and_bad(4), hh("Hi", f"{same}z", f"{same}d"), hh("Hey", "z" * 20, "b")]
    report = probe(tmp_path, config, write(tmp_path / "p.jsonl", rows), capsys)
    assert report["dropped"] == {"equal sides, once cut at max_new_tokens": 1}
    assert report["items"] == 5
    cut = {name: group["truncated"] for name, group in report["groups"].items()}
    assert cut["chosen"] >= 1
    assert report["max_new_tokens"] == 12


def test_safe_answers_over_unsafe_ones(tmp_path, config, capsys):
    rows = [answer(f"How {i}?", f"z and z{' so' * (i % 3)}", True) for i in range(12)]
    rows += [answer(f"How {i}?", f"b and c{' so' * (i % 3)}", False, theft=True, arson=i < 3)
             for i in range(12)]  # fmt: skip
    report = probe(tmp_path, config, write(tmp_path / "a.jsonl", rows), capsys)
    assert report["kind"] == "answers"
    assert (report["items"], report["conversations"]) == (24, 12)
    assert report["figures"]["sum"]["auc"] == {"value": 1, "low": 1, "high": 1}
    assert report["categories"]["theft"]["unsafe"] == 12
    assert report["categories"]["theft"]["figures"]["mean"]["auc"]["value"] == 1
    assert report["categories"]["arson"] == {"unsafe": 3, "figures": None}
    assert set(report["groups"]) == {"safe", "unsafe"}


def test_without_credit_everything_is_a_tie(tmp_path, config, capsys):
    null = {"class_path": "iqstar.estimators.NullEstimator"}
    config = changed(config, "model.init_args.estimator", null)
    report = probe(tmp_path, config, write(tmp_path / "p.jsonl", good_and_bad()), capsys)
    for score in ("sum", "mean"):
        for figure in report["figures"][score].values():
            assert figure == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_shuffled_credit_is_worth_less(tmp_path, config, capsys):
    inner = config["model"]["init_args"]["estimator"]
    shuffled = {"class_path": "iqstar.estimators.ShuffledEstimator",
                "init_args": {"estimator": inner}}  # fmt: skip
    config = changed(config, "model.init_args.estimator", shuffled)
    report = probe(tmp_path, config, write(tmp_path / "p.jsonl", good_and_bad()), capsys)
    assert report["figures"]["mean"]["auc"]["value"] <= 1


def test_limit_and_long_prompts(tmp_path, config, capsys):
    data = write(tmp_path / "p.jsonl", [*good_and_bad(9), hh("so " * 200, "z", "b")])
    config = changed(config, "data.init_args.max_prompt_tokens", 100)
    report = probe(tmp_path, config, data, capsys)
    assert report["items"] == 9
    assert report["dropped"] == {"over data.max_prompt_tokens=100": 1}
    assert probe(tmp_path, config, data, capsys, "--limit", "4")["items"] == 4


def test_prompts_that_leave_no_room_for_the_response(tmp_path, config, capsys, monkeypatch):
    """As in training; otherwise the longest, which come last, would lose all that was scored."""
    monkeypatch.setattr(InverseQStar, "prompt_room", lambda module: 100)
    data = write(tmp_path / "p.jsonl", [*good_and_bad(4), hh("so " * 200, "z", "b")])
    report = probe(tmp_path, config, data, capsys)
    (reason,) = report["dropped"]
    assert reason.startswith("over 100 tokens, response and principle pass the model's")
    assert report["items"] == 4


def test_responses_to_one_prompt_are_scored_together_where_it_matters():
    prompts = [ask("a", "1"), ask("b", "2"), ask("c", "3"), ask("a", "4"), ask("b", "5")]
    sizes = [(1, "1"), (2, "2"), (3, "3"), (9, "4"), (5, "5")]
    assert _batches(prompts, sizes, 2, together=True) == [[2], [1, 4], [0, 3]]
    assert _batches(prompts, sizes, 3, together=True) == [[2, 1, 4], [0, 3]]
    assert _batches(prompts, sizes, 1, together=True) == [[2], [1, 4], [0, 3]]
    assert _batches(prompts, sizes, 2, together=False) == [[0, 1], [2, 4], [3]]


def test_the_table_is_for_people(tmp_path, config, capsys):
    rows = [answer(f"How {i}?", "z" if i % 2 else "b", bool(i % 2), theft=not i % 2)
            for i in range(30)]  # fmt: skip
    file = write_config(tmp_path, config)
    for data in (write(tmp_path / "a.jsonl", rows), write(tmp_path / "p.jsonl", good_and_bad())):
        assert main(["probe", f"--config={file}", f"--data={data}"]) == 0
        shown = capsys.readouterr().out
        assert "Chance is 0.50" in shown
        assert "1.00 (1.00–1.00)" in shown
        assert "A* by position" in shown
        assert "responses, " in shown


def test_a_config_without_data_will_do(tmp_path, config, capsys):
    config = {key: value for key, value in config.items() if key != "data"}
    assert probe(tmp_path, config, write(tmp_path / "p.jsonl", good_and_bad(3)), capsys)["items"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([hh("Hi", "Same", "Same")], "none of 1 rows can be compared (equal sides: 1)"),
        ([answer("Hi", "Go", False)] * 2, "none of the 1 answers is safe"),
        ([answer("Hi", "Go", True)], "give rows with is_safe: false too"),
        ([answer("Hi", "", True)], "none of 1 rows can be compared (empty response: 1)"),
        ([answer(" ", "Hi", True)], "none of 1 rows can be compared (empty question: 1)"),
    ],
)
def test_nothing_to_compare(tmp_path, config, capsys, rows, message):
    data = write(tmp_path / "rows.jsonl", rows)
    file = write_config(tmp_path, config)
    found = error_of(capsys, "probe", "--config", str(file), "--data", str(data))
    assert found.startswith("--data: ")
    assert message in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data", "none.jsonl"], "--data: no such file or folder: none.jsonl"),
        (["--data", "p.jsonl", "--limit", "0"], "--limit: must be at least 1"),
        (["--data", "p.jsonl", "--limt", "3"], "limt"),
    ],
)
def test_wrong_arguments(tmp_path, config, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", good_and_bad(2))
    file = write_config(tmp_path, config)
    assert message in error_of(capsys, "probe", "--config", str(file), *arguments)


def test_probe_needs_a_config(capsys):
    assert "iqstar probe needs --config" in error_of(capsys, "probe", "--data", "p.jsonl")


def test_help(capsys):
    assert main(["probe", "--help"]) == 0
    assert "--data FILE" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "  probe " in capsys.readouterr().out


# ---- real rows, and the page


@pytest.mark.skipif(not HH.exists(), reason="needs the shared data")
def test_real_pairs(tmp_path, config, capsys):
    found = read_labelled(str(HH))
    assert found.rows == 1181
    assert len(found.items) + sum(found.dropped.values()) == 1181
    assert len(found.items) > 1150
    report = probe(tmp_path, config, HH, capsys, "--limit", "12")
    assert report["items"] == 12
    assert 0 <= report["figures"]["sum"]["auc"]["value"] <= 1


@pytest.mark.skipif(not BEAVERTAILS.exists(), reason="needs the shared data")
def test_real_answers(tmp_path, config, capsys):
    found = read_labelled(str(BEAVERTAILS))
    assert found.rows == 1510
    assert sum(bool(i.safe) for i in found.items) == pytest.approx(625, abs=2)
    assert len({harm for item in found.items for harm in item.harms}) == 14
    report = probe(tmp_path, config, BEAVERTAILS, capsys, "--limit", "40")
    assert report["groups"]["safe"]["responses"] + report["groups"]["unsafe"]["responses"] == 40


def test_the_page_quotes_the_results():
    root = Path(__file__).parents[1]
    sys.path.append(str(root / "benchmarks"))
    import probe_table

    text = (root / "docs" / "probe.md").read_text()
    assert probe_table.filled(text) == text, "run: python benchmarks/probe_table.py"
    good, chance = {"value": 0.6, "low": 0.51, "high": 0.7}, {"value": 0.6, "low": 0.5, "high": 0.7}
    assert probe_table.cell(good) == "**0.60 (0.51–0.70)**"
    assert probe_table.cell(chance) == "0.60 (0.50–0.70)"
    assert probe_table.cell(None) == "–"
