"""What every test runs under: no network, few threads, array shapes checked at run time."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports transformers, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(2)
# Annotations such as Float[Tensor, "batch time"] are checked at every call (style.md, habit 8).
install_import_hook("iqstar", "beartype.beartype")

from tiny import tiny_folder  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random chat model, pad = EOS; read only."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))
