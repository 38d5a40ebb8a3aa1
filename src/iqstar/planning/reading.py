"""From a run's settings to the work and the devices that are planned with."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from iqstar.allocator import has_huge_pages
from iqstar.data import PromptDataModule
from iqstar.data.loader import evaluation_batches
from iqstar.data.turns import heldout_size
from iqstar.errors import InputError
from iqstar.estimators import OptimalPolicyEstimator
from iqstar.evaluation import SCORED_ROWS
from iqstar.module import InverseQStar
from iqstar.planning.footprint import Workload
from iqstar.planning.memory import GIB, Layout
from iqstar.pretrained import load_config
from iqstar.rollouts import DatasetRollout
from iqstar.strategies import NAMES as SHARDED
from iqstar.strategies import ShardedStrategy
from iqstar.vllm_rollout import VLLMRollout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GPU_LIBRARIES = 3 * GIB // 2
"""Assumed: the CUDA context, cuBLAS' and NCCL's buffers, and what the allocator cannot use."""


def workload(
    module: InverseQStar,
    data: PromptDataModule,
    prompt_tokens: int | None,
    accumulate: int,
    evaluates: bool = True,
    devices: int = 1,
) -> Workload:
    """What each device does, with prompts and responses at their longest.

    Args:
        module: The run's module.
        data: Its data module.
        prompt_tokens: Length of the prompts; None for ``data.max_prompt_tokens``.
        accumulate: Micro-batches of an optimiser step.
        evaluates: Whether the run measures anything on held-out prompts.
        devices: That share the held-out prompts.

    Raises:
        InputError: If the length of the prompts is not bounded, or a setting of the data is none.
    """
    data.check_values()
    tokens = prompt_tokens or data.max_prompt_tokens
    if tokens is None:
        raise InputError(
            "data.max_prompt_tokens: null leaves the length of prompts open; give --prompt_tokens N"
        )
    rollout = module.rollout
    elsewhere = isinstance(rollout, DatasetRollout | VLLMRollout)
    rows = data.batch_size * rollout.responses_per_prompt
    at_once = rollout.batch_size or sys.maxsize
    held_out = heldout_size(data.val_prompts)
    prompts = data.eval_batch_size
    if held_out is not None:  # as EvalBatches cuts them
        batches = evaluation_batches(held_out, data.eval_batch_size, devices)
        prompts = -(-held_out // (devices * max(batches, 1)))
    evaluated = prompts * module.eval_samples * evaluates
    micro = min(module.micro_batch_size or rows, rows)
    return Workload(
        prompt_tokens=tokens,
        new_tokens=rollout.max_new_tokens,
        rollout_rows=rows,
        generated_rows=0 if elsewhere else min(rows, at_once),
        micro_rows=micro,
        evaluated_rows=min(evaluated, at_once),
        scored_rows=min(evaluated, SCORED_ROWS),
        step_rows=micro * accumulate,
        passes=module.epochs_per_rollout,
    )


def layout(trainer: Mapping[str, Any], devices: int | None, memory: float | None) -> Layout:
    """The devices of a run.

    Args:
        trainer: Its settings.
        devices: Their number; None for that of the settings.
        memory: Of each, in GiB; None for what is found on this machine.

    Raises:
        InputError: If the devices or the strategy are unknown here.
    """
    gpu = on_gpu(str(trainer["accelerator"]))
    local = _devices(trainer["devices"], gpu) if devices is None else devices
    number = local * int(trainer["num_nodes"]) if devices is None else devices
    strategy = trainer["strategy"]
    return Layout(
        devices=number,
        strategy=_strategy(strategy, number),
        gpu=gpu,
        memory=_memory(gpu, local) if memory is None else round(memory * GIB),
        libraries=GPU_LIBRARIES if gpu else resident(),
        offload_frozen=getattr(strategy, "offload_frozen", False),
        heap_keeps=not has_huge_pages(),
    )


def on_gpu(accelerator: str) -> bool:
    """Whether an accelerator of the settings is a CUDA GPU.

    Raises:
        InputError: If it is neither that nor the CPU.
    """
    if accelerator == "auto":
        return torch.cuda.is_available()
    if accelerator not in ("cpu", "gpu", "cuda"):
        raise InputError(f"trainer.accelerator: iqstar plan knows cpu and gpu, not {accelerator!r}")
    return accelerator != "cpu"


def resident() -> int:
    """Bytes of main memory that this process has taken so far, at most."""
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return taken if sys.platform == "darwin" else taken * 1024


def _devices(value: Any, gpu: bool) -> int:
    text = str(value).strip()
    if text in ("auto", "-1"):
        if gpu and not torch.cuda.is_available():
            raise InputError(f"trainer.devices: {text} counts GPUs, and there is none here; "
                             "give --devices N")  # fmt: skip
        return torch.cuda.device_count() if gpu else 1
    if isinstance(value, list):
        return len(value)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise InputError(f"trainer.devices: {text!r} is no number of devices; give --devices N")
    return number


def _strategy(strategy: Any, devices: int) -> Literal["single", "ddp", "fsdp"]:
    if isinstance(strategy, ShardedStrategy) or strategy in SHARDED:
        return "fsdp"
    if strategy == "auto" and devices == 1:
        return "single"
    name = strategy if isinstance(strategy, str) else type(strategy).__name__.lower()
    if name == "auto" or name.startswith("ddp"):
        return "ddp" if devices > 1 else "single"
    known = ", ".join(("auto", "ddp", *SHARDED))
    raise InputError(f"trainer.strategy: iqstar plan knows {known}; got {strategy}")


def _memory(gpu: bool, processes: int) -> int:
    if not gpu:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min([total, *limits()]) // processes
    if not torch.cuda.is_available():
        raise InputError("--memory: there is no GPU here to ask; give its memory in GiB")
    return int(torch.cuda.get_device_properties(0).total_memory)


def limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes of main memory that this process's control groups leave it (Linux, version 2).

    A container or a job of a cluster may have far less than the machine.

    Args:
        root: Where the groups are mounted.
        own: The file that names this process's group.
    """
    try:
        text = own.read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        if line.startswith("0::"):
            group = root / line[3:].strip("/")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # "max", or no such file
                    found.append(int((folder / "memory.max").read_text(encoding="utf-8")))
    return found


def architectures(
    module: InverseQStar, file: str | None
) -> tuple[PretrainedConfig, dict[str, PretrainedConfig]]:
    """Of the policy, and of the estimator's own models by name.

    Args:
        module: The run's module.
        file: The policy's ``config.json``, or one in its format; None asks for it as the run does.

    Raises:
        InputError: If one cannot be read.
    """
    spec = module.spec
    if file is None:
        policy = load_config(
            spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    else:
        policy = read_architecture(Path(file))
    parts = [m for m in module.estimator.modules() if isinstance(m, OptimalPolicyEstimator)]
    names = [name for part in parts for name in part.own_models()]
    key = "model.estimator"
    configs = {name: load_config(name, key=key) for name in names}
    # A model that two parts name is loaded twice.
    own = {f"estimator's model {n}, {name}": configs[name] for n, name in enumerate(names, 1)}
    return policy, own


def read_architecture(file: Path) -> PretrainedConfig:
    """An architecture from a ``config.json``.

    Raises:
        InputError: If it is none.
    """
    from transformers import AutoConfig

    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        config: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except OSError as error:
        raise InputError(f"--architecture: {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--architecture: {file} is no config.json of a model: {error}; "
            "give the one that stands beside its weights"
        ) from error
    return config
