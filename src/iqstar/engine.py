"""What every source of responses is: the contract between a run and its rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from lightning import Trainer
from torch import nn

from iqstar.chat import ChatFormat
from iqstar.losses import TokenLoss
from iqstar.mdp import Prompt, Rollout, TokenCredits
from iqstar.policy import Policy


class RolloutEngine(ABC):
    """Turns prompts into responses.

    Attributes:
        responses_per_prompt: Responses to each prompt of a batch.
        on_policy: Whether every response is sampled from the policy itself.
        max_new_tokens: Length limit of a response.
        stop_strings: Texts that end a response, where they are not the chat format's.
        batch_size: Responses generated at once; None for all.
    """

    responses_per_prompt: int = 1
    on_policy: bool = False
    credits_known: ClassVar[bool] = False
    """Whether it has the credit of its responses, which was computed before."""
    needs_responses: bool = False
    """Whether it replays responses, so that a prompt without one cannot be trained on."""
    max_new_tokens: int
    stop_strings: list[str] | None = None
    batch_size: int | None = None

    @abstractmethod
    def roll_out(
        self, policy: Policy, prompts: Sequence[Prompt], temperature: float, seed: int
    ) -> Rollout:
        """``responses_per_prompt`` responses to every prompt, those of one prompt side by side.

        Args:
            policy: The policy and its reference.
            prompts: What to respond to.
            temperature: Of sampling; scoring uses the same.
            seed: Fixes what is sampled; the global random state is left as it was.
        """

    def texts(self, chat: ChatFormat, rollout: Rollout) -> list[str]:
        """The responses as everybody is shown them: without the stop string that ended them.

        Args:
            chat: The policy's chat format.
            rollout: The responses.
        """
        return [chat.decode(response, self.stop_strings) for response in rollout.responses]

    def setup(  # noqa: B027  # most engines have nothing to check
        self,
        policy: Policy,
        estimator: nn.Module,
        loss: TokenLoss,
        temperature: float,
        precision: str,
    ) -> None:
        """Checks that the engine serves a run; called once, when its models are loaded.

        Args:
            policy: The policy and its reference.
            estimator: Of the optimal policy.
            loss: That of the run.
            temperature: Of sampling and scoring.
            precision: The trainer's.
        """

    def needs_reference(self, trainer: Trainer) -> bool:
        """Whether anything in what a trainer is about to do asks for π_ref."""
        return True

    def known_credits(self, rollout: Rollout) -> TokenCredits | None:
        """Credit of all response tokens of a rollout, where it was computed before.

        Args:
            rollout: One that this engine made, now or before a run was resumed.

        Returns:
            None where the frozen models have to score it.
        """
        return None
