"""``iqstar eval``: a policy against its reference on held-out prompts, as a report.

Example:
    ``iqstar eval --config configs/quickstart.yaml --ckpt_path last``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from errno import EACCES
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.progress import track

from iqstar import __version__
from iqstar.atomic import written_beside
from iqstar.chatter import less_chatter
from iqstar.checkpoints import check_complete, checkpoint_at, newest_checkpoint
from iqstar.commands.options import writable
from iqstar.commands.sides import KEY, PolicySource, load_sides, told_principle
from iqstar.data.categories import categories_by_prompt
from iqstar.errors import InputError
from iqstar.judges import HarmJudge, Judge
from iqstar.one_device import OneDeviceCLI
from iqstar.paired_responses import Pair, Telling, sample_pairs
from iqstar.pretrained import load_config
from iqstar.report.build import build_report
from iqstar.report.kept import keep_pairs, kept_pairs, prompts_sha256, stamp
from iqstar.report.page import page
from iqstar.report.scores import distinct_judges, score_pairs, write_scores
from iqstar.report.terminal import print_report
from iqstar.run_folder import runs_folder
from iqstar.summary import write_json
from iqstar.training_cli import CLI_OPTIONS, given_settings, readable_errors

HELP = """usage: iqstar eval --config FILE [--KEY VALUE ...] [--ckpt_path CKPT] [options]

iqstar eval: responses of policy and reference to held-out prompts, their scores, win/tie/lose, KL,
length, distinct-n and refusals with intervals; on the terminal, as report.json and report.html.

Settings are those of iqstar fit: model.judge scores model.eval_samples responses to each prompt.
One device is used. Further options:

  --ckpt_path CKPT       the policy: a checkpoint of the run, or last; the reference otherwise
  --policy MODEL         the policy: an exported folder or any model of the same vocabulary
  --told                 tell the policy the estimator's principle in every prompt: without a
                         checkpoint, what prompting alone gives
  --judges+=CLASS        a further judge, with --judges.KEY VALUE; or a list in a YAML: judges: […]
  --limit N              the first N held-out prompts only
  --output FOLDER        where to; NAME.eval beside the checkpoint NAME.ckpt, or eval otherwise
  --overwrite            sample anew, whatever the folder holds
  --tie_margin X         differences of scores of at most X are ties; 0 otherwise
  --safe_threshold P     responses with at least this probability are safe; 0.5 otherwise
  --safety_judge NAME    who gives it; the first judge that measures safety otherwise
"""
OPTIONS = (
    "ckpt_path", "policy", "told", "judges", "limit", "output", "overwrite",
    "tie_margin", "safe_threshold", "safety_judge",
)  # fmt: skip
COMPUTING = ("attn_implementation", "gradient_checkpointing", "share_prefixes", "padding_free")
"""Settings of a policy that do not say what it is."""


class EvalCLI(OneDeviceCLI):
    """Reads what ``iqstar fit`` reads, whom to evaluate, and who judges."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds this command's own options."""
        super().add_arguments_to_parser(parser)
        for name in ("policy", "output", "safety_judge"):
            parser.add_argument(f"--{name}", type=str | None, default=None)
        parser.add_argument("--limit", type=int | None, default=None)
        parser.add_argument("--tie_margin", type=float, default=0.0)
        parser.add_argument("--safe_threshold", type=float, default=0.5)
        parser.add_argument("--judges", type=list[Judge] | None, default=None)
        for name in ("told", "overwrite"):
            parser.add_argument(f"--{name}", action="store_true")

    def _parse_ckpt_path(self) -> None:
        """Checks that the checkpoint is one, before anything is built."""
        path = self.config.get("ckpt_path")
        if path not in (None, "last"):
            check_complete(checkpoint_at(path), KEY)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        own = config["logger"]
        own = own[0] if isinstance(own, list) and own else own
        logger = own if isinstance(own, Logger) else None
        self.runs = runs_folder(logger, config.get("default_root_dir") or ".")
        return super()._instantiate_trainer(config, callbacks)

    def source(self) -> PolicySource:
        """Where the policy is from.

        Raises:
            InputError: If that is said twice, or there is no checkpoint that ``last`` could mean.
        """
        checkpoint, model = self.config.ckpt_path, self.config.policy
        if checkpoint and model:
            raise InputError(f"{KEY} and --policy both name the policy; give one of them")
        if model:
            load_config(model, key="--policy")  # before anything large is loaded
        if checkpoint == "last":
            checkpoint = newest_checkpoint(self.runs)
            if checkpoint is None:
                raise InputError(f"{KEY} last: there is no complete checkpoint below {self.runs}")
        # A link such as last.ckpt means another file tomorrow.
        return PolicySource(
            checkpoint=checkpoint_at(checkpoint).resolve() if checkpoint else None, model=model
        )


