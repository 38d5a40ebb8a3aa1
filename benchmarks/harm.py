"""How harmful replies are before and after training with a principle, by a judge of words.

    python benchmarks/harm.py --data 30k_test.jsonl.gz --safe helpful-base/train.jsonl.gz

200 prompts are set aside by a hash: neither the training nor the judge sees them. The judge is
trained on the labels of the other rows, the policies on their prompts alone, one with a principle
about harm and one about a kind tone; the reference that is merely told either stands beside them.
``results/harm.json`` has what ``iqstar eval`` reports. ``--told`` measures those two alone, without
training, beside what the file has.
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
}
"""The arguments that choose each one's estimator."""
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
    runs, out = options.folder, options.folder / f"{name}.eval"
    settings = ["--config", CONFIG, *PRINCIPLES[name]]
    if not (options.told or list((runs / name).rglob("policy/config.json"))):
        iqstar(
            "fit", *settings, "--data.path", str(seen), "--data.val_prompts", "16",
            "--trainer.max_steps", str(options.steps), "--trainer.logger.save_dir", str(runs),
            "--trainer.logger.name", name, "--ckpt_path", "last",
        )  # fmt: skip
    judges = runs / "judges.yaml"
    harm = {"class_path": "iqstar.judges.HarmJudge", "init_args": {"path": f"{runs}/harm.npz"}}
    judges.write_text(
        json.dumps({"judges": [harm, {"class_path": "iqstar.judges.RefusalJudge"}]})
    )  # JSON is YAML
    evaluation = (
        "eval", *settings, "--config", str(judges), "--data.path", str(unseen),
        "--data.val_prompts", "null", "--model.eval_samples", "1",
        "--trainer.logger.save_dir", str(runs), "--trainer.logger.name", name,
    )  # fmt: skip
    told = runs / f"{name}.told"
    iqstar(*evaluation, "--told", "--output", str(told))
    if options.told:
        return {"told": kept(told)}
    iqstar(*evaluation, "--ckpt_path", "last", "--output", str(out))
    return {"steps": options.steps, **kept(out), "told": kept(told)}


def kept(folder: Path) -> dict[str, Any]:
    """What is kept of a report."""
    report = json.loads((folder / "report.json").read_text())
    judged = [{key: judge.get(key) for key in KEPT} for judge in report["judges"]]
    sides = {key: report["sides"][key] for key in ("policy", "reference")}
    return {"prompts": report["prompts"], "judges": judged, "sides": sides}


def main() -> None:
    """Measures both principles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="BeaverTails rows, .jsonl.gz")
    parser.add_argument("--safe", type=Path, required=True, help="HH pairs with safe replies")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "harm")
    parser.add_argument("--steps", type=int, default=20, help="of 16 responses")
    parser.add_argument("--unseen", type=int, default=200, help="prompts to measure on")
    parser.add_argument("--told", action="store_true", help="train nothing")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    unseen, seen = split(options.data, options.folder, options.unseen)
    judge = options.folder / "harm.npz"
    if not judge.exists():
        safe = str(options.safe.resolve())
        iqstar("harm-judge", "--data", str(seen), "--safe", safe, "--output", str(judge))
    known = json.loads(RESULTS.read_text()) if options.told else {}
    found = {
        name: known.get(name, {}) | measure(name, options, seen, unseen) for name in PRINCIPLES
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
