"""The documentation says what is there: commands, links, paths, curves, keys, Python examples."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers.logger import DummyLogger

import iqstar
from iqstar.cli import OTHERS, TRAINING, main
from iqstar.commands import audit, compare, export, harm_judge
from iqstar.compare.reading import read_comparison
from iqstar.data import Sample
from iqstar.estimators import ContrastiveEstimator
from iqstar.judges import VaderJudge
from iqstar.losses import TokenPolicyGradientLoss
from iqstar.rollouts import GenerateRollout
from iqstar.summary import RunSummary

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without fenced blocks and mathematics."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)


def command_lines() -> list[str]:
    """Every command shown in a shell block, or in a comment at the head of a config."""
    lines = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            lines += block.replace("\\\n", " ").splitlines()
    for config in CONFIGS:
        lines += re.findall(r"^# .*?(iqstar .*)$", config.read_text(), re.MULTILINE)
    return [re.sub(r" +", " ", line) for line in lines]


def iqstar_commands() -> list[str]:
    pattern = rf"\biqstar (?:{'|'.join([*TRAINING, *OTHERS])}) .*"
    found = (re.search(pattern, line) for line in command_lines())
    return sorted({match[0] for match in found if match})


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("line", iqstar_commands())
def test_commands_parse(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text(blocks(ROOT / "README.md", "yaml")[0])
    line = line.replace("my.yaml", str(tmp_path / "my.yaml"))
    line = line.replace("--config EXPERIMENT", "--config configs/quickstart.yaml")
    command, *rest = shlex.split(line, comments=True)[1:]
    if command == "audit":
        parser, own = audit._parser(rest)
        parser.parse_args(own)
        return
    if command == "compare":
        options = compare.parser().options(rest)
        read_comparison(options.config, fast=options.fast)
        return
    if command in ("export", "harm-judge"):
        {"export": export, "harm-judge": harm_judge}[command]._parse(rest)
        return
    if not any(argument.endswith(".help") or argument == "--help" for argument in rest):
        rest += [] if "--print_config" in rest else ["--print_config"]
    try:
        code = main([command, *rest])
    except SystemExit as stopped:  # jsonargparse leaves in this way once it has printed
        code = stopped.code or 0
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "class_path" in shown.out


def test_there_are_commands_to_check() -> None:
    assert len(iqstar_commands()) > 20


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert {"quickstart", "test"} <= shown <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"\b(?:configs|docs|src|tests|notebooks)/[\w./-]*\w", page.read_text())
    for path in named:
        found = (ROOT / path).exists() or (ROOT / page.parent / path).exists()
        assert found, f"{page.name} names {path}"


def test_every_class_of_a_yaml_is_documented() -> None:
    from iqstar import baselines, credit, estimators, judges, losses, refresh

    pages = {
        estimators: "estimators",
        refresh: "estimators",
        losses: "losses",
        credit: "losses",
        baselines: "baselines",
        judges: "judges",
    }
    for module, page in pages.items():
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for name, cls in list(vars(module).items()):
            if not inspect.isclass(cls) or not cls.__module__.startswith(module.__name__):
                continue
            made_here = issubclass(cls, judges.Judge) or module is not judges
            public = made_here and not (name.startswith("_") or inspect.isabstract(cls))
            if public and not getattr(cls, "_is_protocol", False):
                assert f"`{name}" in text, f"{name} is not in {page}.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_examples_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name)


def test_python_example_of_the_readme_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (f'{{"prompt": "What is {n} and {n}?"}}\n' for n in range(9))
    Path("my_prompts.jsonl").write_text("".join(lines))
    (block,) = blocks(ROOT / "README.md", "python")
    block = block.replace('model="bundled"', f"model={str(tiny)!r}")
    block = block.replace('prompts.jsonl"', 'prompts.jsonl", val_prompts=2, batch_size=2')
    block = block.replace("max_steps=20", "max_steps=1, logger=False, enable_progress_bar=False")
    short = "estimator=estimator, rollout=GenerateRollout(max_new_tokens=4))"
    block = block.replace("estimator=estimator)", short)
    names: dict[str, Any] = {"GenerateRollout": GenerateRollout}
    exec(compile(block, "README.md", "exec"), names)
    assert names["trainer"].global_step == 1


class Recorder(DummyLogger):
    """Keeps the names and counts of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.names |= set(metrics)


class Hesitant(VaderJudge):
    """Leaves a response without a score, so that this is logged too."""

    def score(self, prompts: Any, responses: Any) -> list[float]:
        return [float("nan"), *super().score(prompts, responses)[1:]]


@pytest.fixture(scope="module")
def tiny_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], Path]:
    """Names that one step of a run logs (with the loss that logs most), and the run's folder."""
    folder = tmp_path_factory.mktemp("run")
    module = iqstar.InverseQStar(
        policy=iqstar.PolicySpec(model=str(tiny)),
        estimator=ContrastiveEstimator(principle="Be kind.", antiprinciple="Be rude."),
        loss=TokenPolicyGradientLoss(),
        rollout=GenerateRollout(max_new_tokens=4),
        judge=Hesitant(),
        eval_samples=1,
    )
    logger = Recorder()
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        num_sanity_val_steps=-1,
        log_every_n_steps=1,
        default_root_dir=folder,
        logger=logger,
        callbacks=[RunSummary()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with torch.random.fork_rng(devices=[]):
        trainer.fit(module, datamodule=Sample(batch_size=2, val_prompts=2))
    return logger.names, folder


def test_curves_are_those_of_the_glossary(tiny_run: tuple[set[str], Path]) -> None:
    text = (ROOT / "docs" / "curves.md").read_text()
    documented = set(re.findall(r"`((?:train|val)/\w+)`", text))
    assert documented == {name for name in tiny_run[0] if "/" in name}
    # A meaning, and what is healthy: each name is the subject of two rows.
    cells = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    subjects = [name for cell in cells for name in re.findall(r"`((?:train|val)/\w+)`", cell)]
    assert sorted(subjects) == sorted([*documented, *documented])


def test_summary_keys_are_those_of_the_glossary(tiny_run: tuple[set[str], Path]) -> None:
    (file,) = tiny_run[1].rglob("summary.json")
    text = (ROOT / "docs" / "curves.md").read_text().partition("## `summary.json`")[2]
    cells = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    keys = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
    summary = json.loads(file.read_text())
    assert keys == set(summary)
    assert all(f"`{key}`" in text for key in summary["judge"])
