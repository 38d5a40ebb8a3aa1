"""Trains the harm judge's classifier, and measures it on prompts that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iqstar.errors import InputError, missing_packages
from iqstar.judges.harm import HarmModel, features, prompt_key
from iqstar.mdp import Prompt

C = 4.0
"""Inverse strength of the logistic regression's L2 penalty."""
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Example:
    """A response and whether it is safe."""

    prompt: Prompt
    response: str
    safe: bool


def train(examples: Sequence[Example], info: Mapping[str, Any]) -> HarmModel:
    """TF-IDF over words and pairs of words, sublinear, then a logistic regression.

    Args:
        examples: What to learn from, safe and unsafe ones.
        info: What the file shall say of itself.

    Raises:
        InputError: If scikit-learn is missing, or all examples have one label.
    """
    vectorizer, classifier = _fitted(examples)
    return HarmModel(
        terms=vectorizer.vocabulary_,
        idf=vectorizer.idf_,
        weights=classifier.coef_[0],
        bias=float(classifier.intercept_[0]),
        prompts=np.unique(np.array([prompt_key(e.prompt) for e in examples], dtype=np.uint64)),
        info={**info, "sklearn": _sklearn().__version__, "C": C},
    )


def cross_validate(labelled: Sequence[Example], safe: Sequence[Example] = ()) -> list[float]:
    """The area under the ROC curve of each fold's held-out labelled responses.

    Folds are by prompt. No prompt that is held out, nor a conversation that opens like it, is
    trained on; further safe responses are only ever trained on.

    Args:
        labelled: The labelled responses.
        safe: Further safe responses.

    Raises:
        InputError: If scikit-learn is missing, or there are fewer prompts than folds.
    """
    _sklearn()
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold

    groups = [prompt_key(e.prompt) for e in labelled]
    if len(set(groups)) < FOLDS:
        raise InputError(f"--data: at least {FOLDS} different prompts are needed; give more rows")
    areas = []
    for kept, held in GroupKFold(FOLDS).split(groups, groups=groups):
        unseen = {groups[i] for i in held}
        others = [e for e in safe if prompt_key(e.prompt) not in unseen]
        model = train([*(labelled[i] for i in kept), *others], {})
        truth = [labelled[i].safe for i in held]
        if len(set(truth)) < 2:
            raise InputError("--data: a fold holds safe or unsafe responses only; give more rows")
        scores = [model.probability(labelled[i].prompt, labelled[i].response) for i in held]
        areas.append(float(roc_auc_score(truth, scores)))
    return areas


def _fitted(examples: Sequence[Example]) -> tuple[Any, Any]:
    """The vectorizer and the classifier, as scikit-learn has them."""
    _sklearn()
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    labels = [e.safe for e in examples]
    if len(set(labels)) < 2:
        raise InputError("--data: all responses have the same is_safe; both kinds are needed")
    vectorizer = TfidfVectorizer(
        analyzer=lambda e: features(e.prompt, e.response), sublinear_tf=True
    )
    classifier = LogisticRegression(C=C, max_iter=1000)
    classifier.fit(vectorizer.fit_transform(examples), labels)
    return vectorizer, classifier


def _sklearn() -> Any:
    try:
        import sklearn
    except ImportError as error:
        raise missing_packages("training a harm judge", "scikit-learn") from error
    return sklearn
