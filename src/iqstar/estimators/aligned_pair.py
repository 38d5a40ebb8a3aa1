"""An estimator that borrows the credit of another model, which is aligned already."""

from __future__ import annotations

import math

from iqstar.chat import ChatFormat
from iqstar.distributions import LogLinear, TokenDistributions
from iqstar.errors import InputError
from iqstar.estimators.base import KEY, FrozenScorer, OptimalPolicyEstimator
from iqstar.loading import load_frozen
from iqstar.policy import CausalLM, PolicySpec


class AlignedPairEstimator(OptimalPolicyEstimator):
    """log π̂* = log π_ref + (1/τ)·[log π_w − log π_w,ref] − log Z: what aligning w changed in it.

    w may be smaller than the policy (weak to strong), or a DPO model made of the policy's own
    reference. Both models must have the policy's vocabulary, token by token. Its labels are those
    that w was aligned with; this run reads none.

    Args:
        aligned: π_w, what ``model.policy.model`` may be.
        base: π_w,ref, what w was before; null where that is the policy's own reference.
        temperature: τ; below 1 it goes further than w went.
    """

    def __init__(self, aligned: str, base: str | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"{KEY}.temperature: must be a positive number, got {temperature}")
        self.aligned = aligned
        self.base = base
        self.temperature = temperature
        self.aligned_model: CausalLM | None = None
        self.base_model: CausalLM | None = None

    def setup(self, spec: PolicySpec, chat: ChatFormat, precision: str) -> None:
        """See :meth:`OptimalPolicyEstimator.setup`.

        Raises:
            InputError: If a model cannot be loaded, or its vocabulary is not the policy's.
        """
        if self.aligned_model is None:
            self.aligned_model = load_frozen(self.aligned, spec, chat, precision, f"{KEY}.aligned")
        if self.base is not None and self.base_model is None:
            self.base_model = load_frozen(self.base, spec, chat, precision, f"{KEY}.base")

    def own_models(self) -> tuple[str, ...]:
        """See :meth:`OptimalPolicyEstimator.own_models`."""
        return (self.aligned,) if self.base is None else (self.aligned, self.base)

    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """See :meth:`OptimalPolicyEstimator.estimate`."""
        # Of iqstar plan's scorer too, which asks no model: none is loaded then.
        aligned = scorer.unconditioned(self.aligned_model)  # type: ignore[arg-type]
        base = reference
        if self.base is not None:
            base = scorer.unconditioned(self.base_model)  # type: ignore[arg-type]
        return LogLinear(
            [
                (1.0, reference),
                (1 / self.temperature, aligned),
                (-1 / self.temperature, base),
            ]
        )
