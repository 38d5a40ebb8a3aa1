"""Which of Lightning's messages a user of the commands does not need."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

CHATTER = (
    "GPU available: False",
    "TPU available",
    "💡",
    "`Trainer.fit` stopped: `max_steps=",
    "Restoring states from",
)
"""How Lightning's messages begin that tell a user of this command nothing."""


@contextmanager
def less_chatter() -> Iterator[None]:
    """Leaves out Lightning's messages and warnings that say nothing here."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr  # not that of the import, which may be closed
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_is_useful)
    try:
        with warnings.catch_warnings():
            for pattern in (
                ".*does not have many workers.*",
                ".*when logging on epoch level in distributed setting.*",
                ".*srun.*",
                ".*LightningCLI's args parameter.*",
                ".*module\\(s\\) in eval mode at the start of training.*",
                ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
                ".*`is_gradient_checkpointing` is deprecated.*",
                ".*`gradient_checkpointing_enable` is deprecated.*",
                ".*Checkpoint directory .* exists and is not empty.*",
            ):
                warnings.filterwarnings("ignore", pattern)
            yield
    finally:
        logger.removeFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)
