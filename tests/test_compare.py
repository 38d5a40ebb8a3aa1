"""``iqstar compare``: its YAML, its choices, what is read off curves, and a small real one."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from iqstar.cli import main
from iqstar.commands import compare
from iqstar.compare.curves import (
    Point,
    best,
    choices,
    choose,
    gain,
    kl_at,
    pending,
    read_curve,
    responses_to_reach,
)
from iqstar.compare.kept import check_same, keep
from iqstar.compare.page import against, claims
from iqstar.compare.pairs import write_pairs
from iqstar.compare.plan import Family, main_runs, merged, sweep_runs
from iqstar.compare.reading import read_comparison
from iqstar.compare.runner import ended_by_sigterm, execute, settings_of
from iqstar.compare.setting import NO_ESTIMATOR, build, check
from iqstar.errors import InputError
from iqstar.summary import write_json
from processes import Forked, ForkedRun

NAN = math.nan
RATE = {"model": {"init_args": {"optimizer": {"init_args": {"lr": 1e-5}}}}}
CONFIG = Path(__file__).parents[1] / "configs" / "compare.yaml"


def curve(*scores, kl=0.1, each=100):
    return tuple(
        Point(responses=i * each, steps=i, seconds=float(i), score=s, kl=i * kl)
        for i, s in enumerate(scores)
    )


def run_cli(capsys, *argv):
    """Exit code and what was told."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, capsys.readouterr().err


# -- what is read off curves: by hand ----------------------------------------------------------


def test_responses_to_reach_a_score_lie_between_evaluations():
    rising = curve(0.0, 0.2, 0.6)
    assert responses_to_reach(rising, 0.4) == pytest.approx(150)
    assert responses_to_reach(rising, 0.2) == pytest.approx(100)
    assert responses_to_reach(rising, -1.0) == 0
    assert math.isnan(responses_to_reach(rising, 0.7))
    assert kl_at(rising, 0.4) == pytest.approx(0.15)


def test_a_gap_in_a_curve_is_bridged_not_counted():
    gappy = curve(0.0, NAN, 0.6)
    assert responses_to_reach(gappy, 0.3) == pytest.approx(100)
    assert best(gappy).score == 0.6
    assert gain(gappy) == pytest.approx(0.6)
    assert best(curve(NAN, NAN)).responses == 100


def test_the_best_rate_wins_and_an_edge_is_said():
    family = Family(name="f", rates=(1e-5, 2e-5, 4e-5), sweep="m")
    middle = choose(family, {1e-5: 0.1, 2e-5: 0.3, 4e-5: 0.2})
    assert (middle.rate, middle.at_edge) == (2e-5, False)
    edge = choose(family, {1e-5: 0.1, 2e-5: 0.3, 4e-5: 0.4})
    assert (edge.rate, edge.at_edge) == (4e-5, True)
    assert choose(family, {1e-5: NAN, 2e-5: 0.1, 4e-5: NAN}).rate == 2e-5


def test_one_method_against_another():
    """Theirs ends at 0.4 after 400 with KL 0.4; ours is there after 100 at half of the KL."""
    theirs = curve(0.0, 0.1, 0.2, 0.3, 0.4)
    found = against(curve(0.0, 0.4, 0.6, kl=0.2), theirs)
    assert found.responses == pytest.approx(0.25)
    assert found.kl == pytest.approx(0.5)
    assert found.gain == pytest.approx(1.5)  # 0.6 where it has theirs' KL
    never = against(curve(0.0, 0.3), theirs)
    assert all(math.isnan(v) for v in (never.responses, never.kl, never.gain))


def test_claims_are_medians_over_pairs_of_seeds_and_controls_stand_apart():
    whole = read_comparison(CONFIG)
    curves = {
        "ppo": {0: curve(0.0, 0.2, 0.4)},
        "contrastive": {0: curve(0.0, 0.4), 1: curve(0.0, 0.8), 2: curve(0.0, 0.2)},
        "null": {0: curve(0.0, 0.1)},
    }
    text = claims(whole, curves)
    row = next(line for line in text.splitlines() if line.startswith("| ppo |"))
    assert row.startswith("| ppo | 0.400 | contrastive | 0.50 (0.25–never) |")
    assert row.endswith("| 2 of 3 |")
    assert "| null | contrastive | 0.25 (0.12–0.50) |" in text
    assert "| null |" not in text.partition("| control |")[0]


