"""Whatever ends a run, what was saved before is whole, and the next run goes on from it."""

import json
import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cli_tools import changed, end, error_of, launch, tiny_config, write_config, write_prompts
from iqstar.atomic import written_beside
from iqstar.checkpoints import (
    is_complete,
    newest_checkpoint,
    read_checkpoint,
    whole_or_nothing,
    write_file,
)
from iqstar.cli import main
from iqstar.errors import InputError, PreemptedError
from killed import killed_at_random
from processes import Forked, iqstar, two_processes


def configure(folder: Path, model: Path, **settings) -> Path:
    """A tiny run that saves after every step, into a new folder of runs each time."""
    config = changed(tiny_config(folder, model), "trainer.logger.init_args.version", None)
    config = changed(config, "checkpoint", {"every_n_train_steps": 1})
    for key, value in settings.items():
        config = changed(config, key.replace("__", "."), value)
    return write_config(folder, config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(folder)
    assert newest is not None
    return read_checkpoint(newest)["state_dict"]


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path, tiny, kills):
    """SIGKILL at random moments, during saves too; the end is that of an undisturbed run."""
    steps = {1: 16, 20: 460}[kills]  # more than all of its children get to before they are killed
    settings = {"trainer__max_steps": steps, "summary": {"examples": 0}}
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    killed.mkdir()
    calm.mkdir()
    configure(killed, tiny, **settings)
    code, output = Forked(killed_at_random, killed, kills, log=tmp_path / "log").end(600)
    assert code == 0, output
    found = json.loads((killed / "found.json").read_text())
    assert found["steps"] == sorted(found["steps"])
    assert len(set(found["steps"])) == kills + 1  # every child got further than the one before
    assert found["status"] == [0]
    assert found["end"] == [settings["trainer__max_steps"]]
    if kills == 20:
        assert sum(found["half_written"]) > 0  # some were killed while they wrote
    assert main(["fit", "--config", str(configure(calm, tiny, **settings))]) == 0
    undisturbed, other = weights(calm), weights(killed)
    assert all(torch.equal(undisturbed[name], other[name]) for name in undisturbed)


def test_the_summary_counts_the_seconds_of_earlier_processes(tmp_path, tiny):
    config = configure(tmp_path, tiny, trainer__max_steps=4, summary={"examples": 0})
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "2"]) == 0
    newest = newest_checkpoint(tmp_path)
    saved = read_checkpoint(newest)
    assert 0 < saved["callbacks"]["RunSummary"]["seconds"] < 600
    saved["callbacks"]["RunSummary"]["seconds"] = 1000.0
    torch.save(saved, tmp_path / "changed")  # what was read is still mapped to its file
    (tmp_path / "changed").replace(newest)
    assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 0
    summaries = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    first, second = sorted(summaries, key=lambda found: found["optimizer_steps"])
    assert first["optimizer_steps"] == 2
    assert second["optimizer_steps"] == 4
    assert first["seconds"] < 600
    assert 1000 < second["seconds"] < 1600


