"""Judges: what scores a response, or compares two. A judge measures; it never trains Inverse-Q*."""

from iqstar.judges.base import Judge, asked, scores_of
from iqstar.judges.harm import HarmJudge
from iqstar.judges.pairwise import Comparison, PairwiseJudge, Tally
from iqstar.judges.refusal import RefusalJudge, is_refusal
from iqstar.judges.reward_model import RewardModelJudge
from iqstar.judges.vader import VaderJudge
from iqstar.judges.win_rate import WinRateJudge

__all__ = [
    "Comparison",
    "HarmJudge",
    "Judge",
    "PairwiseJudge",
    "RefusalJudge",
    "RewardModelJudge",
    "Tally",
    "VaderJudge",
    "WinRateJudge",
    "asked",
    "is_refusal",
    "scores_of",
]
