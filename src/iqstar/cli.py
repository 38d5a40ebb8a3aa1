"""The ``iqstar`` command: sub-commands, one clear message for bad input, exit codes.

0 success · 1 a bug or an interruption · 2 bad input · 3 training stopped on a non-finite loss ·
75 a comparison's time is over before it is done · 143 stopped by a signal, after saving.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from iqstar import __version__
from iqstar.allocator import allow_huge_pages
from iqstar.errors import InputError, PreemptedError, fail

TRAINING = {
    "fit": "align a model",
    "validate": "measure a model on held-out prompts",
    "test": "the same, under Lightning's name for it",
    "predict": "write responses with the credit of each token, as JSON lines",
}
OTHERS = {
    "audit": "report what a data set holds and what the filters leave of it",
    "probe": "measure how well an estimator's credit ranks labelled responses, before training",
    "score": "write the credits of a data set's own responses once, for fit to read",
    "eval": "compare a policy with its reference on held-out prompts, as a report",
    "compare": "train methods side by side on one budget, and report their curves",
    "plan": "what a run will take of its devices, without loading weights",
    "export": "write the trained model of a checkpoint in Hugging Face format",
    "harm-judge": "train the harm judge on BeaverTails' labels",
}
USAGE = f"""usage: iqstar COMMAND [options]

Inverse-Q*: aligns a language model with a principle in words, at token level, without labels.

{chr(10).join(f"  {name:<12}{text}" for name, text in {**TRAINING, **OTHERS}.items())}

  iqstar fit --config configs/quickstart.yaml      a first run, about 5 minutes on 2 cores
  iqstar fit --config FILE --print_config          what a run would use
  iqstar fit --help                                every option

iqstar {__version__}
"""
HELP = """usage: iqstar {command} --config FILE [--KEY VALUE ...]

iqstar {command}: {purpose}.

Settings come from YAML files and from the command line; whatever stands later wins, so put --config
first. A file may also hold one part: --model.estimator configs/estimator/placebo.yaml

  --model.help                        the method's settings
  --model.estimator.help CLASS        those of a part (estimator, loss, rollout, schedule, judge)
  --data.help CLASS                   those of a data set (HHRLHF, HHPairs, JSONL, …)
  --print_config                      what a run would use, as YAML

In YAML a part's settings stand below init_args; on the command line that word may be left out:
--model.beta 2, --model.estimator.strength 2, --data.path FILE.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # the user's own judges and losses; last, so that they hide no package
        sys.path.append(os.getcwd())
    try:
        return _run(arguments)
    except InputError as error:
        return fail(error)
    except SystemExit as stop:  # after --help or --print_config
        return int(stop.code or 0)
    except PreemptedError as stop:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 0  # the first process speaks for all; Lightning would kill it for another code
        sys.stderr.write(f"iqstar: {stop}\n")
        return 143
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
        later = next((a for a in rest if a in TRAINING or a in OTHERS), "fit")
        raise InputError(
            f"{command.split('=')[0]} came before the command; "
            f"write it after: iqstar {later} {command} …"
        )
    allow_huge_pages()
    if command in OTHERS:
        with _uncollected():
            main_of = import_module(f"iqstar.commands.{command.replace('-', '_')}").main
        return int(main_of(rest))
    if command not in TRAINING:
        import difflib

        near = difflib.get_close_matches(command, [*TRAINING, *OTHERS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join([*TRAINING, *OTHERS])}"
        raise InputError(f"unknown command {command!r}; {hint}")
    if "-h" in rest or "--help" in rest:  # the options follow, after seconds of importing
        sys.stdout.write(HELP.format(command=command, purpose=TRAINING[command]))
        sys.stdout.flush()
    _prepare_process()
    with _uncollected():
        from iqstar.training_cli import run_training

    run_training(command, rest)
    return 0


@contextmanager
def _uncollected() -> Iterator[None]:
    """Imports without garbage collection, which leaves out what they made ever after.

    Modules stay until the end, and looking through them again and again costs time at the start
    and at the end. Nothing is done in a process that has imported them before.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _prepare_process() -> None:
    """Sends the package's own messages to the terminal, bare."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("iqstar")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]


if __name__ == "__main__":
    sys.exit(main())
