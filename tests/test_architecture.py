"""Imports run one way, and files stay small enough to be read."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "iqstar"
#: Each layer imports only from layers above it; those of one line do not import each other.
LAYERS = [
    {"errors", "chatter", "allocator", "vllm_worker", "signatures", "run_folder", "provenance"},
    {"slurm"},
    {"mdp", "precision", "ranks", "fingerprint", "atomic", "adapters", "intervals", "templates"}
    | {"foreign_errors"},
    {"ranking", "accumulation", "padding_free"},
    {"checkpoints"},
    {"sharding"},
    {"logprobs"},
    {"head"},
    {"distributions"},
    {"losses", "credit", "chat", "metrics", "optim", "pretrained", "refresh"}
    | {"attention", "recomputed", "sampling", "settings", "kv_cache"},
    {"prefixes", "decoding", "judges", "packed", "lean"},
    {"policy"},
    {"admission"},
    {"loading", "engine"},
    {"scoring", "rollouts", "strategies"},
    {"estimators"},
    {"assignment", "evaluation", "card", "export", "vllm_engines", "room"},
    {"curves", "resume", "credit_file", "weight_files", "paired_responses", "evaluated"},
    {"scored", "trained"},
    {"alignment", "vllm_rollout"},
    {"module", "baselines"},
    {"callbacks", "defaults", "settings_file", "checkpoint_callback"},
    {"export_callback", "preemption", "progress"},
    {"summary"},
    {"training_cli"},
    {"one_device"},
    {"cli"},
]
#: Packages of several files, which may import each other, and what else they may import.
PACKAGES = {
    "data": {"errors", "mdp"},
    "commands": {"errors", "mdp", "data", "settings", "pretrained", "policy", "adapters", "loading"}
    | {"checkpoints", "precision", "card", "export", "planning", "training_cli", "chatter"}
    | {"signatures", "assignment", "credit_file", "estimators", "module", "rollouts", "scored"}
    | {"intervals", "ranking", "judges", "compare", "one_device"}
    | {"report", "paired_responses", "summary", "alignment", "resume", "atomic", "run_folder"},
    "report": {"errors", "mdp", "atomic", "intervals", "judges", "paired_responses", "templates"},
    "compare": {"errors", "atomic", "intervals", "mdp", "data", "settings", "judges", "metrics"}
    | {
        "policy",
        "loading",
        "evaluation",
        "rollouts",
        "module",
        "summary",
        "training_cli",
        "one_device",
        "optim",
        "chatter",
    },
    "planning": {"errors", "mdp", "data", "pretrained", "attention", "chat", "sampling", "sharding"}
    | {"allocator", "decoding", "estimators"}
    | {"logprobs", "head", "distributions", "optim", "policy", "loading", "rollouts", "strategies"}
    | {"evaluation", "curves", "module", "vllm_rollout"},
}
#: May import a package beside its layers.
FROM_PACKAGES = {"training_cli": {"data"}, "one_device": {"data"}, "cli": {"data", "commands"}}
#: Lines of one concept that a split would only scatter; raise no limit without a reason.
LONG = {"pretrained.py": 350, "data/base.py": 350}
LONG |= {"chat.py": 330, "settings.py": 410}
FILES = sorted(p for p in SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The file's part of the package: a layer's name, or a sub-package's."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imported(path: Path) -> set[str]:
    """Names of the parts that a file imports, anywhere in it but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("iqstar.")}
    return found & ({n for layer in LAYERS for n in layer} | set(PACKAGES))


def allowed(name: str) -> set[str]:
    if name in PACKAGES:
        return PACKAGES[name] | {name}
    below: set[str] = set()
    for layer in LAYERS:
        if name in layer:
            return below | {name} | FROM_PACKAGES.get(name, set())
        below |= layer
    return set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    if path == SOURCE / "__init__.py":
        return
    name = name_of(path)
    known = {n for layer in LAYERS for n in layer} | set(PACKAGES)
    assert name in known, f"{name} has no layer yet: give it one in LAYERS"
    assert imported(path) <= allowed(name)


def test_nothing_is_called_utils():
    assert [p.name for p in FILES if "util" in p.stem or "helper" in p.stem] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_can_be_read_in_one_go(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONG.get(path.relative_to(SOURCE).as_posix(), 320)


def test_every_layer_exists():
    names = {name_of(p) for p in FILES}
    assert {n for layer in LAYERS for n in layer} | set(PACKAGES) <= names
