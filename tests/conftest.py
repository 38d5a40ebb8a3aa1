"""What every test runs under: no network, few threads, array shapes checked at run time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports transformers, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import pytest

# Annotations such as Float[Tensor, "batch time"] are checked at every call (style.md, habit 8).
# Modules without any are left to mypy: checked too, they take a third of all tests' time.
SOURCE = Path(__file__).parents[1] / "src"
SHAPED = [file for file in SOURCE.rglob("*.py") if "from jaxtyping" in file.read_text("utf-8")]
jaxtyping.install_import_hook(
    [".".join(file.relative_to(SOURCE).with_suffix("").parts) for file in SHAPED],
    "beartype.beartype",
)

# What needs PyTorch is imported late: xdist's own process, which runs no test, does without.


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors: threads only cost, and some processors' sums depend on their number."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random chat model, pad = EOS; read only."""
    from tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """No run-time shape checks: for thousands of steps on tiny tensors, where they cost most."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
