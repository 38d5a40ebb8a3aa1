"""A run inside a SLURM job: its processes, and how it is queued again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from iqstar.errors import InputError


def slurm_environment(plugins: Sequence[Any]) -> list[SLURMEnvironment]:
    """Lightning's view of a SLURM job, which :func:`requeue` queues again, not Lightning.

    Args:
        plugins: The user's; with a cluster environment among them, that one counts.

    Raises:
        InputError: If the job does not say how many tasks a node has.
    """
    given = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
    if given or TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    try:
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:  # --ntasks without --ntasks-per-node
        raise InputError(f"the SLURM job: {error}") from error


def check_tasks(trainer: Trainer) -> None:
    """Checks that a SLURM job has a task for each device; else some would stay idle, untold.

    Args:
        trainer: Before it starts.

    Raises:
        InputError: If it has more or fewer.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not isinstance(environment, SLURMEnvironment):
        return
    tasks, devices = environment.world_size(), trainer.num_nodes * trainer.num_devices
    if tasks != devices:
        raise InputError(
            f"trainer.devices: the SLURM job has {tasks} task(s) for {devices} device(s) "
            "(trainer.num_nodes × trainer.devices); start one for each, with srun and "
            f"--ntasks-per-node={trainer.num_devices}, or have Lightning start them on one node, "
            "with trainer.plugins: lightning.fabric.plugins.environments.LightningEnvironment"
        )


def requeue() -> None:
    """Queues this SLURM job again, if this is one; of an array only this task."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        failure = result.stderr.strip() if result.returncode else None
    except OSError as error:
        failure = str(error)
    if failure is None:
        rank_zero_info(f"Queued SLURM job {job} again")
    else:
        rank_zero_warn(f"scontrol requeue {job} failed: {failure}")
