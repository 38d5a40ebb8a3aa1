"""Two gloo processes on this machine, for whatever is distributed."""

import faulthandler
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def two_processes(work: Callable[..., Any], out: Any, *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returned in two processes, which meet in the folder ``out``.

    They are forked off a server that has imported what takes seconds, once for all tests.
    """
    multiprocessing.set_forkserver_preload(["iqstar.training_cli"])
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
