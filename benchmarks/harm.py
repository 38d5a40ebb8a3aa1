"""How harmful replies are before and after training with a principle, by a judge of words.

    python benchmarks/harm.py --data 30k_test.jsonl.gz --safe helpful-base/train.jsonl.gz

200 prompts are set aside by a hash: neither the training nor the judge sees them. The judge is
trained on the labels of the other rows, the policies on their prompts alone: one with a principle
about harm, one about a kind tone, and one with an unrelated fact, the control. The reference that
is merely told a principle stands beside them; *benign* are refusals of the prompts of ``--safe``.
``results/harm.json`` has what ``iqstar eval`` reports. ``--told`` trains nothing.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "harm.json"
CONFIG = "configs/experiment/beavertails_harmless.yaml"
PRINCIPLES = {
    "harmless": [],
    "kind": ["--model.estimator", "configs/estimator/principle.yaml"],
    "placebo": ["--model.estimator", "benchmarks/controls/placebo_beavertails.yaml"],
}
"""The arguments that choose each one's estimator."""
CONTROLS = {"placebo"}
"""Which have no principle to tell."""
BENIGN = ["--data", "iqstar.data.HHRLHF", "--data.first_turn_only", "true", "--limit", "200"]
KEPT = ("name", "version", "policy", "reference", "difference", "wins", "ties", "losses")
"""What is kept of each judge."""


def split(data: Path, folder: Path, unseen: int) -> tuple[Path, Path]:
    """Writes the rows of some prompts to one file, and all others to another."""
    lines = gzip.decompress(data.read_bytes()).decode().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    aside = set(sorted(prompts, key=lambda p: hashlib.sha256(p.encode()).digest())[:unseen])
    files = folder / "unseen.jsonl.gz", folder / "seen.jsonl.gz"
    folder.mkdir(parents=True, exist_ok=True)
    for file, inside in zip(files, (True, False), strict=True):
        chosen = [line for line in lines if (json.loads(line)["prompt"] in aside) is inside]
        file.write_bytes(gzip.compress(("\n".join(chosen) + "\n").encode(), mtime=0))
    return files


def iqstar(*arguments: str) -> None:
    """Runs a command of iqstar in the root."""
    subprocess.run([sys.executable, "-m", "iqstar.cli", *arguments], cwd=ROOT, check=True)


def measure(name: str, options: argparse.Namespace, seen: Path, unseen: Path) -> dict[str, Any]:
    """Trains with one principle and evaluates the policy; the reference told it, too."""
    runs = options.folder
    settings = ["--config", CONFIG, *PRINCIPLES[name]]
    logger = ["--trainer.logger.save_dir", str(runs), "--trainer.logger.name", name]
    if not options.told:
        iqstar(
            "fit", *settings, *logger, "--data.path", str(seen), "--data.val_prompts", "16",
            "--trainer.max_steps", str(options.steps), "--ckpt_path", "last",
        )  # fmt: skip
    harm = {"class_path": "iqstar.judges.HarmJudge", "init_args": {"path": f"{runs}/harm.npz"}}
    refusal = {"class_path": "iqstar.judges.RefusalJudge"}

    def evaluate(kind: str, judges: list[Any], data: Path, *more: str) -> dict[str, Any]:
        file, out = runs / f"{kind}.yaml", runs / f"{name}.{kind}"
        file.write_text(json.dumps({"judges": judges}))  # JSON is YAML
        iqstar(
            "eval", *settings, *logger, "--config", str(file), "--model.eval_samples", "1",
            *more, "--data.path", str(data), "--data.val_prompts", "null", "--output", str(out),
        )  # fmt: skip
        return kept(out)

    found: dict[str, Any] = {}
    if name not in CONTROLS:
        found["told"] = evaluate("told", [harm, refusal], unseen, "--told")
    if not options.told:
        trained = ("--ckpt_path", "last")
        found |= {"steps": options.steps, **evaluate("eval", [harm, refusal], unseen, *trained)}
        found["benign"] = evaluate("benign", [refusal], options.safe, *BENIGN, *trained)
    return found


def kept(folder: Path) -> dict[str, Any]:
    """What is kept of a report."""
    report = json.loads((folder / "report.json").read_text())
    judged = [{key: judge.get(key) for key in KEPT} for judge in report["judges"]]
    sides = {key: report["sides"][key] for key in ("policy", "reference")}
    return {"prompts": report["prompts"], "judges": judged, "sides": sides}


def main() -> None:
    """Measures all principles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="BeaverTails rows, .jsonl.gz")
    parser.add_argument("--safe", type=Path, required=True, help="HH pairs with safe replies")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "harm")
    parser.add_argument("--steps", type=int, default=20, help="of 16 responses")
    parser.add_argument("--unseen", type=int, default=200, help="prompts to measure on")
    parser.add_argument("--told", action="store_true", help="train nothing")
    options = parser.parse_args()
    options.folder, options.safe = options.folder.resolve(), options.safe.resolve()
    unseen, seen = split(options.data, options.folder, options.unseen)
    judge = options.folder / "harm.npz"
    if not judge.exists():
        safe = str(options.safe)
        iqstar("harm-judge", "--data", str(seen), "--safe", safe, "--output", str(judge))
    known = json.loads(RESULTS.read_text()) if options.told else {}
    found = known | {
        name: known.get(name, {}) | measure(name, options, seen, unseen)
        for name in PRINCIPLES
        if not (options.told and name in CONTROLS)
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
