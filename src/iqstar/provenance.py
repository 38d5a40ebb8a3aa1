"""What the settings of a run say of its method, and of the labels that took part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

OURS = "InverseQStar"
"""Also the class where settings name none."""
INVERSE_Q_STAR = (
    "Trained with iqstar, an independent implementation of "
    "[Inverse-Q\\*](https://arxiv.org/abs/2408.14874): the model imitates the credit that the "
    "estimator below gives to each token of a response."
)
NO_LABELS = "No preference label, no reward model and no value model took part."
ALIGNED_PAIR = (
    "The estimator is an aligned model beside its base: labels that this one was trained on took "
    "part, no reward model and no value model did."
)
REPLAY = (
    "The responses are the data set's, not its own: where those are the preferred ones of labelled "
    "pairs, as HH-RLHF's are, these labels took part."
)
BASELINES = {
    "PPO": (
        "Trained with iqstar's PPO: the reward is the score that the judge below gave to the "
        "model's own responses, less a price for leaving the base model; a value head took part."
    ),
    "GRPO": (
        "Trained with iqstar's GRPO: the reward is the score that the judge below gave to the "
        "model's own responses, compared within the responses to one prompt."
    ),
    "DPO": "Trained with iqstar's DPO on pairs of replies, whose preference labels it read.",
}
"""By the name of the class: what a model's card says of it."""


def described_method(model: Mapping[str, Any]) -> tuple[str, str, str]:
    """A run's method: a tag, its name, and what is true of it.

    Nothing is claimed of a class that is not iqstar's.

    Args:
        model: ``class_path`` and ``init_args`` of the run's module.
    """
    kind = class_name(model) or OURS
    if kind in BASELINES:
        return kind.lower(), kind, BASELINES[kind]
    if kind != OURS:
        return "iqstar", kind, f"Trained with iqstar by a method of its user's, `{kind}`."
    return "inverse-q-star", "Inverse-Q\\*", " ".join([INVERSE_Q_STAR, *_labels(model)])


def class_name(part: Mapping[str, Any]) -> str:
    """The class of a part, without its module; empty where none is named."""
    return str(part.get("class_path", "")).rpartition(".")[2]


def _labels(model: Mapping[str, Any]) -> Iterator[str]:
    """Which labels may have taken part in a run of Inverse-Q*, a sentence each."""
    given = model.get("init_args") or {}
    aligned = "AlignedPairEstimator" in _classes(given.get("estimator"))
    replayed = {"DatasetRollout", "ScoredRollout"} & set(_classes(given.get("rollout")))
    if aligned:
        yield ALIGNED_PAIR
    if replayed:
        yield REPLAY
    if not (aligned or replayed):
        yield NO_LABELS


def _classes(part: Any) -> Iterator[str]:
    """The names of all classes in a part's settings."""
    if isinstance(part, Mapping):
        yield class_name(part)
        for value in part.values():
            yield from _classes(value)
    elif isinstance(part, list):
        for value in part:
            yield from _classes(value)
