"""Prompts: Lightning data modules that read them and split them without looking at labels."""

from iqstar.data.base import PromptDataModule
from iqstar.data.beavertails import BeaverTails
from iqstar.data.hh_rlhf import HHRLHF
from iqstar.data.jsonl import JSONL
from iqstar.data.loader import EvalBatches, RepeatedBatches
from iqstar.data.pairs import BeaverTailsPairs, HHPairs, JSONLPairs, SafeRLHFPairs
from iqstar.data.report import DataReport
from iqstar.data.sample import Sample

__all__ = [
    "HHRLHF",
    "JSONL",
    "BeaverTails",
    "BeaverTailsPairs",
    "DataReport",
    "EvalBatches",
    "HHPairs",
    "JSONLPairs",
    "PromptDataModule",
    "RepeatedBatches",
    "SafeRLHFPairs",
    "Sample",
]
