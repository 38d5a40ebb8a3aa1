"""What exceptions of the libraries below mean to a user, where they are the user's to mend."""

from __future__ import annotations

import re
import socket

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing import ProcessRaisedException

from iqstar.errors import InputError, NonFiniteLossError

NETWORK = (ConnectionError, TimeoutError, socket.gaierror)
"""Errors of the system that speak of no file."""


def explained(error: Exception) -> InputError | None:
    """The InputError that an exception wraps or amounts to; None for what is ours to mend."""
    if isinstance(error, MisconfigurationException):
        return InputError(f"trainer: {error}")
    if isinstance(error, OSError):
        return _of_a_file(error)
    if isinstance(error, ProcessRaisedException):  # of another process: only its text is here
        found = re.findall(r"^iqstar\.errors\.(\w+): (.+)", str(error), flags=re.MULTILINE)
        kinds = {"InputError": InputError, "NonFiniteLossError": NonFiniteLossError}
        return kinds[found[-1][0]](found[-1][1]) if found and found[-1][0] in kinds else None
    return _by_its_words(str(error)) or _wrapped(error)


def _of_a_file(error: OSError) -> InputError | None:
    if (error.filename is None and error.errno is None) or isinstance(error, NETWORK):
        return None
    return InputError(
        f"{error.filename or 'a file'}: {error.strerror or error}; check that the place exists "
        "and can be written (trainer.logger.init_args.save_dir names the run's folder)"
    )


def _by_its_words(text: str) -> InputError | None:
    if "Error(s) in loading state_dict for" in text:
        first = next((p for p in text.split("\n\t")[1:]), "").strip()
        return InputError(
            f"--ckpt_path: the checkpoint does not fit the model ({first}); give one of the same "
            "model.policy"
        )
    if "Could not determine home directory" in text:
        return InputError("a path begins with ~ and the name of no user; write it out")
    if missing := re.search(r"Requirement '([^']+)' not met", text):  # Lightning's own words
        return InputError(
            f"a class in the settings, such as trainer.logger, needs the package {missing[1]}; "
            f"install it with: pip install '{missing[1]}'"
        )
    if found := re.search(r"`val_check_interval` \((\d+)\) must be less .* \((\d+)\)", text):
        return InputError(
            f"trainer.val_check_interval: an epoch has {found[2]} training batches, fewer than "
            f"{found[1]}; set trainer.check_val_every_n_epoch to null to count on over epochs"
        )
    closed = "closed by peer" in text or "reset by peer" in text
    if closed and torch.distributed.is_initialized():
        return InputError("another process of this run stopped first; its own message says why")
    return None


def _wrapped(error: BaseException) -> InputError | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    return cause
