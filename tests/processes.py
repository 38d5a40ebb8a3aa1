"""Processes forked off a server that has imported what takes seconds, once for all tests."""

import faulthandler
import multiprocessing
import os
import subprocess
import sys
import traceback
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


class Forked:
    """A function in a process of its own, under this one's environment.

    Args:
        work: The function, of a module; the process exits with what it returns.
        arguments: Of the function.
        log: File that its output is added to.

    Attributes:
        process: The process.
    """

    def __init__(self, work: Callable[..., int], *arguments: Any, log: Path) -> None:
        multiprocessing.set_forkserver_preload(PRELOADED)
        self.log = log
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_work, args=(work, arguments, str(log), dict(os.environ), os.getcwd())
        )
        self.process.start()

    def end(self, timeout: float = 120) -> tuple[int, str]:
        """Exit code and output."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return int(self.process.exitcode or 0), self.log.read_text(encoding="utf-8")


def _work(
    work: Callable[..., int],
    arguments: tuple[Any, ...],
    log: str,
    environment: dict[str, str],
    folder: str,
) -> None:
    torch.set_num_threads(1)  # as in all tests (conftest.py)
    os.chdir(folder)
    os.environ.clear()  # that of the server is as old as the first test that needed it
    os.environ.update(environment)
    for name in [n for n in os.environ if n.startswith(("MASTER_", "PL_"))]:
        del os.environ[name]
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        code = work(*arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def iqstar(*arguments: str) -> int:
    """The command, for :class:`Forked`."""
    from iqstar.cli import main

    return main(list(arguments))


class ForkedRun(subprocess.Popen):
    """``iqstar fit`` as a comparison starts it, but forked; a Popen for the sake of its type."""

    def __init__(self, line: list[str], stdout: Any, stderr: Any, env: Any) -> None:
        assert line[:3] == [sys.executable, "-m", "iqstar.cli"]
        self._process = Forked(iqstar, *line[3:], log=Path(stdout.name)).process
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
