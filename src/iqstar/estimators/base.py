"""What an estimator of the optimal policy π̂* is, and what it may ask for (method §3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

from iqstar.chat import ChatFormat
from iqstar.distributions import TokenDistributions
from iqstar.errors import InputError
from iqstar.policy import CausalLM, PolicySpec

KEY = "model.estimator.init_args"


@runtime_checkable
class FrozenScorer(Protocol):
    """What an estimator may ask of a rollout; :class:`iqstar.scoring.RolloutScorer` is one."""

    def conditioned(
        self, principle: str | Sequence[str], placement: str, model: CausalLM | None = None
    ) -> TokenDistributions:
        """A frozen model at every response token, told a principle."""
        ...

    def unconditioned(self, model: CausalLM) -> TokenDistributions:
        """Another frozen model at every response token, given the unmodified prompts."""
        ...


class OptimalPolicyEstimator(nn.Module, ABC):
    """Estimates log π̂* at the response tokens of a rollout."""

    mixes_tokens: ClassVar[bool] = False
    """Whether a token's credit depends on the seed or on other rows, so that none can be kept."""

    def mixing(self) -> list[nn.Module]:
        """The parts of it that mix tokens (``mixes_tokens``)."""
        return [part for part in self.modules() if getattr(part, "mixes_tokens", False)]

    @abstractmethod
    def estimate(
        self, scorer: FrozenScorer, reference: TokenDistributions, seed: int
    ) -> TokenDistributions:
        """The estimated optimal policy at every response token.

        Args:
            scorer: Scores the rollout under frozen models.
            reference: π_ref at every response token.
            seed: For estimators that draw at random; another one for each rollout.

        Returns:
            Normalised distributions over the policy's vocabulary.
        """

    def setup(self, spec: PolicySpec, chat: ChatFormat, precision: str) -> None:
        """Loads what the estimator needs beside the reference; called once before training.

        Args:
            spec: How the policy is loaded, and so any model beside it.
            chat: The policy's chat format.
            precision: The trainer's.
        """

    def added_tokens(self, chat: ChatFormat) -> int:
        """Tokens that it adds to a prompt before the model reads it, at most; its parts' too.

        Args:
            chat: The policy's chat format.
        """
        parts = (m for m in self.modules() if m is not self)
        return max(
            (p.added_tokens(chat) for p in parts if isinstance(p, OptimalPolicyEstimator)),
            default=0,
        )

    def own_models(self) -> tuple[str, ...]:
        """Names of the models that it loads beside the reference, those of parts left out."""
        return ()

    def rewrite(self, rewriting: Callable[[str], str]) -> None:
        """Replaces every principle text (used by :class:`PlaceboEstimator`).

        Raises:
            InputError: If the estimator has none.
        """
        raise InputError(f"{KEY}.estimator: {type(self).__name__} has no principle to replace")
