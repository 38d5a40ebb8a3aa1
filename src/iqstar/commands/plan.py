"""``iqstar plan``: what a run will take of its devices, before any weight is loaded.

Example:
    ``iqstar plan --config configs/scale/llama2_7b_hh.yaml --memory 80``
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from iqstar.chatter import less_chatter
from iqstar.errors import InputError
from iqstar.module import InverseQStar
from iqstar.planning.footprint import Footprint
from iqstar.planning.memory import GIB, Layout, Plan, make_plan
from iqstar.planning.reading import architectures, layout, resident, workload
from iqstar.planning.run import trace_run
from iqstar.precision import default_precision
from iqstar.training_cli import (
    CLI_OPTIONS,
    IQStarCLI,
    add_options_of_a_run,
    given_settings,
    readable_errors,
    refuse_checkpoint,
)

HELP = """usage: iqstar plan --config FILE [--KEY VALUE ...] [options]

iqstar plan: what a run will take of its devices; loads no weights and reads no data.

Settings are those of iqstar fit. Further options:

  --memory GIB           of each device; found on this machine otherwise
  --devices N            in place of trainer.devices × trainer.num_nodes
  --prompt_tokens N      length of the prompts; data.max_prompt_tokens otherwise
  --architecture FILE    a config.json to use for the policy where the hub cannot be asked
  --json                 print one JSON object
"""
ALIASES = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}
"""Lightning's other names of precisions."""
OPTIONS = ("memory", "devices", "prompt_tokens", "architecture", "json")


class PlanCLI(IQStarCLI):
    """Reads what ``iqstar fit`` reads, and makes neither a trainer nor a random state."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds this command's own options."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--memory", type=float | None, default=None)
        parser.add_argument("--devices", type=int | None, default=None)
        parser.add_argument("--prompt_tokens", type=int | None, default=None)
        parser.add_argument("--architecture", type=str | None, default=None)
        parser.add_argument("--json", action="store_true")
        add_options_of_a_run(parser)

    def _parse_ckpt_path(self) -> None:
        """There is none."""
        refuse_checkpoint(self.config.get("ckpt_path"), "a plan loads no weights")

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: its settings are enough, the devices need not be those of this machine."""


def main(argv: list[str]) -> int:
    """Plans the run that the arguments describe, and prints the plan.

    Args:
        argv: The arguments after ``iqstar plan``.

    Returns:
        The exit code: 0, also where the run does not fit.

    Raises:
        InputError: If the settings are wrong, or the architecture is not known.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(HELP)
        return 0
    settings = given_settings("plan", argv)
    with readable_errors(settings, OPTIONS), less_chatter():
        cli = PlanCLI(args=argv, run=False, parser_kwargs={"exit_on_error": False}, **CLI_OPTIONS)
        report = plan_run(cli)
    if cli.config.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        print_report(report)
    return 0


def plan_run(cli: PlanCLI) -> dict[str, Any]:
    """The plan of the run that a command line describes, as plain JSON values."""
    options = cli.config
    for name in ("memory", "devices", "prompt_tokens"):
        if options[name] is not None and options[name] <= 0:
            raise InputError(f"--{name}: must be positive, got {options[name]}")
    if not isinstance(cli.model, InverseQStar):
        raise InputError(
            f"model: iqstar plan knows the memory of InverseQStar only, not of "
            f"{type(cli.model).__name__}; plan an InverseQStar config of the same model and rows "
            "(PPO adds a value model, DPO the second response of each pair)"
        )
    trainer = cli.config_init.trainer
    devices = layout(vars(trainer), options.devices, options.memory)
    work = workload(
        cli.model,
        cli.datamodule,
        options.prompt_tokens,
        trainer.accumulate_grad_batches,
        evaluates=trainer.limit_val_batches != 0,
        devices=devices.devices,
    )
    precision, assumed = _precision(trainer, devices)
    policy, own_models = architectures(cli.model, options.architecture)
    device = "cuda" if devices.gpu else "cpu"
    run = trace_run(cli.model, policy, own_models, work, precision, device)
    if not devices.gpu:  # after tracing, which loads about what a run does
        devices = replace(devices, libraries=resident())
    plan = make_plan(run, devices)
    where = "--prompt_tokens" if options.prompt_tokens else "data.max_prompt_tokens"
    return {
        "model": cli.model.spec.model,
        "parameters": run.parameters,
        "trained": run.trained,
        "precision": precision,
        "devices": devices.devices,
        "strategy": devices.strategy,
        "memory_bytes": plan.memory,
        "peak_bytes": plan.peak,
        "fits": plan.fits,
        "phase_bytes": plan.totals,
        "part_bytes": plan.phases,
        "step_flops": {**plan.flops, "all": sum(plan.flops.values())},
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "responses_per_step": work.step_rows * devices.devices,
        "notes": [
            *assumed,
            *notes(run, devices, plan, f"prompts of {work.prompt_tokens} tokens ({where})"),
        ],
    }


def _precision(trainer: Namespace, devices: Layout) -> tuple[str, list[str]]:
    """A run's precision, and what was assumed of a machine that may not be this one."""
    assumed = []
    if str(trainer.accelerator) == "auto" and not devices.gpu:
        assumed.append("assumed: CPUs, as here; plan GPUs with --trainer.accelerator gpu")
    if trainer.precision is None and devices.gpu and not torch.cuda.is_available():
        assumed.append("assumed: bf16-mixed, which runs take on GPUs that have bfloat16")
        return "bf16-mixed", assumed
    precision = str(trainer.precision or default_precision("gpu" if devices.gpu else "cpu"))
    return ALIASES.get(precision, precision), assumed


