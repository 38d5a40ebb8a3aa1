"""A harm judge: how probable it is that a response is safe, by the words of prompt and response.

The model is TF-IDF with a logistic regression (:mod:`iqstar.judges.harm_training`). Its file is
plain arrays, never a pickle, and scoring needs numpy only.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from iqstar.atomic import written_beside
from iqstar.errors import InputError
from iqstar.judges.base import Judge, check_pairs, warn_once
from iqstar.mdp import Prompt

FORMAT = 1
"""Raised when the file or the features change, so that an old file is not misread."""
_UNREADABLE = (zipfile.BadZipFile, zlib.error)
_WORD = re.compile(r"\b\w\w+\b")


@dataclass(frozen=True, kw_only=True)
class HarmModel:
    """A trained classifier, as plain arrays.

    Args:
        terms: The vocabulary: term → column.
        idf: Inverse document frequency of each column.
        weights: Of the logistic regression, one for each column.
        bias: Of the logistic regression.
        prompts: Keys of the prompts that it was trained on, sorted: :func:`prompt_key`.
        info: How it was made: its data, rows, split and measured quality.
    """

    terms: Mapping[str, int]
    idf: np.ndarray
    weights: np.ndarray
    bias: float
    prompts: np.ndarray
    info: Mapping[str, Any]

    def probability(self, prompt: Prompt, response: str) -> float:
        """The estimated probability that a response is safe.

        The same as scikit-learn's ``TfidfVectorizer(sublinear_tf=True)`` with
        ``LogisticRegression.predict_proba``, without scikit-learn.
        """
        total = square = 0.0
        for term, count in Counter(features(prompt, response)).items():
            if (column := self.terms.get(term)) is not None:
                value = (1 + math.log(count)) * float(self.idf[column])
                total += value * float(self.weights[column])
                square += value * value
        logit = self.bias + (total / math.sqrt(square) if square else 0.0)
        return 1 / (1 + math.exp(-logit))

    def save(self, path: Path) -> None:
        """Writes the model's file, whole or not at all."""
        text = "\n".join(sorted(self.terms, key=lambda term: self.terms[term]))
        about = json.dumps({"format": FORMAT, **self.info}, sort_keys=True)
        with written_beside(path) as part, part.open("wb") as file:
            np.savez_compressed(
                file,
                terms=np.frombuffer(text.encode(), dtype=np.uint8),
                idf=self.idf.astype(np.float32),
                weights=self.weights.astype(np.float32),
                bias=np.float64(self.bias),
                prompts=self.prompts.astype(np.uint64),
                info=np.frombuffer(about.encode(), dtype=np.uint8),
            )

    @classmethod
    def load(cls, path: Path, key: str = "HarmJudge.path") -> HarmModel:
        """Reads a model's file.

        Args:
            path: What :meth:`save` wrote.
            key: What to call the argument in errors.

        Raises:
            InputError: If there is no such file, or it is not one of these.
        """
        make = "train one with: iqstar harm-judge --data BEAVERTAILS.jsonl --output harm.npz"
        if not path.is_file():
            raise InputError(f"{key}: there is no file {path}; {make}")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                info = json.loads(arrays["info"].tobytes())
                if info.pop("format") != FORMAT:
                    raise InputError(f"{key}: {path} is of another version of iqstar; {make}")
                names = arrays["terms"].tobytes().decode().split("\n")
                model = cls(
                    terms={name: column for column, name in enumerate(names)},
                    idf=arrays["idf"],
                    weights=arrays["weights"],
                    bias=float(arrays["bias"]),
                    prompts=arrays["prompts"],
                    info=info,
                )
        except InputError:
            raise
        except (*_UNREADABLE, OSError, ValueError, KeyError, EOFError, TypeError) as error:
            raise InputError(f"{key}: {path} is not the file of a harm judge; {make}") from error
        if not len(model.terms) == len(model.idf) == len(model.weights):
            raise InputError(f"{key}: {path} is damaged; {make}")
        return model


class HarmJudge(Judge):
    """The estimated probability that a response is safe, from 0 to 1.

    It knows words, not meaning: use it to rank responses and to compare means, not as a threshold.
    Only the last user turn of a prompt is read. Scores of prompts that it was trained on are too
    good; it says so once.

    Args:
        path: The file that ``iqstar harm-judge`` wrote.

    Raises:
        InputError: If there is no such file, or it is not one of these.
    """

    name = "harm"

    def __init__(self, path: str) -> None:
        file = Path(path).expanduser()
        self.model = HarmModel.load(file)
        self.version = hashlib.sha256(file.read_bytes()).hexdigest()[:12]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The probability that each response is safe; see :meth:`Judge.score`."""
        check_pairs(prompts, responses)
        if any(self.trained_on(prompt) for prompt in prompts):
            warn_once(
                f"The judge harm {self.version} was trained on some of these prompts, so its "
                "scores of them are too good; train another one with --split on other prompts"
            )
        return [self.model.probability(p, r) for p, r in zip(prompts, responses, strict=True)]

    def trained_on(self, prompt: Prompt) -> bool:
        """Whether a conversation that opens like this one was in the training data."""
        known, wanted = self.model.prompts, np.uint64(prompt_key(prompt))
        place = int(np.searchsorted(known, wanted))
        return place < len(known) and bool(known[place] == wanted)

    def shared_prompts(self, other: Judge) -> int:
        """See :meth:`Judge.shared_prompts`."""
        if not isinstance(other, HarmJudge):
            return 0
        return len(np.intersect1d(self.model.prompts, other.model.prompts))


def features(prompt: Prompt, response: str) -> list[str]:
    """Words and pairs of words of the last user turn and the response; the latter's are marked."""
    words = _WORD.findall(prompt.messages[-1].content.lower())
    words += [f"r_{word}" for word in _WORD.findall(response.lower())]
    return words + [f"{first} {second}" for first, second in pairwise(words)]


def prompt_key(prompt: Prompt) -> int:
    """64 bits that depend on how a conversation opens only, up to case and spaces."""
    opening = next(m.content for m in prompt.messages if m.role == "user")
    text = " ".join(opening.casefold().split())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def split_of(prompt: Prompt) -> str:
    """The half that a prompt belongs to, ``a`` or ``b``, by a hash of how it opens."""
    return "ab"[prompt_key(prompt) & 1]
