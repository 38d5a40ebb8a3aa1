"""``iqstar score``: the credits of a data set's own responses, computed once for many epochs.

Example:
    ``iqstar score --config EXPERIMENT.yaml --output credits.parquet``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.progress import track

from iqstar import __version__
from iqstar.assignment import MicroBatch, assign_credit
from iqstar.chatter import less_chatter
from iqstar.credit_file import write_credits
from iqstar.errors import InputError
from iqstar.estimators import OptimalPolicyEstimator
from iqstar.mdp import Prompt
from iqstar.module import InverseQStar
from iqstar.one_device import OneDeviceCLI, frozen_models, inverse_q_star
from iqstar.rollouts import DatasetRollout
from iqstar.scored import origin
from iqstar.training_cli import CLI_OPTIONS, given_settings, readable_errors

HELP = """usage: iqstar score --config FILE [--KEY VALUE ...] --output FILE [--limit N]

iqstar score: the credit of every token of a data set's own responses, computed once. A run then
reads it and needs no frozen model: --model.rollout configs/rollout/scored.yaml

Settings are those of iqstar fit; responses are cut at model.rollout.max_new_tokens. One device is
used. Further options:

  --output FILE          the Parquet file to write; one that is there is replaced
  --limit N              score the first N training prompts only, those of data.limit N
"""
OPTIONS = ("output", "limit")


class ScoreCLI(OneDeviceCLI):
    """Reads what ``iqstar fit`` reads, and where to write."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds this command's own options."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str | None, default=None)
        parser.add_argument("--limit", type=int | None, default=None)


def main(argv: list[str]) -> int:
    """Scores the responses that the arguments describe, and writes their credits.

    Args:
        argv: The arguments after ``iqstar score``.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If the settings are wrong, there is no response, or the file cannot be written.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(HELP)
        return 0
    settings = given_settings("score", argv)
    with readable_errors(settings, OPTIONS), less_chatter():
        cli = ScoreCLI(args=argv, run=False, parser_kwargs={"exit_on_error": False}, **CLI_OPTIONS)
        path, limit = _output(cli.config.output), cli.config.limit
        if limit is not None and limit < 1:
            raise InputError(f"--limit: must be at least 1, got {limit}")
        module = inverse_q_star(cli, "score")
        check_storable(module.estimator)
        if module.refresh is not None:
            raise InputError(
                "model.refresh: credit that follows the policy cannot be written once; set it to "
                "null, or use DatasetRollout with it"
            )
        # What is scored is replayed: the data leaves out what has no response, as in training.
        module.rollout = DatasetRollout(module.rollout.max_new_tokens)
        prompts = cli.read_data("fit").train_prompts[:limit]
        about = {
            "version": __version__,
            "model": module.spec.model,
            "data": getattr(cli.datamodule, "path", None),
            "max_new_tokens": module.rollout.max_new_tokens,
        }
        rows = module.micro_batch_size or cli.datamodule.batch_size
        responses, tokens = score(cli.trainer, module, prompts, rows, path, about)
    sys.stdout.write(
        f"Wrote the credits of {responses:,} responses, {tokens:,} tokens, to {path}\n"
    )
    return 0


def score(
    trainer: Trainer,
    module: InverseQStar,
    prompts: Sequence[Prompt],
    rows: int,
    path: Path,
    about: dict[str, Any],
) -> tuple[int, int]:
    """Scores the responses to prompts, as ``iqstar fit`` would with DatasetRollout.

    Args:
        trainer: Of one device; for its precision and its device.
        module: The run's.
        prompts: With responses.
        rows: Responses that are scored together.
        path: The file to write.
        about: What the file says of itself, beside what its credits depend on.

    Returns:
        Number of responses and of tokens.
    """
    precision, plugin = str(trainer.precision), trainer.precision_plugin
    policy, estimator = frozen_models(trainer, module), module.estimator
    engine = DatasetRollout(module.rollout.max_new_tokens)

    def micro_batches() -> Iterator[MicroBatch]:
        starts = track(
            range(0, len(prompts), rows),
            "Scoring",
            console=Console(stderr=True),
            disable=trainer.progress_bar_callback is None,
        )
        for start in starts:
            rollout = engine.roll_out(policy, prompts[start : start + rows], module.temperature, 0)
            with torch.no_grad(), plugin.forward_context():
                yield from assign_credit(
                    policy,
                    rollout,
                    estimator,
                    (),
                    temperature=module.temperature,
                    micro_batch_size=len(rollout),
                    needs_behaviour=False,
                    seed=0,
                )

    about = {**about, "origin": origin(policy, estimator, module.temperature, precision)}
    try:
        return write_credits(path, micro_batches(), about)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--output: {path} cannot be written ({reason}); choose another"
        ) from error


def check_storable(estimator: OptimalPolicyEstimator) -> None:
    """Checks that a token's credit is the same in every rollout.

    Raises:
        InputError: If the estimator mixes the tokens of a rollout.
    """
    if mixing := estimator.mixing():
        raise InputError(
            f"model.estimator: {type(mixing[0]).__name__} gives a token another credit in every "
            "rollout, so it cannot be written once; use DatasetRollout with it"
        )


def _output(given: str | None) -> Path:
    if given is None:
        raise InputError("--output is missing; name the file to write: --output credits.parquet")
    path = Path(given).expanduser()
    if path.is_dir() or path.suffix != ".parquet":
        raise InputError(f"--output: {given} must be a file that ends in .parquet")
    return path
