"""Methods that Inverse-Q* is compared with, on its policy, data, rollouts, metrics and command."""

from iqstar.baselines.dpo import DPO
from iqstar.baselines.grpo import GRPO
from iqstar.baselines.kl_penalty import AdaptiveKL, FixedKL, KLPenalty
from iqstar.baselines.ppo import PPO

__all__ = ["DPO", "GRPO", "PPO", "AdaptiveKL", "FixedKL", "KLPenalty"]
