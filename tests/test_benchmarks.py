"""The benchmarks' own arithmetic, and that the docs quote what the result files hold."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import goals  # noqa: E402
import harness  # noqa: E402
import memory  # noqa: E402
import step  # noqa: E402
import table as docs  # noqa: E402
import utilisation  # noqa: E402
from clock import Clock  # noqa: E402


def test_medians_reach_into_mappings_and_keep_text():
    samples = [{"s": s, "memory": {"peak": 2 * s}, "name": "x"} for s in (3.0, 1.0, 8.0)]
    assert harness.medians(samples) == {"s": 3.0, "memory": {"peak": 6.0}, "name": "x"}


def test_sides_alternate():
    order = []
    sides = {"a": {"n": 1}, "b": {"n": 2}}
    found = harness.alternate(sides, 2, lambda s: order.append(s["n"]) or {"n": s["n"]})
    assert order == [1, 2, 1, 2]
    assert found == {"a": [{"n": 1}] * 2, "b": [{"n": 2}] * 2}


def test_linear_fit_of_a_line_and_of_a_bend():
    assert harness.linear_fit([1, 2, 3], [5, 7, 9]) == pytest.approx((3, 2, 1))
    # y = x² at −1, 0, 1: the best line is flat but for the tilt that 0, 1, 4 adds.
    assert harness.linear_fit([0, 1, 2], [0, 1, 4])[2] == pytest.approx(12 / 13)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.12"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234"), (7, "7"), (None, "")],
)
def test_digits(value, text):
    assert harness.digits(value) == text


def test_phases_add_up_to_the_step():
    clock = Clock()
    clock.mark()
    sum(range(1000))
    clock.add("generation")
    assert clock.timed("generation", lambda x: x + 1)(1) == 2
    clock.end_step()
    (found,) = clock.steps
    assert set(found) == {"generation", "other", "total"}
    assert found["total"] == pytest.approx(found["generation"] + found["other"])
    clock.end_step()
    assert set(clock.steps[1]) == {"other", "total"}


def test_floor_counts_shared_storage_once():
    weight = torch.zeros(100, requires_grad=True)
    frozen = torch.zeros(10)
    # The view and the weight itself among the frozen tensors are the policy's storage.
    parts = memory.floor(7, [weight, weight.detach()[:50]], [frozen, weight], [torch.zeros(200)])
    assert parts == {
        "imports": 7,
        "policy": 400,
        "frozen": 40,
        "gradients": 400,
        "optimizer": 800,
        "floor": 7 + 400 + 40 + 400 + 800,
    }


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_peak_outlives_what_made_it():
    memory.reset_peak()
    before = memory.resident()[0]
    block = mmap.mmap(-1, 2**26)  # pages of its own, whatever this process has freed before
    for start in range(0, len(block), mmap.PAGESIZE):
        block[start] = 1
    block.close()
    assert memory.peak()[0] - before > 60 * 2**20


def test_products_of_a_linear_layer_are_those_of_its_forward_and_backward():
    layer, x = torch.nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    mode = utilisation.recorder()
    with mode:
        layer(x).sum().backward()
    shapes = sorted(product[0] for product in mode.products)
    # x·Wᵀ, then dW = dyᵀ·x and dx = dy·W.
    assert shapes == sorted([((3, 5), (5, 7)), ((7, 3), (3, 5)), ((3, 7), (7, 5))])
    assert {utilisation.flops(s) for s in shapes} == {2 * 3 * 5 * 7}
    assert all(utilisation.alone(product, 1) > 0 for product in mode.products)


def test_batched_products_count_every_matrix():
    assert utilisation.flops(((4, 2, 3), (4, 3, 5))) == 2 * 4 * 2 * 3 * 5


def sample(seconds: float, mib: float) -> dict:
    parts = dict.fromkeys(("peak_rss", "floor", *step.PARTS), 1.0)
    sizes = {**parts, "peak_pss": mib, "above_floor": mib / 2}
    return {"steps": [{"generation": seconds, "total": seconds}], "memory": sizes, "tokens": 8}


def test_ratios_are_those_of_medians():
    table = {
        "iqstar, principle": step.summary([sample(2, 30), sample(1, 30), sample(9, 30)]),
        "TRL SDFT, full_logits": step.summary([sample(4, 60)]),
    }
    step.compare(table)
    ratio = {"seconds": 0.5, "peak_pss": 0.5, "above_floor": 0.5}
    assert table["iqstar, principle"]["ratio"] == ratio
    found = goals.goals({"step-32-true": {"table": table}})
    assert [(goal, value) for _, goal, value in found] == [
        ("≤ 0.75", 0.5),
        ("≤ 0.7", 0.5),
        ("≤ 0.5", 0.5),
    ]
    assert len(step.tables("x", table)[1]["rows"]) == 2


def test_goals_are_met_from_their_side():
    assert goals.met("≤ 1e-5", 1e-6)
    assert not goals.met("≤ 3", 3.1)
    assert goals.met("≥ 0.65", 0.65)
    assert not goals.met("≥ 1.3", 1.2)


def test_results_come_back_and_fill_a_page(tmp_path, capsys):
    options = Namespace(rounds=3, out=tmp_path, worker=None, data=tmp_path)
    shown = harness.table("Start-up", ["command", "seconds"], [["help", 1.5]])
    harness.finish(options, "startup", [shown], table={"help": {"seconds": 1.5}})
    assert "help" in capsys.readouterr().out
    (tmp_path / "old.json").write_text(json.dumps({"sides": {}}))  # another format
    results = goals.read(tmp_path)
    assert set(results) == {"startup"}
    assert str(tmp_path) not in json.dumps(results)
    page = "a\n<!-- BENCH:startup -->\nold\n<!-- /BENCH:startup -->\nb\n"
    made = docs.filled(page, tmp_path)
    assert "| help | 1.50 |" in made
    assert "medians of 3 rounds" in made
    assert "old" not in made
    assert docs.filled(made, tmp_path) == made
    assert docs.MISSING in docs.filled(page, tmp_path / "none")
    of_another_machine = page.replace("BENCH:", f"BENCH:{tmp_path.name}/")
    assert "| help | 1.50 |" in docs.filled(of_another_machine, tmp_path.parent)


def test_the_docs_quote_the_results():
    for name in docs.PAGES:
        text = (ROOT / name).read_text()
        assert docs.filled(text, harness.RESULTS) == text, "run: python benchmarks/table.py"


@pytest.mark.slow
def test_a_step_of_each_side(tiny, tmp_path):
    pytest.importorskip("trl")
    command = [sys.executable, "benchmarks/step.py", "--model", str(tiny), "--out", str(tmp_path)]
    command += ["--rounds", "1", "--prompts", "2", "--tokens", "3", "--precision", "32-true"]
    command += ["--sides", "iqstar, principle", "TRL SDFT, full_logits", "--threads", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run(command, cwd=ROOT, check=True, env=env)
    record = goals.read(tmp_path)["step-32-true"]
    assert {row["tokens"] for row in record["table"].values()} == {6}
    for row in record["table"].values():
        assert row["seconds"]["generation"] > 0
        assert 0 < row["memory"]["floor"] < row["memory"]["peak_rss"]
