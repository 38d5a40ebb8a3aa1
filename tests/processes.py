"""Processes forked off a server that has imported what takes seconds, once for all tests."""

import faulthandler
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

#: What a run imports, late parts too.
PRELOADED = [
    "iqstar.training_cli",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "fitting",
]


def forked(*arguments: str, before: Callable[[], Any] = int) -> tuple[int, str]:
    """Exit code and output of an ``iqstar`` command in a process of its own.

    Args:
        arguments: Of the command.
        before: Called in the process first; a function of a module.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        process = _started(log.name, arguments, before)
        process.join(120)
        process.kill()
        process.join()
        return int(process.exitcode or 0), log.read()


def _started(
    log: str, arguments: tuple[str, ...], before: Callable[[], Any]
) -> multiprocessing.process.BaseProcess:
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(
        target=_command, args=(log, arguments, before, dict(os.environ))
    )
    process.start()
    return process


def _command(
    log: str, arguments: tuple[str, ...], before: Callable[[], Any], environment: dict[str, str]
) -> None:
    from iqstar.cli import main

    torch.set_num_threads(1)  # as in all tests (conftest.py)
    os.environ.clear()  # that of the server is as old as the first test that needed it
    os.environ.update(environment)
    for name in [n for n in os.environ if n.startswith(("MASTER_", "PL_"))]:
        del os.environ[name]
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    before()
    code = main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkedRun(subprocess.Popen):
    """``iqstar fit`` as a comparison starts it, but forked; a Popen for the sake of its type."""

    def __init__(self, line: list[str], stdout: Any, stderr: Any) -> None:
        assert line[:3] == [sys.executable, "-m", "iqstar.cli"]
        self._process = _started(stdout.name, tuple(line[3:]), int)
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def wait(self, timeout: float | None = None) -> int:
        """The exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("iqstar", timeout or 0.0)
        return self._process.exitcode


def fit_in_two(out: Path, *arguments: str) -> None:
    """``iqstar fit`` as the two processes that Lightning would start for it."""
    assert two_processes(_fitted, out, arguments) == [0, 0]


def _fitted(rank: int, arguments: tuple[str, ...]) -> int:
    from iqstar.cli import main

    return main(["fit", *arguments])


def two_processes(work: Callable[..., Any], out: Any, *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returned in two gloo processes, which meet in ``out``."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _one_of_two, (work, str(out), args), nprocs=2, start_method="forkserver"
    )
    return [torch.load(Path(out, f"{rank}.pt"), weights_only=False) for rank in (0, 1)]


def _one_of_two(rank: int, work: Callable[..., Any], out: str, args: tuple[Any, ...]) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)  # as in all tests (conftest.py)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{out}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(work(rank, *args), Path(out, f"{rank}.pt"))
    distributed.barrier()
    distributed.destroy_process_group()
    # Threads of gloo that still hold Python objects can abort the interpreter while it shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