def test_last_is_the_newest_complete_one(tmp_path, tiny, capsys):
    config = str(configure(tmp_path, tiny))
    assert main(["fit", "--config", config, "--ckpt_path", "last"]) == 0
    assert "starting from the beginning" in capsys.readouterr().err
    newest = newest_checkpoint(tmp_path)
    newest.with_name("step=9.ckpt.part").write_bytes(b"half")
    newest.with_name("step=8.ckpt").write_bytes(newest.read_bytes()[:5000])
    more = ["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert main(more) == 0
    assert f"Going on from {newest}" in capsys.readouterr().err
    error = error_of(capsys, *more[:-3], str(newest.with_name("step=8.ckpt")))
    assert "half-written" in error
    assert str(newest_checkpoint(newest.parent)) in error
    run = str(newest.parents[1])
    assert main([*more[:-3], run, "--trainer.max_steps", "4"]) == 0  # the newest one below it


def test_last_is_not_a_checkpoint_of_another_run(tmp_path, tiny, capsys):
    """Runs share a folder unless they are named: going on from another's would teach nothing."""
    config = str(configure(tmp_path, tiny))
    assert main(["fit", "--config", config]) == 0
    last = ["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "3"]
    for key, value in (
        ("model.init_args.estimator.init_args.principle", "Be brief."),
        ("model.init_args.loss", "iqstar.losses.RewardImitationLoss"),
        ("data.init_args.path", str(write_prompts(tmp_path / "other.jsonl"))),
        ("data.init_args.subset", "another"),
        ("data.init_args.val_prompts", "2"),
        ("seed_everything", "1"),
    ):
        error = error_of(capsys, *last, f"--{key}", value)
        named = key.removesuffix(".init_args.principle")
        assert f"is of a run with another {named}; give the path of the one" in error
    assert main([*last, "--model.optimizer.lr", "1.0e-4"]) == 0  # a rate may change


def test_last_without_any_checkpoint_is_an_error_where_nothing_is_trained(tmp_path, tiny, capsys):
    config = str(configure(tmp_path, tiny))
    error = error_of(capsys, "validate", "--config", config, "--ckpt_path", "last")
    assert "no complete checkpoint below" in error


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.ckpt"
    write_file({"x": torch.ones(3)}, path)

    def interrupted(error):
        with whole_or_nothing(path) as part:
            part.write_bytes(b"half")
            raise error

    with pytest.raises(KeyError):
        interrupted(KeyError())
    with pytest.raises(InputError, match="No space left"):
        interrupted(OSError(28, "No space left on device"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    assert is_complete(path)
    assert torch.equal(read_checkpoint(path)["x"], torch.ones(3))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, tiny):
    """The system refuses to write files beyond 100 kB, as a full disk would."""
    config = str(configure(tmp_path, tiny))
    assert main(["fit", "--config", config]) == 0
    before = newest_checkpoint(tmp_path)
    options = ["--ckpt_path", "last", "--trainer.max_steps", "5"]
    run = Forked(without_large_files, "fit", "--config", config, *options, log=tmp_path / "log")
    code, output = run.end()
    assert code == 2, output
    assert "checkpoint: cannot write" in output
    assert "checkpoints saved before are untouched" in output
    assert newest_checkpoint(tmp_path) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000  # not of this process


def without_large_files(*arguments: str) -> int:
    """The command, where writing beyond 100 kB fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return iqstar(*arguments)


def test_a_run_stopped_after_its_last_step_is_finished_by_the_next(tmp_path, tiny):
    """Its last checkpoint is written before the last evaluation; nothing is left to train."""
    config = str(configure(tmp_path, tiny))
    assert main(["fit", "--config", config]) == 0
    for file in (tmp_path / "runs").rglob("summary.json"):
        file.unlink()
    assert main(["fit", "--config", config, "--ckpt_path", "last"]) == 0
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    found = json.loads(summary.read_text())
    assert found["optimizer_steps"] == 2
    assert found["after"]["entropy"] > 0
    assert Path(found["policy"], "model.safetensors").exists()


#: Two batches of an evaluation after every second step.
EVALUATED = {
    "trainer__val_check_interval": 2,
    "trainer__check_val_every_n_epoch": None,
    "data__init_args__val_prompts": 4,
    "data__init_args__eval_batch_size": 2,
    "summary": {"examples": 0},
}


FIVE_STEPS = {**EVALUATED, "trainer__max_steps": 5}


@pytest.fixture(scope="module")
def never_stopped(tiny, tmp_path_factory) -> Path:
    """The folder of a run of five steps."""
    folder = tmp_path_factory.mktemp("never_stopped")
    assert main(["fit", "--config", str(configure(folder, tiny, **FIVE_STEPS))]) == 0
    return folder


def stop(folder: Path, model: Path, settings: dict, when: dict, *more: str) -> None:
    """A run that is told to stop at some moment, and does."""
    told = {"class_path": "dying.Stopped", "init_args": when}
    config = configure(folder, model, **settings, trainer__callbacks=[told])
    log = folder / "log"
    code, output = Forked(iqstar, "fit", "--config", str(config), *more, log=log).end()
    assert code == 143, output


@pytest.mark.parametrize(
    "when",
    [
        {"step": 1},  # told in the step before an evaluation: saved at its end
        {"step": 2, "batch": 0},
        {"step": 2, "batch": 1},  # the last of the evaluation
        {"step": 2},  # no evaluation is due
    ],
    ids=["before it", "in it", "at its end", "elsewhere"],
)
def test_a_stop_around_an_evaluation_loses_none_of_it(tmp_path, tiny, never_stopped, when):
    """The run that goes on has the evaluations of one that was never stopped, each once."""
    stopped, calm = tmp_path, never_stopped
    stop(stopped, tiny, FIVE_STEPS, when)
    config = configure(stopped, tiny, **FIVE_STEPS)
    assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 0
    found, undisturbed = (
        json.loads(next(folder.rglob("summary.json")).read_text())["evaluations"]
        for folder in (stopped, calm)
    )
    assert [e["step"] for e in undisturbed] == [0, 2, 4, 5]
    assert [(e["step"], e["metrics"]) for e in found] == [
        (e["step"], e["metrics"]) for e in undisturbed
    ]
    assert all(torch.equal(weights(calm)[name], value) for name, value in weights(stopped).items())


def test_a_stop_in_an_evaluation_that_is_made_up_keeps_the_rollout(tmp_path, tiny):
    """Both times inside a rollout, of four steps; the second before a step has taken it up."""
    settings = {**EVALUATED, "trainer__max_steps": 6, "model__init_args__micro_batch_size": 1}
    stopped, calm = tmp_path / "stopped", tmp_path / "calm"
    stopped.mkdir()
    calm.mkdir()
    last: list[str] = []
    for when in ({"step": 1}, {"step": 2, "batch": 0}):
        stop(stopped, tiny, settings, when, *last)
        last = ["--ckpt_path", "last"]
    newest = newest_checkpoint(stopped)
    assert newest is not None
    assert read_checkpoint(newest)["iqstar"]["ranks"][0]["rollout"] is not None
    config = configure(stopped, tiny, **settings)
    assert main(["fit", "--config", str(config), *last]) == 0
    assert main(["fit", "--config", str(configure(calm, tiny, **settings))]) == 0
    assert all(torch.equal(weights(calm)[name], value) for name, value in weights(stopped).items())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_first(tmp_path, tiny, name, monkeypatch):
    """In a SLURM job, after its warning, the job is queued again."""
    config = str(configure(tmp_path, tiny, checkpoint={"every_n_train_steps": 10_000}))
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    script.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_ARRAY_JOB_ID": "76",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "fit",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "PATH": f"{script.parent}:{os.environ['PATH']}",
    }
    for variable, value in slurm.items():
        monkeypatch.setenv(variable, value)
    arguments = ["fit", "--config", config, "--trainer.max_steps", "100000"]
    run = Forked(iqstar, *arguments, log=tmp_path / "log")
    wait_for_steps(tmp_path / "runs")
    os.kill(run.process.pid, getattr(signal, name))
    code, output = run.end()
    assert code == 143, output
    assert f"iqstar: stopped by {name} after optimiser step" in output
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert f"step={read_checkpoint(saved)['global_step']}" in saved.name
    asked = tmp_path / "asked"
    assert asked.exists() == (name == "SIGUSR1")
    if asked.exists():
        assert asked.read_text() == "requeue 76_3\n"  # one task, not all of the array


def wait_for_steps(runs: Path, size: int = 4_000) -> None:
    """Until the log of curves has grown by some steps."""
    for _ in range(600):
        if sum(f.stat().st_size for f in runs.rglob("events*")) > size:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not start")


def test_a_rank_that_dies_stops_the_others_with_its_error(tmp_path, tiny):
    settings = {
        "model__init_args__estimator": {"class_path": "dying.Dying"},
        "trainer__devices": 2,
        "trainer__strategy": "ddp",
    }
    config = str(configure(tmp_path, tiny, **settings))
    started = time.monotonic()
    code, output = end(launch("-m", "iqstar.cli", "fit", "--config", config))
    assert code != 0
    assert time.monotonic() - started < 60
    assert "iqstar: error: data.path: rank 1 had enough" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_nodes_of_torchrun(tmp_path, tiny, strategy):
    """Two nodes on the loopback device are two devices: same curves, same weights."""
    nodes, devices = tmp_path / "nodes", tmp_path / "devices"
    for folder in (nodes, devices):
        folder.mkdir()
    common = {"trainer__strategy": strategy}
    config = configure(nodes, tiny, **common, trainer__num_nodes=2)
    port = str(free_port())
    rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    rendezvous += ["--master_port", port]
    run = ["-m", "iqstar.cli", "fit", "--config"]
    both = [
        launch("-m", "torch.distributed.run", *rendezvous, "--node_rank", str(n), *run, str(config))
        for n in (0, 1)
    ]
    for code, output in [end(process) for process in both]:
        assert code == 0, output
    config = configure(devices, tiny, **common, trainer__devices=2)
    code, output = end(launch(*run, str(config)))
    assert code == 0, output
    ours, theirs = weights(nodes), weights(devices)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


# ---- what is saved


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"every_n_train_steps": 3},
        {"train_time_interval": "0:10:00"},
        {"monitor": "val/kl", "mode": "min"},
        {"monitor": "val/kl", "mode": "min", "filename": "best"},
    ],
)
@pytest.mark.parametrize("bound", [{"max_steps": 5}, {"max_steps": -1, "max_epochs": 1}])
def test_the_newest_state_is_always_saved(tmp_path, tiny, checkpoint, bound):
    """And the best stays: 21 prompts are five steps; KL is least after the first."""
    config = configure(tmp_path, tiny, checkpoint=checkpoint)
    more = [part for key, value in bound.items() for part in (f"--trainer.{key}", str(value))]
    if "max_epochs" not in bound:
        more += ["--trainer.val_check_interval", "2"]
    assert main(["fit", "--config", str(config), *more]) == 0
    newest = newest_checkpoint(tmp_path)
    assert read_checkpoint(newest)["global_step"] == 5
    assert (newest.parent / "last.ckpt").resolve() == newest
    files = {f for f in newest.parent.glob("*.ckpt") if not f.is_symlink()}
    steps = sorted(read_checkpoint(file)["global_step"] for file in files)
    best = {"every_n_train_steps": [3], "monitor": [2] if "max_epochs" not in bound else []}
    assert steps == [*best.get(next(iter(checkpoint)), []), 5]


def test_an_export_that_fails_loses_no_step(tmp_path, tiny, monkeypatch, capsys):
    """A run that measures nothing and saves at no step saves at its end, before the export."""

    def full(*arguments, **options):
        raise InputError("export: cannot write the folder (No space left on device)")

    monkeypatch.setattr("iqstar.export_callback.export_policy", full)
    settings = {"trainer__limit_val_batches": 0, "trainer__max_steps": 3}
    config = configure(tmp_path, tiny, checkpoint={}, **settings)
    assert main(["fit", "--config", str(config)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert read_checkpoint(newest_checkpoint(tmp_path))["global_step"] == 3


def test_a_folder_that_cannot_be_replaced_is_as_it_was(tmp_path, monkeypatch):
    folder, own = tmp_path / "policy", Path.rename
    folder.mkdir()
    (folder / "old").touch()

    def rename(path, target):
        if path.name == "policy.part":
            raise OSError("Stale file handle")
        return own(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Stale"), written_beside(folder) as part:
        part.mkdir()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "policy",
        "policy/old",
    ]


@pytest.mark.parametrize("last", [{}, {"save_last": False}])
def test_no_checkpoint_where_none_is_wanted(tmp_path, tiny, last):
    config = configure(tmp_path, tiny, checkpoint={"save_top_k": 0, **last})
    assert main(["fit", "--config", str(config)]) == 0
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("bound", [{"max_steps": 5}, {"max_steps": -1, "max_epochs": 1}])
def test_a_run_that_was_killed_at_its_end_is_finished(tmp_path, tiny, bound):
    """After its last checkpoint, and before its summary and its model were written."""
    config = configure(
        tmp_path, tiny, checkpoint={}, **{f"trainer__{k}": v for k, v in bound.items()}
    )
    assert main(["fit", "--config", str(config)]) == 0
    (written,) = tmp_path.rglob("summary.json")
    shutil.rmtree(written.parent / "policy")
    written.unlink()
    assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 0
    (written,) = tmp_path.rglob("summary.json")
    assert json.loads(written.read_text())["optimizer_steps"] == 5
    assert (written.parent / "policy" / "config.json").is_file()


def test_a_run_of_epochs_that_also_has_a_bound_of_steps_is_measured_at_its_end(tmp_path, tiny):
    config = configure(tmp_path, tiny, trainer__max_steps=1000, trainer__max_epochs=1)
    assert main(["fit", "--config", str(config)]) == 0
    (written,) = tmp_path.rglob("summary.json")
    assert json.loads(written.read_text())["after"] is not None


def requeueing(rank):
    """When the first rank has queued the job again, and when this rank stops."""
    import iqstar.preemption as preemption

    queued = []

    def slowly():
        time.sleep(1.5)
        queued.append(time.time())

    preemption.requeue = slowly
    trainer = SimpleNamespace(
        sanity_checking=True,
        is_global_zero=rank == 0,
        strategy=SimpleNamespace(barrier=torch.distributed.barrier),
    )
    told = preemption.Preemption()
    told._received = [signal.SIGUSR1] if rank == 0 else []
    with pytest.raises(PreemptedError):
        told._stop_if_told(trainer, SimpleNamespace(device=torch.device("cpu")))
    return queued, time.time()


def test_no_process_leaves_before_the_job_is_queued_again(tmp_path):
    """SLURM may end what is left of a job once one process has left."""
    ((queued, _), (_, left)) = two_processes(requeueing, tmp_path)
    assert left >= queued[0]