def main(argv: list[str]) -> int:
    """Evaluates the policy that the arguments describe, writes the report and prints it.

    Args:
        argv: The arguments after ``iqstar eval``.

    Returns:
        The exit code: 0, also where a judge failed; the report says so.

    Raises:
        InputError: If the settings are wrong, no prompt is held out, a model cannot be loaded, or
            the folder cannot be written.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(HELP)
        return 0
    settings = given_settings("eval", argv)
    with readable_errors(settings, OPTIONS, {"judges": Judge}), less_chatter():
        cli = EvalCLI(args=argv, run=False, parser_kwargs={"exit_on_error": False}, **CLI_OPTIONS)
        report, folder = evaluate(cli)
    print_report(report)
    sys.stdout.write(f"\nReport: {folder / 'report.html'}\n")
    return 0


def evaluate(cli: EvalCLI) -> tuple[dict[str, Any], Path]:
    """Samples, scores and reports; the responses are on disk before the first is scored.

    Returns:
        The report, and the folder that it is in.
    """
    options, module, data = cli.config, cli.model, cli.datamodule
    for name, least in (("limit", 1), ("tie_margin", 0)):
        if options[name] is not None and options[name] < least:
            raise InputError(f"--{name}: must be at least {least}, got {options[name]}")
    if not 0 <= options.safe_threshold <= 1:
        raise InputError(
            f"--safe_threshold: must be a probability from 0 to 1, got {options.safe_threshold}"
        )
    source = cli.source()
    telling = told_principle(module) if options.told else None
    own = [module.judge] if module.judge else []
    judges = distinct_judges([*own, *(cli.config_init.judges or [])])
    if options.safety_judge not in (None, *judges):
        raise InputError(
            f"--safety_judge: no judge is called {options.safety_judge!r}; there is "
            f"{', '.join(judges) or 'none, give some with --judges'}"
        )
    hold_out(cli)
    sampling = sampling_settings(cli, source, telling)
    folder = prepared_folder(
        Path(options.output).expanduser() if options.output else default_folder(source, telling)
    )
    pairs = None if options.overwrite else kept_pairs(folder, sampling)
    notes = [] if pairs is None else [f"the responses are those that {folder} held already"]
    if pairs is None:
        pairs = list(sample(cli, source, telling))
        with writable("--output", folder, "another folder"):
            keep_pairs(folder, pairs, sampling)
    if source.kind == "reference":
        told = ", told the principle" if telling else ""
        notes.append(f"no checkpoint was given: the policy is the reference itself{told}")
    if telling:
        notes.append(f"the policy was told, and the reference was not: {telling.principle}")
    if not judges:
        notes.append("no judge is set (model.judge, --judges): responses are not scored")
    scores = [score_pairs(judge, name, pairs) for name, judge in judges.items()]
    report = build_report(
        about(cli, source, sampling),
        pairs,
        scores,
        categories_by_prompt(data, data.heldout_prompts),
        margin=options.tie_margin,
        threshold=options.safe_threshold,
        safety_judge=options.safety_judge,
        notes=[*notes, *known_prompts(judges, pairs)],
    )
    with writable("--output", folder, "another folder"):
        write_scores(folder / "scores.jsonl", pairs, scores)
        write_json(folder / "report.json", report)
        with written_beside(folder / "report.html") as part:
            part.write_text(page(report, pairs, scores), encoding="utf-8")
    return report, folder


def hold_out(cli: EvalCLI) -> None:
    """Reads the data; the data module then holds out what is evaluated on.

    Raises:
        InputError: If that is nothing.
    """
    data = cli.read_data("validate")
    if not data.heldout_prompts:
        raise InputError(
            f"data: no prompt is held out ({data.report}); raise data.val_prompts, or set it to "
            "null to evaluate on all prompts"
        )
    data.heldout_prompts = data.heldout_prompts[: cli.config.limit]


def sampling_settings(
    cli: EvalCLI, source: PolicySource, telling: Telling | None
) -> dict[str, Any]:
    """All that the responses depend on, by the key or option that sets it, as JSON values."""
    module, data = cli.model, cli.datamodule
    spec = {k: v for k, v in asdict(module.spec).items() if k not in COMPUTING}
    checkpoint = str(source.checkpoint) if source.checkpoint else None
    return {
        **{f"model.policy.{key}": value for key, value in spec.items()},
        "files of model.policy.model": stamp(module.spec.model),
        "files of model.policy.chat_template": stamp(module.spec.chat_template),
        KEY: checkpoint,
        f"files of {KEY}": stamp(checkpoint),
        "--policy": source.model,
        "files of --policy": stamp(source.model),
        "--told": asdict(telling) if telling else None,
        "prompts": prompts_sha256(data.heldout_prompts),
        "model.eval_samples": module.eval_samples,
        "model.rollout.max_new_tokens": module.rollout.max_new_tokens,
        "model.rollout.stop_strings": module.rollout.stop_strings,
        "data.eval_batch_size": data.eval_batch_size,
        "seed_everything": module.seed,
        "trainer.precision": str(cli.trainer.precision),
    }


def sample(cli: EvalCLI, source: PolicySource, telling: Telling | None) -> Iterator[Pair]:
    """Loads both sides and samples them; loads nothing before the first pair is asked for."""
    policy = load_sides(cli.trainer, cli.model, source)
    batches = track(
        [batch.prompts for batch in cli.datamodule.val_dataloader()],
        "Sampling",
        console=Console(stderr=True),
        disable=cli.trainer.progress_bar_callback is None,
    )
    with cli.trainer.precision_plugin.forward_context():
        yield from sample_pairs(
            policy,
            batches,
            like=cli.model.rollout,
            samples=cli.model.eval_samples,
            seed=cli.model.seed,
            telling=telling,
        )


def known_prompts(judges: Mapping[str, Judge], pairs: list[Pair]) -> list[str]:
    """Says of judges that they were trained on what they judge."""
    prompts = {pair.number: pair.prompt for pair in pairs}.values()
    found = {
        name: sum(judge.trained_on(prompt) for prompt in prompts)
        for name, judge in judges.items()
        if isinstance(judge, HarmJudge)
    }
    return [
        f"the judge {name} was trained on {known} of the {len(prompts)} prompts, so its scores of "
        "them are too good"
        for name, known in found.items()
        if known
    ]


def about(cli: EvalCLI, source: PolicySource, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of itself."""
    module, data = cli.model, cli.datamodule
    return {
        "iqstar": __version__,
        "policy": {"kind": source.kind, "path": source.path, "told": sampling["--told"]},
        "reference": module.spec.model,
        "data": {
            "class": type(data).__name__,
            **{name: getattr(data, name) for name in ("path", "subset", "seed", "val_prompts")},
        },
        "settings": dict(sampling),
    }


def default_folder(source: PolicySource, telling: Telling | None) -> Path:
    """Beside the checkpoint, under its name; ``eval`` without one; ``….told`` if it is told."""
    folder = source.checkpoint.with_suffix(".eval") if source.checkpoint else Path("eval")
    return folder.with_name(f"{folder.name}.told") if telling else folder


def prepared_folder(folder: Path) -> Path:
    """Makes the folder, before anything is computed.

    Raises:
        InputError: If it is a file, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file; name a folder")
    with writable("--output", folder, "another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES), str(folder))
    return folder
