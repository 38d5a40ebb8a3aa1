"""Lets the reference, or the model that the estimator asks, follow the policy as it learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from iqstar.errors import InputError
from iqstar.sharding import give_up_gathered, own_part

KEY = "model.refresh.init_args"
Part = Literal["reference", "estimator", "both"]


class Refresh(ABC):
    """When frozen weights are renewed, and how; between two rollouts only.

    Args:
        of: ``reference`` (π_ref moves, the estimator asks the model as it was), ``estimator``
            (the estimator asks the moving model, π_ref stays) or ``both``.
        every: Optimiser steps between renewals, at least; they wait for the next rollout.
    """

    def __init__(self, of: Part = "both", every: int = 1) -> None:
        if every < 1:
            raise InputError(f"{KEY}.every: must be at least 1, got {every}")
        self.of = of
        self.every = every

    def check(self, dtype: str, precision: str) -> None:  # noqa: B027
        """Refuses weights in which renewals are lost.

        Args:
            dtype: ``model.policy.dtype``.
            precision: The trainer's.

        Raises:
            InputError: If they are.
        """

    @abstractmethod
    def renewed(self, old: Tensor, policy: Tensor) -> Tensor:
        """A weight after a renewal.

        Args:
            old: As it is.
            policy: The policy's, of the same shape.
        """

    @torch.no_grad()
    def apply(self, frozen: nn.Module, policy: nn.Module) -> None:
        """Renews all weights of a frozen copy of the policy, in place.

        Both may be sharded alike: each rank renews its own part.
        """
        give_up_gathered(frozen)
        give_up_gathered(policy)
        trained = dict(policy.named_parameters())
        for name, parameter in frozen.named_parameters():
            weight, current = own_part(parameter), own_part(trained[name].detach())
            weight.copy_(self.renewed(weight, current.to(weight.device, weight.dtype)))


class PeriodicRefresh(Refresh):
    """Takes the policy's weights over as they are.

    Args:
        of: See :class:`Refresh`.
        every: See :class:`Refresh`.
    """

    def __init__(self, of: Part = "both", every: int = 20) -> None:
        super().__init__(of, every)

    def renewed(self, old: Tensor, policy: Tensor) -> Tensor:
        """See :meth:`Refresh.renewed`."""
        return policy


class EMARefresh(Refresh):
    """Follows the policy by an exponential moving average: w ← d·w + (1 − d)·θ.

    Args:
        of: See :class:`Refresh`.
        every: See :class:`Refresh`.
        decay: d, in [0, 1); 0 takes the policy's weights over.
    """

    def __init__(self, of: Part = "both", every: int = 1, decay: float = 0.95) -> None:
        super().__init__(of, every)
        if not 0 <= decay < 1:
            raise InputError(f"{KEY}.decay: must be in [0, 1), got {decay}")
        self.decay = decay

    def check(self, dtype: str, precision: str) -> None:
        """Refuses 16 bits: a small part of a small difference rounds to nothing in them."""
        if "16" in dtype:
            key, value, remedy = "model.policy.dtype", dtype, "float32"
        elif precision in ("bf16-true", "16-true"):
            key, value, remedy = "trainer.precision", precision, "bf16-mixed"
        else:
            return
        raise InputError(
            f"{key}: EMARefresh moves weights by small parts, which {value} rounds away; use "
            f"{remedy}, or PeriodicRefresh"
        )

    def renewed(self, old: Tensor, policy: Tensor) -> Tensor:
        """See :meth:`Refresh.renewed`."""
        return torch.lerp(policy, old, self.decay)