def test_a_run_that_was_never_better_than_at_its_start_is_no_mark():
    """Else whoever it is compared with would never get to where it began."""
    whole = read_comparison(CONFIG)
    fallen = curve(0.1, 0.0, -0.1)
    curves = {"ppo": {0: fallen}, "contrastive": {0: curve(0.0, 0.4)}}
    assert "| ppo |" not in claims(whole, curves).partition("| contrastive |")[0]
    curves["ppo"][1] = curve(0.0, 0.2)
    row = next(line for line in claims(whole, curves).splitlines() if line.startswith("| ppo |"))
    assert row.startswith("| ppo | 0.200 | contrastive | 0.50 |")
    assert row.endswith("| 1 of 1 |")


def test_a_family_whose_runs_all_failed_has_no_rate(tmp_path):
    """Its methods would be trained at one that has just diverged."""
    whole = read_comparison(CONFIG)
    for run in sweep_runs(whole):
        (tmp_path / run.name).mkdir()
        score = math.nan if run.method.family == "ppo" else 0.5
        point = {"step": 10, "sampled": 160, "seconds": 1.0, "metrics": {"judge": score}}
        evaluations = [] if math.isnan(score) else [point]
        write_json(tmp_path / run.name / "summary.json", {"evaluations": evaluations})
    found = choices(whole, tmp_path)
    assert whole.families.keys() - found.keys() == {"ppo"}
    rates = {name: choice.rate for name, choice in found.items()}
    assert "ppo" not in {run.method.family for run in main_runs(whole, rates)}


# -- the YAML ------------------------------------------------------------------------------------


def test_the_shipped_comparison_is_that_of_the_docs():
    whole = read_comparison(CONFIG)
    assert len(list(sweep_runs(whole))) == 5 * 4  # of GRPO none
    rates = dict.fromkeys(whole.families, 1e-5)
    runs = list(main_runs(whole, rates))
    assert len(runs) == 6 * 3 + 5
    assert {r.method.name for r in runs[:11]} == {m.name for m in whole.methods}
    assert len({run.name for run in runs}) == len(runs)
    known = list(main_runs(whole, {"sdft": 1e-5}))  # while the other sweeps are going on
    assert {run.method.name for run in known} == {"trl-sdft"}
    ppo = next(r for r in runs if r.method.name == "ppo")
    assert ppo.steps(16) == 80
    fast = read_comparison(CONFIG, fast=True)
    assert fast.sweep_responses == 4
    assert {m.name for m in whole.methods} - {m.name for m in fast.methods} == {"ppo-lambda-0.95"}
    assert whole.families.keys() - fast.families.keys() == {"ppo-lambda-0.95"}
    assert fast.method("contrastive").seeds == (0,)
    assert fast.method("contrastive").settings == whole.method("contrastive").settings


