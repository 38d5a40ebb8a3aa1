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
import torch

torch.set_num_threads(1)  # tiny tensors: threads only cost


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As in the processes that tests start: some processors' sums depend on the threads."""
    torch.set_num_threads(1)


# Annotations such as Float[Tensor, "batch time"] are checked at every call (style.md, habit 8).
jaxtyping.install_import_hook("iqstar", "beartype.beartype")

from tiny import tiny_folder  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random chat model, pad = EOS; read only."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """No run-time shape checks: for thousands of steps on tiny tensors, where they cost most."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
