"""``iqstar audit``: golden counts on the real files, and its messages."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from iqstar.commands.audit import main
from iqstar.data.hh_rlhf import audit_pairs
from iqstar.errors import InputError
from processes import Forked

DATA = Path(__file__).parents[2] / "shared" / "data"
HH = DATA / "hh_rlhf" / "harmless-base_test_a.jsonl.gz"
BEAVER = DATA / "beavertails" / "30k_test_a.jsonl.gz"
real_files = pytest.mark.skipif(not HH.exists(), reason=f"the real data is not at {DATA}")


def audit(capsys, *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@real_files
def test_golden_counts_of_hh_rlhf(capsys):
    report = audit(capsys, "--data", "HHRLHF", "--data.path", str(HH))
    details = report.pop("details")
    assert report == {
        "rows": 1181,
        "usable": 1176,
        "prompts": 1179,
        "multi_turn": 832,
        "differing_prompts": 3,
        "empty_chosen": 2,
        "same_role": 5,
        "duplicates": 0,
    }
    assert details["same_first_char"] == 239
    assert details["skipped"] == {"duplicate prompt": 2, "prompt ends with an assistant turn": 2}


@real_files
def test_golden_counts_of_beavertails(capsys):
    report = audit(capsys, "--data", "iqstar.data.BeaverTails", "--data.path", str(BEAVER))
    report.pop("details")
    assert report == {"rows": 1510, "usable": 1508, "prompts": 1257, "duplicates": 2, "safe": 625}


@real_files
def test_the_other_options_are_accepted(capsys):
    argv = ["--data", "HHRLHF", f"--data.path={HH}", "--data.first_turn_only", "true"]
    details = audit(capsys, *argv, "--data.max_prompt_chars", "150")["details"]
    assert details["cut_to_first_turn"] > 800
    assert details["prompt_turns"]["max"] == 1
    assert details["prompt_chars"]["max"] <= 150


def test_pairs_are_counted_by_definition():
    hi = "\n\nHuman: Hi\n\nAssistant:"
    two = "\n\nHuman: Hi\n\nAssistant: Yo.\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
    report = audit_pairs(
        [
            {"chosen": f"{hi} Hello.", "rejected": f"{hi} Hey."},  # same first character
            {"chosen": f"{hi} Hello.", "rejected": f"{hi} Hey."},  # the same row again
            {"chosen": f"{hi} ", "rejected": f"{hi} Go."},  # empty chosen
            {"chosen": f"{hi} A", "rejected": f"{two} A"},  # differing prompts
            {"chosen": f"{two} A", "rejected": f"{two} B"},  # same role, multi-turn
            {"chosen": f"{hi}\n\nAssistant: A", "rejected": f"{hi}\n\nAssistant: B"},  # same role
        ]
    )
    details = report.pop("details")
    assert report == {
        "rows": 6,
        "usable": 4,
        "prompts": 3,
        "multi_turn": 1,
        "differing_prompts": 1,
        "empty_chosen": 1,
        "same_role": 2,
        "duplicates": 1,
    }
    assert details["same_first_char"] == 2


def test_people_get_a_table(capsys):
    assert main(["--data", "Sample"]) == 0
    out = capsys.readouterr().out
    assert "distinct prompts" in out
    assert "train 136 · heldout 64" in out


def test_your_own_rows_are_audited(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "b", "response": "c"}\n')
    report = audit(capsys, "--data", "JSONL", "--data.path", str(path))
    assert (report["rows"], report["usable"], report["prompts"], report["duplicates"]) == (
        3,
        3,
        2,
        1,
    )


def test_pairs_of_ones_own_are_audited(tmp_path, capsys):
    """Rows of one prompt are no repetitions if their replies differ; TRL's rows are rows too."""
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "a", "chosen": "yes", "rejected": "never"},
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "b", "chosen": "same", "rejected": "same"},
        {side: [{"role": "user", "content": "c"}, {"role": "assistant", "content": side}]
         for side in ("chosen", "rejected")},
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = audit(capsys, "--data", "JSONLPairs", "--data.path", str(path))
    counts = {key: report[key] for key in ("rows", "usable", "prompts", "duplicates")}
    assert counts == {"rows": 5, "usable": 4, "prompts": 2, "duplicates": 1}
    assert report["details"]["unusable"] == 1