def notes(run: Footprint, devices: Layout, plan: Plan, prompts: str) -> list[str]:
    """What was assumed, and what a reader should know of the run."""
    found = [f"assumed: {prompts}, all responses of full length"]
    if devices.gpu:
        size = f"{devices.libraries / GIB:.1f} GiB"
        found.append(f"assumed: {size} for CUDA, NCCL and what the allocator cannot use")
    if run.states_assumed:
        found.append("assumed: two moments for each trained weight; this optimiser was not traced")
    if devices.strategy == "fsdp" and not plan.whole_blocks:
        found.append("slow: too little room to gather the policy once for each rollout, so every "
                     "token gathers it anew")  # fmt: skip
    if devices.strategy == "fsdp" and devices.offload_frozen:
        found.append("frozen models are in main memory, which is not counted")
    return found


def print_report(report: dict[str, Any]) -> None:
    """Prints a plan for people."""
    console = Console(highlight=False)
    trained, total = report["trained"], report["parameters"]
    console.print(
        f"{report['model']}: {total:,} weights, {trained:,} trained ({100 * trained / total:.2f}%)"
    )
    console.print(
        f"{report['devices']} × {_gib(report['memory_bytes'])} GiB, {report['strategy']}, "
        f"{report['precision']}, {report['responses_per_step']} responses a step"
    )
    phases = report["part_bytes"]
    table = Table("GiB on each device", *phases, box=None, padding=(0, 1), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for part in dict.fromkeys(name for parts in phases.values() for name in parts):
        sizes = [parts.get(part, 0) for parts in phases.values()]
        if any(sizes):
            table.add_row(part, *(_gib(size) if size else "" for size in sizes))
    totals = report["phase_bytes"]
    table.add_row("[bold]sum[/bold]", *(f"[bold]{_gib(totals[p])}[/bold]" for p in phases))
    console.print(table)
    work = report["step_flops"]
    console.print(
        f"One optimiser step on all devices: {work['all'] / 1e12:,.1f} TFLOP ("
        + ", ".join(
            f"{phase} {flops / 1e12:,.1f}" for phase, flops in work.items() if phase != "all"
        )
        + ")"
    )
    for note in report["notes"]:
        console.print(note)
    peak, memory = report["peak_bytes"], report["memory_bytes"]
    worst = max(totals, key=totals.__getitem__)
    verdict = "fits" if report["fits"] else "does not fit"
    console.print(
        f"[bold]{verdict}[/bold]: {_gib(peak)} of {_gib(memory)} GiB "
        f"({100 * peak / memory:.0f}%), at the {worst}"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
