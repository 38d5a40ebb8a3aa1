"""Optimiser groups and learning-rate schedules, injected by YAML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from iqstar.errors import InputError

OptimizerFactory = Callable[[Iterable], Optimizer]
"""What ``optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2.0e-5, weight_decay: 0.0}}``
becomes. torch's AdamW decays by 0.01 unless it is told otherwise; with ``fused: true`` it reads and
writes every weight once, on CPUs too."""


ADAMW = {"lr": 2e-5, "weight_decay": 0.0, "fused": True}
"""Arguments of the default optimiser."""


def default_optimizer(parameters: Iterable) -> Optimizer:
    """AdamW with lr 2e-5 and no weight decay: the update stays near the reference by itself."""
    return torch.optim.AdamW(parameters, **ADAMW)  # type: ignore[arg-type]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trained weights, in a group that decays and one that does not.

    Vectors (norms and biases) and embeddings are not decayed. How much the others
    decay is the optimiser's ``weight_decay``.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The numbers that an optimiser was given, such as its rate, group by group."""
    return [
        {name: value for name, value in group.items() if _is_number(value)}
        for group in optimizer.param_groups
    ]


def retune(
    optimizer: Optimizer, scheduler: LambdaLR, settings: Sequence[Mapping[str, Any]]
) -> None:
    """Puts given numbers in place of those that a checkpoint brought along.

    Where they are the same, nothing changes, not a bit.

    Args:
        optimizer: As it was loaded, with its state.
        scheduler: Likewise; its rate at the present step is taken anew.
        settings: What :func:`group_settings` gave before the schedule was built.
    """
    for number, (group, given) in enumerate(zip(optimizer.param_groups, settings, strict=True)):
        rate = given["lr"]
        scheduler.base_lrs[number] = rate
        now = rate * scheduler.lr_lambdas[number](scheduler.last_epoch)
        group.update({**given, "initial_lr": rate, "lr": now})


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


class Schedule(ABC):
    """Learning-rate schedule over the optimiser steps of a run."""

    @abstractmethod
    def build(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """The scheduler, stepped once per optimiser step.

        Args:
            optimizer: Whose learning rate is scheduled.
            total_steps: Optimiser steps of the whole run.
        """


class WarmupCosine(Schedule):
    """Linear warm-up, then a half cosine down to a floor.

    Args:
        warmup: Share of the run's steps spent warming up, in [0, 1).
        floor: Share of the learning rate at the end, in [0, 1].
    """

    def __init__(self, warmup: float = 0.1, floor: float = 0.1) -> None:
        if not 0 <= warmup < 1 or not 0 <= floor <= 1:
            raise InputError(
                "model.schedule: warmup must be in [0, 1) and floor in [0, 1], "
                f"got {warmup} and {floor}"
            )
        self.warmup = warmup
        self.floor = floor

    def build(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """See :meth:`Schedule.build`."""
        from transformers import get_cosine_with_min_lr_schedule_with_warmup

        warmup_steps = round(self.warmup * total_steps)
        # The first step would have learning rate 0; start one step into the ramp.
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup_steps + 1, total_steps + 1, min_lr_rate=self.floor
        )
        return _shifted(schedule)


class Constant(Schedule):
    """The learning rate as given."""

    def build(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """See :meth:`Schedule.build`."""
        return LambdaLR(optimizer, _one)


def _one(step: int) -> float:
    return 1.0


def _shift(function: Callable[[int], float]) -> Callable[[int], float]:
    """A schedule's function, one step further on.

    A plain function, since LambdaLR puts what a callable object holds into checkpoints, which
    would then not load with ``weights_only``.
    """
    return lambda step: function(step + 1)


def _shifted(schedule: LambdaLR) -> LambdaLR:
    return LambdaLR(schedule.optimizer, [_shift(f) for f in schedule.lr_lambdas])
