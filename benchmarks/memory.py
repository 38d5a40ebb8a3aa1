"""Memory of processes on Linux: what is resident now, at the peak, and what cannot be avoided."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor


def resident(pid: int | str = "self") -> tuple[int, int]:
    """Bytes resident now: all (RSS), and with shared pages divided among their users (PSS)."""
    fields = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    return fields["Rss"], fields["Pss"]


def peak(pid: int | str = "self") -> tuple[int, int]:
    """Bytes resident at the peak since the start or :func:`reset_peak`, as RSS and as PSS.

    The kernel keeps the first. What it exceeds the second by are pages of libraries that other
    processes use too: these hardly change, so their share of now is taken for that of the peak.
    """
    rss, pss = resident(pid)
    highest = _fields(Path(f"/proc/{pid}/status"))["VmHWM"]
    return highest, highest - (rss - pss)


def after_imports() -> int:
    """Bytes resident before any model: with what a run imports by and by on either side."""
    import datasets  # noqa: F401
    import peft  # noqa: F401

    return resident()[0]


def reset_peak(pid: int | str = "self") -> None:
    """Makes what is resident now the peak so far."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def server_peak(port: int) -> tuple[int, int]:
    """Peaks, summed, of the process that listens on a port of this machine and its children.

    A sum of peaks is at least the peak of the sum.
    """
    import psutil

    listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    pid = next(c.pid for c in listening if c.laddr.port == port)
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    rss, pss = zip(*(peak(member) for member in family), strict=True)
    return sum(rss), sum(pss)


def floor(
    imports: int,
    trained: Iterable[Tensor],
    frozen: Iterable[Tensor],
    optimizer: Iterable[Tensor],
) -> dict[str, int]:
    """Bytes that a step cannot do without, part by part.

    Args:
        imports: Resident after the imports, before any model.
        trained: The policy's tensors; those that require a gradient have one of their size.
        frozen: Tensors of further models; what is shared with the policy counts once.
        optimizer: The optimiser's state.
    """
    trained = list(trained)
    policy = _storages(trained)
    others = {k: v for k, v in _storages(frozen).items() if k not in policy}
    gradients = _storages(t for t in trained if t.requires_grad)
    parts = {
        "imports": imports,
        "policy": sum(policy.values()),
        "frozen": sum(others.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(_storages(optimizer).values()),
    }
    return parts | {"floor": sum(parts.values())}


def report(parts: dict[str, int], server: int = 0) -> dict[str, Any]:
    """The peak of this process, its floor part by part, and what lies between, in MiB.

    Args:
        parts: Those of :func:`floor`.
        server: PSS of a rollout server's processes, which counts as above the floor.
    """
    rss, pss = peak()
    figures = {"peak_rss": rss, "peak_pss": pss + server, "server_pss": server, **parts}
    figures["above_floor"] = rss - parts["floor"] + server
    return {name: round(value / 2**20, 1) for name, value in figures.items()}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage."""
    found = (t.untyped_storage() for t in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _fields(path: Path) -> dict[str, int]:
    """Fields of the kernel's tables that are given in kB, in bytes."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}
