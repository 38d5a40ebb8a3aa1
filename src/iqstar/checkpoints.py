"""Checkpoints on disk: written whole or not at all, in one file or one part per rank, read as one.

A sharded checkpoint is a folder of ``torch.distributed.checkpoint`` with Lightning's ``meta.pt``
for all that is no tensor of the model or optimiser. Both kinds are written under a name that ends
in ``.part`` and renamed when they are complete, so whatever has its final name can be resumed.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from iqstar.atomic import PART, remove, written_beside
from iqstar.errors import InputError

META = "meta.pt"
KEYWORDS = ("last", "hpc")
"""What ``--ckpt_path`` may be besides a path."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place, then renames it; reads sharded ones too."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes one file.

        Raises:
            InputError: If it cannot be written; what was there before is left as it was.
        """
        write_file(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint of either kind; see :func:`read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint of either kind."""
        remove(Path(path))


def write_file(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint into one file.

    Raises:
        InputError: If it cannot be written; what was there before is left as it was.
    """
    with whole_or_nothing(path) as part, part.open("wb") as file:
        torch.save(dict(checkpoint), file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_or_nothing(path: Path, writes: bool = True) -> Iterator[Path]:
    """A name beside ``path`` to write to, which is renamed to ``path`` at the end.

    Args:
        path: The final name, of a file or a folder.
        writes: Whether this process cleans up and renames; only one of several does.

    Raises:
        InputError: If writing or renaming fails; ``path`` is then as it was.
    """
    try:
        with written_beside(path, writes) as part:
            yield part
    except Exception as error:
        if reason := _write_failure(error):
            free = shutil.disk_usage(_existing(path)).free / 2**20
            raise InputError(
                f"checkpoint: cannot write {path} ({reason}; {free:,.0f} MiB free there); "
                "checkpoints saved before are untouched: make room, or write elsewhere with "
                "trainer.logger.init_args.save_dir, then continue with --ckpt_path last"
            ) from error
        raise


def _write_failure(error: BaseException) -> str | None:
    """Why a file could not be written, if that is what went wrong."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if "PytorchStreamWriter" in text or "inline_container" in text:  # torch's archive writer
        return "the disk is full or cannot be written"
    found = re.search(r"OSError: \[Errno \d+\] ([^:\n]+)", text)  # another rank's
    return found[1] if found else None


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether this is the folder of a sharded checkpoint."""
    return path.is_dir() and zipfile.is_zipfile(path / META) and (path / ".metadata").is_file()


def is_complete(path: Path) -> bool:
    """Whether this is a checkpoint that was written to its end."""
    return is_sharded_checkpoint(path) or (path.is_file() and zipfile.is_zipfile(path))


def check_complete(path: Path, key: str = "--ckpt_path") -> None:
    """Checks that a path is a checkpoint that can be read.

    Args:
        path: A file or folder.
        key: What the user gave it with, for messages.

    Raises:
        InputError: If it does not exist, is something else, or was not written to its end.
    """
    if not path.exists():
        raise InputError(
            f"{key}: {path} does not exist; give a .ckpt file or folder of an earlier run, "
            "such as runs/quickstart/version_0/checkpoints/last.ckpt"
        )
    is_folder = path.is_dir() and path.suffix not in (".ckpt", PART)
    if is_folder and not is_complete(path) and newest_checkpoint(path) is None:
        raise InputError(
            f"{key}: {path} has no complete checkpoint below it; give a .ckpt file or folder, or "
            "the folder of a run that saved one"
        )
    if path.name.endswith(PART) or not is_complete(path):
        newest = newest_checkpoint(path if path.is_dir() else path.parent)
        instead = f"; the newest complete one there is {newest}" if newest else ""
        raise InputError(
            f"{key}: {path} is no checkpoint, or a damaged or half-written one{instead}"
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint written last, anywhere below a folder; None if there is none."""
    found = (
        {p.resolve() for p in folder.rglob("*.ckpt") if p.exists()} if folder.is_dir() else set()
    )
    complete = [p for p in found if is_complete(p)]
    return max(complete, key=_written, default=None)


def is_path(checkpoint: str | Path | None) -> TypeGuard[str | Path]:
    """Whether this is neither a keyword nor a name in Lightning's registry."""
    return checkpoint not in (None, *KEYWORDS) and not str(checkpoint).startswith("registry")


def checkpoint_at(path: str | Path) -> Path:
    """The checkpoint that a path names: itself, or the newest complete one below a folder."""
    path = Path(path).expanduser()
    if not path.is_dir() or is_complete(path):
        return path
    return newest_checkpoint(path) or path


def read_checkpoint(path: Path, key: str = "--ckpt_path", optimizer: bool = True) -> dict[str, Any]:
    """Reads a checkpoint, whole, into main memory.

    Args:
        path: A file, or the folder of a sharded checkpoint.
        key: What the user gave it with, for messages.
        optimizer: Whether to read the optimiser's states; of a single file nothing is read before
            it is used.

    Returns:
        What Lightning keeps in one file: ``state_dict``, ``optimizer_states``, ``iqstar``, …

    Raises:
        InputError: If it is none, damaged or incomplete.
    """
    check_complete(path, key)
    try:
        if path.is_dir():
            return _assembled(path, optimizer)
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:
        raise _unreadable(path, key, error) from error


def _unreadable(path: Path, key: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"{key}: {path} cannot be read ({reason}); give another")


def read_meta(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds besides weights and optimiser states."""
    return dict(torch.load(folder / META, map_location="cpu", weights_only=True))


def recipe_of(path: Path) -> str | None:
    """The settings of the run that made a checkpoint, as YAML; None for a run from Python."""
    try:
        whole = read_meta(path) if path.is_dir() else read_checkpoint(path)
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(path, "--ckpt_path", error) from error
    recipe: str | None = whole.get("iqstar", {}).get("recipe")
    return recipe


def weight_names(folder: Path) -> set[str]:
    """Names of the weights in a sharded checkpoint.

    Raises:
        InputError: If they cannot be read.
    """
    from torch.distributed.checkpoint import FileSystemReader

    try:
        names = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling damaged bytes ends in
        raise _unreadable(folder, "--ckpt_path", error) from error
    prefix = "state_dict."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _assembled(folder: Path, optimizer: bool) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    parts: dict[str, Any] = {}
    _load_state_dict(
        parts,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(keys=None if optimizer else {"state_dict"}),
        no_dist=True,
    )
    optimizers = [parts[key] for key in sorted(parts) if key.startswith("optimizer_")]
    return read_meta(folder) | {
        "state_dict": parts["state_dict"],
        "optimizer_states": [numbered(state) for state in optimizers],
    }


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state by number of the weight, as torch's optimisers have it, from names.

    Args:
        state: ``state`` by name, and ``param_groups`` with the names of their ``params``.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    return _renamed(state, {name: number for number, name in enumerate(names)}.__getitem__)


def named(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimiser's state by name of the weight, from numbers.

    Args:
        state: ``state`` and ``params`` by number.
        names: Of the optimiser's weights, group by group.
    """
    return _renamed(state, names.__getitem__)


def _renamed(state: Mapping[str, Any], name: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        "state": {name(key): value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [name(key) for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def _written(path: Path) -> float:
    """When a checkpoint was completed."""
    return (path / META if path.is_dir() else path).stat().st_mtime


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
