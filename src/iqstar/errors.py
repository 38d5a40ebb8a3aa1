"""The one error type a user sees: what is wrong, where, and what to do about it."""

import sys

NON_FINITE = 3
"""Exit code of a run whose loss became NaN or infinite."""


class InputError(ValueError):
    """Bad input: a file, a flag, a YAML key or a model that cannot be used as given.

    The message names the place (file and line, or YAML key) and ends with the remedy. The CLI
    prints it without a traceback and exits with a non-zero status.
    """


class NonFiniteLossError(InputError):
    """Loss, gradient or logits became NaN or infinite; training stopped, and changed no weight."""


def missing_packages(what: str, *requirements: str, options: str = "") -> InputError:
    """The error for an optional package that is not installed.

    Args:
        what: Who needs it, perhaps after a YAML key.
        requirements: As pip takes them, such as ``trl==1.16.0``.
        options: Of ``pip install``, such as ``--no-deps``.
    """
    names = " and ".join(requirement.partition("==")[0] for requirement in requirements)
    noun, them = ("package", "it") if len(requirements) == 1 else ("packages", "them")
    command = " ".join(["pip install", *options.split(), *requirements])
    return InputError(f"{what} needs the {noun} {names}; install {them} with: {command}")


def fail(error: InputError) -> int:
    """Tells the user on one line.

    Returns:
        The exit code: 3 where the loss was not finite, 2 otherwise.
    """
    sys.stderr.write(f"iqstar: error: {' '.join(str(error).split())}\n")
    return NON_FINITE if isinstance(error, NonFiniteLossError) else 2


class PreemptedError(RuntimeError):
    """A signal asked the run to stop, and it has saved: neither a success nor an error."""