def test_a_category_may_be_a_name(tmp_path, capsys):
    row = {"prompt": "a", "response": "b", "is_safe": False, "category": "violence"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    report = audit(capsys, "--data", "BeaverTails", "--data.path", str(path))
    assert report["details"]["harm_categories"] == {}


def test_too_few_prompts_to_train_on(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(40)))
    argv = ["--data", "JSONL", "--data.path", str(path)]
    assert "warnings" not in audit(capsys, *argv)["details"]
    (warning,) = audit(capsys, *argv, "--data.val_prompts", "30")["details"]["warnings"]
    assert warning.startswith("10 training prompts do not fill one batch of 16 (data.batch_size)")
    assert main([*argv, "--data.val_prompts=30"]) == 0
    assert f"warnings: {warning}" in " ".join(capsys.readouterr().out.split())
    for usual in ("--data.drop_last=false", "--data.val_prompts=null"):
        assert "warnings" not in audit(capsys, *argv, "--data.val_prompts=30", usual)["details"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--json"], "--data is missing; give one of HHRLHF, JSONL, "),
        (["--data.path", "x.jsonl"], "--data.path: data has no class yet; name one first: --data"),
        (["--data", "JSONLPairs", "--data.batch_size", "x"], "data.batch_size: "),
        (["--data", "HHRLFH"], "did you mean iqstar.data.HHRLHF?"),
        (["--data", "iqstar.data.Beavertail"], "did you mean iqstar.data.BeaverTails?"),
        (
            ["--data", "Sample", "--data.val_prompt", "3"],
            "--data.val_prompt: unknown option; did you mean --data.val_prompts?",
        ),
        (["--data", "Sample", "--data.val_prompts", "x"], "data.val_prompts: "),
        (["--data", "Sample", "--data.batch_size", "0"], "data.batch_size: 0 is too small"),
        (["--data", "JSONL", "--data.path", "nowhere.jsonl"], "data.path: no such file"),
        (["--data", "JSONL", "--data.path", " "], "data.path: is empty; name a file"),
        (["--data", "Sample", "--jsn"], "--jsn"),
    ],
)
def test_wrong_arguments_are_explained(argv, expected):
    with pytest.raises(InputError) as error:
        main(argv)
    assert expected in str(error.value)


def test_the_data_of_a_runs_config(tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": "Why then?"}\n')
    own = {"class_path": "iqstar.data.JSONL", "init_args": {"path": str(tmp_path / "rows.jsonl")}}
    config, other = tmp_path / "my.yaml", tmp_path / "other.yaml"
    config.write_text(json.dumps({"model": {"class_path": "iqstar.InverseQStar"}, "data": own}))
    other.write_text("trainer: {devices: 2}")
    monkeypatch.setenv("HOME", str(tmp_path))
    both = ["--config=~/my.yaml", "--config", str(other)]
    assert audit(capsys, *both)["details"]["split"] == {"train": 1, "heldout": 1}
    report = audit(capsys, *both, "--data.max_prompt_chars", "4", "--data.val_prompts", "0")
    assert report["details"]["split"] == {"train": 1, "heldout": 0}
    with pytest.raises(InputError, match="or --config FILE with its data"):
        main(["--config", str(other)])
    assert audit(capsys, f"--config={other}", "--data", "Sample")["prompts"] > 2
    config.write_text("data:\n  class_path: iqstar.data.JSONL\n  init_args: {pth: rows.jsonl}\n")
    with pytest.raises(InputError, match=r"my\.yaml:3: unknown key data\.init_args\.pth; did you"):
        main(["--config", str(config)])


def imports_datasets() -> int:
    importlib.import_module("iqstar.commands.audit")
    return "datasets" in sys.modules


def test_importing_the_data_modules_does_not_import_datasets(tmp_path):
    assert Forked(imports_datasets, log=tmp_path / "log").end() == (0, "")
