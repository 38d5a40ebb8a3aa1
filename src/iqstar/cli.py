"""The ``iqstar`` command: sub-commands, one clear message for bad input, exit codes.

0 success · 1 a bug or an interruption · 2 bad input · 3 training stopped on a non-finite loss.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from iqstar import __version__
from iqstar.errors import InputError, NonFiniteLossError

TRAINING = {
    "fit": "align a model",
    "validate": "measure a model on held-out prompts",
    "test": "the same, under Lightning's name for it",
    "predict": "write responses with the credit of each token, as JSON lines",
}
OTHERS = {
    "audit": "report what a data set holds and what the filters leave of it",
}
USAGE = f"""usage: iqstar COMMAND [options]

Inverse-Q*: aligns a language model with a principle in words, at token level, without labels.

{chr(10).join(f"  {name:<10}{text}" for name, text in {**TRAINING, **OTHERS}.items())}

  iqstar fit --config configs/quickstart.yaml      a first run, about 5 minutes on 2 cores
  iqstar fit --config FILE --print_config          what a run would use
  iqstar fit --help                                every option

iqstar {__version__}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except NonFiniteLossError as error:
        return _fail(error, 3)
    except InputError as error:
        return _fail(error, 2)
    except SystemExit as stop:  # after --help or --print_config
        return int(stop.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("iqstar: interrupted\n")
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"iqstar {__version__}\n")
        return 0
    command, *rest = arguments
    if command.startswith("-"):
        later = next((a for a in rest if a in TRAINING), "fit")
        raise InputError(
            f"{command.split('=')[0]} came before the command; "
            f"write it after: iqstar {later} {command} …"
        )
    if command in OTHERS:
        main_of = import_module(f"iqstar.commands.{command}").main
        return int(main_of(rest))
    if command not in TRAINING:
        import difflib

        near = difflib.get_close_matches(command, [*TRAINING, *OTHERS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join([*TRAINING, *OTHERS])}"
        raise InputError(f"unknown command {command!r}; {hint}")
    _quiet()
    from iqstar.training_cli import run_training

    run_training(command, rest, TRAINING[command])
    return 0


def _fail(error: InputError, code: int) -> int:
    message = " ".join(str(error).split())
    sys.stderr.write(f"iqstar: error: {message}\n")
    return code


def _quiet() -> None:
    """Leaves out what says nothing to a user of this command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("iqstar").setLevel(logging.INFO)
    if not logging.getLogger("iqstar").handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("iqstar").addHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
