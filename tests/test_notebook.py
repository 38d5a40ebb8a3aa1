"""The notebooks: what is stored, that the cells run on a tiny model, and the real run (slow)."""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"
LARGEST = 300_000
"""Bytes of outputs that may be stored, the pictures included."""


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def sources() -> list[str]:
    return [cell.source for cell in read().cells if cell.cell_type == "code"]


def test_valid_with_ten_short_cells() -> None:
    nbformat.validate(read())
    assert len(sources()) == 10
    assert max(len(source.splitlines()) for source in sources()) <= 40


def test_stored_outputs_are_small_and_hold_no_error() -> None:
    outputs = [o for cell in read().cells for o in cell.get("outputs", [])]
    assert len(str(outputs)) < LARGEST
    assert all(o.output_type != "error" for o in outputs)
    assert str(ROOT) not in str(outputs)  # no path of the machine it ran on


def test_imports_resolve() -> None:
    for node in ast.walk(ast.parse("\n".join(sources()))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_cells_run_on_a_tiny_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IQSTAR_NOTEBOOK_FAST", "1")
    monkeypatch.setenv("IQSTAR_NOTEBOOK_MODEL", str(tiny))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources()):
        exec(compile(source, f"cell {number + 1}", "exec"), names)
    assert names["summary"]["optimizer_steps"] == 2
    assert Path(names["summary"]["policy"], "model.safetensors").is_file()
    # Before training the policy is the reference.
    assert all(value == 0 for row in names["before"] for value in row["implied"])
    assert any(value != 0 for row in names["after"] for value in row["implied"])
    assert "says nothing about the method" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    for name in ("IQSTAR_NOTEBOOK_FAST", "IQSTAR_NOTEBOOK_MODEL"):
        monkeypatch.delenv(name, raising=False)
    notebook = read()
    place = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place)
    client.execute(env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    (summary,) = tmp_path.glob("runs/notebook/version_0/summary.json")
    assert '"samples": 160' in summary.read_text()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
