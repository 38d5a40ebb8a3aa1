"""Where a run writes, with loggers that give it a folder, with others, and with none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from cli_tools import changed, error_of, tiny_config, write_config
from fitting import make_trainer
from iqstar.cli import main
from iqstar.run_folder import run_folder, runs_folder


class Remote(DummyLogger):
    """As W&B's and MLflow's: a name and a version, and no folder of the run."""

    @property
    def save_dir(self) -> str:
        return "."

    @property
    def name(self) -> str:
        return "kind"

    @property
    def version(self) -> str:
        return "x7"


@pytest.mark.parametrize(
    ("logger", "wanted"),
    [
        (lambda: TensorBoardLogger("runs", "kind", version="v"), "runs/kind/v"),
        (lambda: CSVLogger("runs", "kind", version=3), "runs/kind/version_3"),
        (Remote, "kind/x7"),
        (lambda: False, "root"),
    ],
    ids=["TensorBoard", "CSV", "remote", "none"],
)
def test_every_run_has_its_folder(tmp_path, monkeypatch, logger, wanted):
    """Lightning puts the checkpoints there too."""
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(logger=logger(), default_root_dir="root", max_steps=1)
    assert run_folder(trainer).resolve() == (tmp_path / wanted).resolve()
    above = runs_folder(trainer.logger, trainer.default_root_dir)
    assert above == Path(wanted if trainer.logger is None else Path(wanted).parent)


def test_a_run_of_another_logger_leaves_the_working_folder_alone(
    tmp_path, tiny, monkeypatch, capsys
):
    """Its files stand beside its checkpoints, and `last` looks below its name only."""
    monkeypatch.chdir(tmp_path)
    mine = Path("config.yaml")
    config = changed(tiny_config(tmp_path, tiny), "trainer.logger", "test_run_folder.Remote")
    write_config(tmp_path, config)
    before = mine.read_text()
    assert main(["fit", "--config", str(mine)]) == 0
    assert mine.read_text() == before
    run = Path("kind", "x7")
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 2
    for name in ("policy/config.json", "summary.json", "checkpoints/last.ckpt"):
        assert (run / name).is_file(), name
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.name)  # one of nobody's in the working folder
    options = ("--config", str(mine), "--ckpt_path", "last")
    assert error_of(capsys, "validate", *options).endswith("no complete checkpoint below kind")


def test_without_a_logger_no_file_of_the_user_is_replaced(tmp_path, tiny, monkeypatch, capsys):
    """The folder of the run is the working one: what is there already may be anybody's."""
    monkeypatch.chdir(tmp_path)
    config = changed(tiny_config(tmp_path, tiny), "trainer.logger", False)
    mine = write_config(tmp_path, config)
    before = mine.read_text()
    Path("policy").mkdir()
    Path("policy", "law.txt").write_text("mine")
    message = error_of(capsys, "fit", "--config", str(mine))
    assert message.startswith("export.at_end: ")
    assert message.endswith("move it, or set trainer.default_root_dir")
    Path("policy").rename("mine")
    assert main(["fit", "--config", str(mine)]) == 0
    assert Path("policy", "config.json").is_file()
    assert mine.read_text() == before