def test_settings_of_a_run_hold_its_rate_seed_and_budget(tmp_path):
    whole = read_comparison(CONFIG)
    rates = dict.fromkeys(whole.families, 3e-5)
    runs = {r.method.name: r for r in main_runs(whole, rates) if r.seed == 0}
    grpo = settings_of(runs["grpo"], whole, tmp_path, tmp_path / "pairs.jsonl")
    assert grpo["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 3e-5
    rollout = grpo["model"]["init_args"]["rollout"]["init_args"]
    assert rollout == {"max_new_tokens": 48, "responses_per_prompt": 4}
    assert grpo["trainer"]["max_steps"] == 80
    assert grpo["trainer"]["val_check_interval"] == 16
    assert grpo["trainer"]["check_val_every_n_epoch"] is None
    by_two = replace(
        whole, common=merged(whole.common, {"trainer": {"accumulate_grad_batches": 2}})
    )
    counted = settings_of(runs["grpo"], by_two, tmp_path, tmp_path / "pairs.jsonl")
    assert counted["trainer"]["val_check_interval"] == 32  # of batches, two to a step
    seven = settings_of(replace(runs["grpo"], evaluations=7), whole, tmp_path, tmp_path / "p")
    assert seven["trainer"]["val_check_interval"] == 12  # and one at the end: never more than 7
    dpo = settings_of(runs["dpo"], whole, tmp_path, tmp_path / "pairs.jsonl")
    assert "subset" not in dpo["data"]["init_args"]
    of_the_hub = merged(whole.common, {"data": {"init_args": {"subset": "harmless-base"}}})
    hub = replace(whole, common=of_the_hub)
    read = settings_of(runs["dpo"], hub, tmp_path, tmp_path / "pairs.jsonl")["data"]["init_args"]
    assert read["subset"] is None  # a file has none
    assert dpo["data"]["class_path"] == "iqstar.data.JSONLPairs"
    assert dpo["data"]["init_args"]["path"].endswith("pairs.jsonl")


def test_merging_goes_level_by_level():
    """A null is a value: it switches off what is there."""
    base = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert merged(base, {"a": {"c": [2]}, "d": None}) == {"a": {"b": 1, "c": [2]}, "d": None}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"ppo": {"family": "none"}}}, r"methods\.ppo\.family: no family is called"),
        ({"families": {"ppo": {"sweep": "none"}}}, r"families\.ppo\.sweep: no method"),
        ({"families": {"ppo": {"rates": []}}}, r"families\.ppo\.rates"),
        ({"budget": {"run": 0}}, "must be a whole number"),
        ({"budget": {"evaluations": None}}, r"budget\.evaluations: must be a whole number"),
        ({"budget": None}, r"budget: must be a mapping of keys to values, found None"),
        ({"budget": {"sweep": 640}}, r"methods\..+: needs more responses than budget\.sw"),
        ({"methods": {"ppo": None}}, r"methods\.ppo: must be a mapping"),
        ({"methods": {"new": {"family": "ppo"}}}, r"methods\.new\.settings is missing"),
        ({"families": {"new": {"sweep": "ppo"}}}, r"families\.new\.rates is missing"),
        ({"families": {"ppo": {"sweep": "null"}}}, r"ppo\.sweep: null is of the family imitation"),
        ({"families": {"ppo": {"rates": "high"}}}, r"families\.ppo\.rates: needs a list"),
        ({"methods": {"ppo": {"steps_per_rollout": 0}}}, r"methods\.ppo\.steps_per_rollout"),
        ({"methods": {"ppo": {"sedes": [1]}}}, r"methods\.ppo: unknown key sedes"),
        ({"methods": {"ppo": {"seeds": []}}}, r"methods\.ppo\.seeds"),
        ({"methods": {"ppo": {"settings": "trl"}}}, r"methods\.ppo\.settings"),
        ({"budget": {"sweep_sed": 3}}, r"budget: unknown key sweep_sed"),
        ({"families": {"ppo": {"rate": [1e-5]}}}, r"families\.ppo: unknown key rate; known: rates"),
        ({"tables": {}}, "unknown key tables"),
        (
            {"methods": {"ppo": {"settings": RATE}}},
            r"optimizer\.init_args\.lr: the learning rates are families\.ppo\.rates; take it out",
        ),
        (
            {"methods": {"ppo": {"settings": {"model": {"init_args": {"optimizer": "SGD"}}}}}},
            r"methods\.ppo\.settings\.model\.init_args\.optimizer: write it as a mapping",
        ),
    ],
)
def test_bad_yaml_names_the_key(tmp_path, change, message):
    content = merged(yaml.safe_load(CONFIG.read_text(encoding="utf-8")), change)
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_comparison(file)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--config: .*none\.yaml"):
        read_comparison(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.yaml"):
        read_comparison(broken)


# -- running -------------------------------------------------------------------------------------


def runs_of(tmp_path, number=2):
    whole = read_comparison(CONFIG)
    runs = list(sweep_runs(whole))[:number]
    for run in runs:
        (tmp_path / run.name).mkdir()
    return runs


def test_runs_are_made_in_order_and_a_failure_is_told(tmp_path):
    first, second = runs_of(tmp_path)
    said = []

    def command(run):
        code = "print('fine')" if run is first else "raise SystemExit('no memory left')"
        return [sys.executable, "-c", code]

    with pytest.raises(InputError, match=rf"{second.name} failed \(exit code 1\): no memory left"):
        execute([first, second], command, tmp_path, None, said.append)
    assert [line.split(":")[0] for line in said] == [f"1/2 {first.name}"]


@pytest.mark.parametrize(("gpus", "visible", "seen"), [(4, "2,3", "2"), (4, None, "0")])
def test_a_run_sees_one_gpu_of_several(tmp_path, monkeypatch, gpus, visible, seen):
    """All of them would sample as many times the budget."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (run,) = runs_of(tmp_path, 1)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    execute([run], lambda _: [sys.executable, "-c", code], tmp_path, None, lambda _: None)
    assert (tmp_path / run.name / "log.txt").read_text() == f"{seen}\n"


def test_a_run_is_asked_to_save_itself_when_the_time_is_over(tmp_path):
    first, second = runs_of(tmp_path)
    code = (
        "import pathlib, signal, time\n"
        f"signal.signal({int(signal.SIGTERM)}, lambda *_: (\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch(), exit(143)))\n"
        "time.sleep(60)"
    )
    said = []
    deadline = time.monotonic() + 2
    command = [sys.executable, "-c", code]
    assert not execute([first, second], lambda _: command, tmp_path, deadline, said.append)
    assert (tmp_path / "saved").exists()
    assert len(said) == 1
    assert not execute([second], lambda _: command, tmp_path, time.monotonic(), said.append)
    assert len(said) == 1  # nothing was started


def endless(folder: Path) -> int:
    """A comparison of one run, which tells its process and then does nothing for a minute."""
    child = f"import time, os, pathlib; pathlib.Path({str(folder / 'child')!r})"
    child += ".write_text(str(os.getpid())); time.sleep(60)"
    (folder / "one").mkdir()
    with ended_by_sigterm():
        line = [sys.executable, "-c", child]
        execute([SimpleNamespace(name="one")], lambda _: line, folder, None, print)
    return 0


def test_a_comparison_that_is_terminated_ends_its_run(tmp_path):
    """It must not go on without us: the next call would start another one in its folder."""
    parent = Forked(endless, tmp_path, log=tmp_path / "log")
    until = time.monotonic() + 60
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.process.terminate()
    assert parent.end(60)[0] == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


def test_a_run_that_diverges_is_finished_and_cannot_win(tmp_path):
    whole = read_comparison(CONFIG)
    runs = [run for run in sweep_runs(whole) if run.method.family == "imitation"]
    said = []
    for run in runs:
        (tmp_path / run.name).mkdir()
    command = [sys.executable, "-c", "print('the loss is NaN'); raise SystemExit(3)"]
    assert execute(runs[:1], lambda _: command, tmp_path, None, said.append)
    assert "the loss is NaN" in said[0]
    assert pending(runs, tmp_path) == runs[1:]
    for number, run in enumerate(runs[1:]):
        point = {"step": 10, "sampled": 160, "seconds": 1.0, "metrics": {"judge": -1.0 * number}}
        write_json(tmp_path / run.name / "summary.json", {"evaluations": [point]})
    assert choices(whole, tmp_path)["imitation"].rate == runs[1].rate


def test_wrong_settings_of_a_method_are_told_before_anything_runs(tiny, tmp_path, capsys):
    wrong = {"settings": {"model": {"init_args": {"estimatr": 3}}}}
    file = small(tmp_path, tiny, **{"null": {}, "placebo": wrong})
    code, err = run_cli(capsys, "compare", "--config", file, "--output", tmp_path / "out")
    assert code == 2
    assert "methods.placebo: " in err
    assert "estimatr" in err
    assert not list((tmp_path / "out").rglob("summary.json"))


def test_a_mended_typo_needs_nothing_deleted(tiny, tmp_path, monkeypatch):
    """What never ran is no run with other settings."""
    started = []
    monkeypatch.setattr(compare, "execute", lambda runs, *_: started.extend(runs))
    wrong = {"settings": {"model": {"init_args": {"estimatr": 3}}}}
    whole = read_comparison(small(tmp_path, tiny, contrastive=wrong))
    with pytest.raises(InputError, match="estimatr"):
        compare.make(whole, tmp_path / "out", deadline=None)
    right = read_comparison(small(tmp_path, tiny, contrastive={}))
    compare.make(right, tmp_path / "out", deadline=None)
    assert started


def test_settings_that_were_kept(tmp_path):
    """Null is not the same as a default; a folder may be moved; the message says what to delete."""
    file = tmp_path / "run.yaml"
    check_same(file, {"a": 1}, made="it")  # nothing is kept yet
    keep(file, {"a": 1, "trainer": {"logger": {"save_dir": "here"}}})
    check_same(file, {"a": 1, "trainer": {"logger": {"save_dir": "there"}}}, made="it")
    with pytest.raises(InputError, match=r"\(clip: not given, now null\); delete all of it, or"):
        check_same(file, {"a": 1, "clip": None}, made="all of it")
    with pytest.raises(InputError, match=r"\(a: 1, now 2\)"):
        check_same(file, {"a": 2}, made="it")


@pytest.mark.parametrize("option", ["results", "results.html"])
def test_a_report_is_markdown(tmp_path, capsys, option):
    code, err = run_cli(capsys, "compare", "--config", CONFIG, "--report", option, "--output",
                        tmp_path)  # fmt: skip
    assert code == 2
    assert f"--report: must end in .md, got {option}" in err


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        ("trl", "methods.trl-sdft: trl-sdft needs the package trl; install it with: pip install "
                "trl==1.16.0"),
        ("matplotlib", "drawing plots needs the package matplotlib; install it with: pip install "
                       "matplotlib"),
    ],
)  # fmt: skip
def test_a_package_that_is_missing_is_told_before_anything_runs(
    tiny, tmp_path, monkeypatch, package, remedy
):
    found = compare.find_spec
    monkeypatch.setattr(compare, "find_spec", lambda n: None if n == package else found(n))
    comparison = read_comparison(small(tmp_path, tiny, **{"trl-sdft": {}}))
    with pytest.raises(InputError, match=re.escape(remedy)):
        compare.make(comparison, tmp_path / "out", deadline=None)
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize(
    ("flag", "place"),
    [("--output", "taken"), ("--report", "folder.md"), ("--report", "taken/a.md")],
)
def test_what_cannot_be_written_is_told_before_anything_runs(
    tiny, tmp_path, monkeypatch, capsys, flag, place
):
    monkeypatch.setattr(compare, "make", lambda *_: pytest.fail("something ran"))
    (tmp_path / "taken").touch()
    (tmp_path / "folder.md").mkdir()
    file = small(tmp_path, tiny, **{"null": {}})
    code, err = run_cli(capsys, "compare", "--config", str(file), flag, str(tmp_path / place))
    assert code == 2
    assert re.search(rf"{flag}: .*{place.split('/')[0]}.* cannot be written", err)
    assert "Traceback" not in err


def test_a_comparison_that_is_no_text(tmp_path, capsys):
    (tmp_path / "a.yaml").write_bytes(b"common: \xff\xfe")
    code, err = run_cli(capsys, "compare", "--config", str(tmp_path / "a.yaml"))
    assert (code, "Traceback" in err) == (2, False)
    assert "a.yaml: " in err


def small(tmp_path, tiny, **methods):
    """A comparison on the tiny model that takes seconds."""
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    content = merged(content, content.pop("fast"))
    content["common"]["model"]["init_args"]["policy"] = {"model": str(tiny)}
    content["common"]["model"]["init_args"]["judge"] = {"class_path": "judging.Vowels"}
    content["common"]["trainer"] = {"accelerator": "cpu", "precision": "32-true"}
    content["common"]["data"] = {
        "class_path": "iqstar.data.Sample",
        "init_args": {"batch_size": 4, "val_prompts": 4},
    }
    kept = {name: merged(content["methods"][name], more) for name, more in methods.items()}
    content["methods"] = kept
    families = {method["family"] for method in kept.values()}
    content["families"] = {
        name: {**f, "sweep": next(m for m in kept if kept[m]["family"] == name)}
        for name, f in content["families"].items()
        if name in families
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def test_a_judge_that_does_not_say_what_is_better_is_refused(tiny, tmp_path):
    common = yaml.safe_load(small(tmp_path, tiny, contrastive={}).read_text())["common"]
    common["model"]["init_args"]["judge"] = {"class_path": "iqstar.judges.RefusalJudge"}
    with pytest.raises(InputError, match=r"judge: a higher score of RefusalJudge is not better"):
        build(common, 0, tmp_path / "common.yaml")
    with pytest.raises(InputError, match=r"judge: a higher score of RefusalJudge is not better"):
        check(merged(common, NO_ESTIMATOR), tmp_path / "check.yaml")
    del common["model"]["init_args"]["judge"]
    with pytest.raises(InputError, match=r"judge: methods are compared by it; set one"):
        check(merged(common, NO_ESTIMATOR), tmp_path / "check.yaml")


def test_too_few_prompts_for_the_pairs(tiny, tmp_path):
    """A prompt of several pairs would be read once, and the budget not be what the table says."""
    common = yaml.safe_load(small(tmp_path, tiny, contrastive={}).read_text())["common"]
    common = merged(common, {"data": {"init_args": {"limit": 8}}})
    setting = build(common, 0, tmp_path / "common.yaml")
    with pytest.raises(InputError, match=r"common\.data: 8 prompts are too few for pairs of 20"):
        write_pairs(setting, 20, tmp_path / "pairs.jsonl")


def test_a_small_comparison_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    """DPO on pairs of its own, and a control; a second call makes nothing again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    started: list[Any] = []

    def start(line: list[str], **streams: Any) -> Any:
        """Forked; a process as a user's is has test_runs_are_made_in_order."""
        started.append(ForkedRun(line, **streams))
        return started[-1]

    monkeypatch.setattr("iqstar.compare.runner.subprocess.Popen", start)
    file = small(tmp_path, tiny, dpo={}, **{"null": {}})
    arguments = ["compare", "--config", str(file), "--output", "out"]
    code, err = run_cli(capsys, *arguments)
    assert code == 0, err
    assert len(started) > 2
    assert "left out whose responses the judge ties" in err
    report = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| dpo |" in report
    assert "| null (control) |" in report
    assert "| dpo | not swept | 1e-05 |" in report
    assert "Not done, or diverged: none." in report
    assert (tmp_path / "out" / "results" / "responses.svg").read_text().startswith("<?xml")
    (null,) = (p for p in (tmp_path / "out").glob("null-*-8"))
    points = read_curve(null)
    assert [p.responses for p in points] == [0, 8]
    assert points[-1].kl == 0
    assert points[0].score == points[-1].score
    assert points[-1].seconds > 0
    assert not (null / "checkpoints").exists()
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").open()]
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    assert {row["chosen_complete"] for row in pairs} <= {True, False}
    assert not all(row["chosen_complete"] and row["rejected_complete"] for row in pairs)

    again, err = run_cli(capsys, *arguments)
    assert again == 0
    assert "1/" not in err
    Path("out").rename("moved")
    (folder,) = Path("moved").glob("dpo-*-8")  # its pairs are beside it
    (folder / "summary.json").unlink()  # as if never made: it is made where the folder is now
    elsewhere, err = run_cli(capsys, *arguments[:-1], tmp_path / "moved")
    assert elsewhere == 0, err
    assert "1/1" in err
    assert not Path("out").exists()
    Path("moved").rename("out")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["common"]["model"]["init_args"]["eval_samples"] = 3
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    other, err = run_cli(capsys, *arguments)
    assert other == 2
    assert "run.yaml has other settings than now (model.init_args.eval_samples: 1, now 3)" in err


@pytest.mark.slow
def test_the_peer_is_measured_as_all_others_are(tiny, tmp_path, monkeypatch, capsys):
    """Before training TRL's model is the reference, so its first evaluation is that of any run."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    file = small(tmp_path, tiny, **{"null": {}, "trl-sdft": {}})
    code, err = run_cli(capsys, "compare", "--config", str(file), "--output", "out")
    assert code == 0, err
    curves = {p.name.split("-lr")[0]: read_curve(p) for p in (tmp_path / "out").glob("*-8")}
    assert curves["trl-sdft"][0] == curves["null"][0]
    assert curves["trl-sdft"][-1].responses == 8
    assert curves["trl-sdft"][-1].kl > 0


@pytest.mark.slow
def test_a_peer_that_diverges_is_finished(tiny, tmp_path, monkeypatch, capsys):
    """The comparison goes on without it, as with a run of ours."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    file = small(tmp_path, tiny, **{"trl-sdft": {}})
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["families"]["sdft"]["rates"] = [1.0e38]
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    code, err = run_cli(capsys, "compare", "--config", str(file), "--output", "out")
    assert code == 0, err
    assert "a weight is not finite after step" in err
    report = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "Not done, or diverged: trl-sdft (seed 0)." in report


@pytest.mark.slow
def test_the_fast_comparison_of_the_makefile(tmp_path, monkeypatch, capsys):
    """FAST=1 with the bundled model: everything works, in under six minutes."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    shared = Path(__file__).parents[2] / "shared" / "data" / "hh_rlhf"
    data = shared / "harmless-base_test_a.jsonl.gz"
    if not data.exists():
        pytest.skip("needs HH-RLHF rows")
    code, err = run_cli(capsys, "compare", "--config", str(CONFIG), "--fast", "--data", str(data))
    assert code == 0, err
    report = (tmp_path / "runs" / "compare-fast" / "results.md").read_text(encoding="utf-8")
    assert "Not done, or diverged: none." in report
