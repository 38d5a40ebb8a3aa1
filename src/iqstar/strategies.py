"""Fully sharded training (FSDP2) of a policy beside frozen models, on GPUs and on CPUs.

``--trainer.strategy fsdp`` or ``fsdp2``. All of it is ``torch.distributed`` through Lightning; what
is here shards the models, and reads and writes checkpoints of any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from iqstar.atomic import sync_file
from iqstar.checkpoints import (
    META,
    check_complete,
    named,
    numbered,
    read_checkpoint,
    read_meta,
    weight_names,
    whole_or_nothing,
)
from iqstar.errors import InputError
from iqstar.policy import CausalLM
from iqstar.sharding import is_sharded

NAMES = ("fsdp", "fsdp2")
"""What ``trainer.strategy`` may be for :class:`ShardedStrategy` with its defaults."""


class ShardedStrategy(ModelParallelStrategy):
    """Shards the policy, the reference and an estimator's own model over all processes (FSDP2).

    Args:
        offload_frozen: Keep the shards of frozen models in main memory; they are copied to the
            device block by block whenever they score.
        save_distributed_checkpoint: Write checkpoints as a folder with one file for each process;
            otherwise as one file, for which the first process gathers everything. Either kind
            loads on any number of processes, sharded or not.
        process_group_backend: ``nccl`` or ``gloo``; null for the usual one of the device.
        timeout: How long a process waits for the others before it gives up.
    """

    def __init__(
        self,
        offload_frozen: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.offload_frozen = offload_frozen

    def setup_environment(self) -> None:
        """Starts the process group; every process is one place of the data-parallel mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shards the models, before the optimiser takes hold of the policy's weights."""
        assert self.model is not None
        mesh = self.device_mesh["data_parallel"]
        for model in self.model.modules():
            if isinstance(model, CausalLM) and not is_sharded(model):
                frozen = not any(p.requires_grad for p in model.parameters())
                offload = frozen and self.offload_frozen
                model.shard(mesh, self.root_device, str(trainer.precision), offload)
        if mesh.size() == 1:
            rank_zero_info("One device: the strategy fsdp runs, but nothing is sharded")
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Moves what is not sharded; shards are where they belong."""
        assert self.model is not None
        for module in _without_shards(self.model):
            module.to(self.root_device)

    # -- checkpoints -------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's share of the optimiser's state; for a single file, all of it on rank 0."""
        assert self.model is not None
        whole = not self._save_distributed_checkpoint
        state = get_optimizer_state_dict(
            self.model,
            getattr(optimizer, "_optimizer", optimizer),
            options=StateDictOptions(full_state_dict=whole, cpu_offload=True),
        )
        return numbered(state) if whole and state else state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint whole or not at all; see :mod:`iqstar.checkpoints`."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            ParallelStrategy.save_checkpoint(self, checkpoint, path, storage_options)
            return
        with whole_or_nothing(path, writes=self.is_global_zero) as part:
            self.barrier()  # a left-over of an earlier attempt is gone
            super().save_checkpoint(checkpoint, part, storage_options)
            if self.is_global_zero:
                sync_file(part / META)
            self.barrier()
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Puts weights and optimiser states in their places, and returns all else.

        Raises:
            InputError: If it is no checkpoint of this model.
        """
        assert self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        check_complete(path)
        if not path.is_dir():
            checkpoint = read_checkpoint(path)
            self.lightning_module.on_load_checkpoint(checkpoint)  # its checks, before any change
            self._distribute(checkpoint)
            return checkpoint
        self.lightning_module.on_load_checkpoint(read_meta(path))
        if (check := getattr(self.lightning_module, "check_weights", None)) is not None:
            check(weight_names(path))  # loading would pass over what the model lacks
        try:
            return super().load_checkpoint(path, weights_only=True)
        except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--ckpt_path: {path} does not fit the model ({reason}); give one of the same "
                "model.policy"
            ) from error

    def _distribute(self, checkpoint: dict[str, Any]) -> None:
        """Loads whole weights and optimiser states; each process takes its share."""
        assert self.model is not None
        parameters = dict(self.model.named_parameters())
        shares = {
            name: _share(weight, parameters[name])
            for name, weight in checkpoint.pop("state_dict").items()
            if name in parameters
        }
        self.model.load_state_dict(shares, strict=False)
        name_of = {parameter: name for name, parameter in parameters.items()}
        states = checkpoint.pop("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=False):
            names = [name_of[p] for group in optimizer.param_groups for p in group["params"]]
            set_optimizer_state_dict(
                self.model,
                optimizer,
                optim_state_dict=named(state, names),
                options=StateDictOptions(full_state_dict=True),
            )


def _share(weight: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's share of a whole weight, cut as a parameter is."""
    if not isinstance(parameter, DTensor):
        return weight
    whole = weight.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _without_shards(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules within that hold no sharded model."""
    if not any(is_sharded(inner) for inner in module.modules()):
        yield module
    elif not is_sharded(module):
        for child in module.children():
            yield from _without_shards(child)


if "fsdp2" not in StrategyRegistry:  # Lightning's own "fsdp" is FSDP1, on GPUs only: see the CLI
    StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 for all models")
