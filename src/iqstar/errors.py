"""The one error type a user sees: what is wrong, where, and what to do about it."""


class InputError(ValueError):
    """Bad input: a file, a flag, a YAML key or a model that cannot be used as given.

    The message names the place (file and line, or YAML key) and ends with the remedy. The CLI
    prints it without a traceback and exits with a non-zero status.
    """


class NonFiniteLossError(InputError):
    """The loss became NaN or infinite; training stopped before the weights were touched."""


class PreemptedError(RuntimeError):
    """A signal asked the run to stop, and it has saved: neither a success nor an error."""
