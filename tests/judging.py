"""Judges for tests, which settings can name by their class paths."""

from __future__ import annotations

from iqstar.judges import Judge


class Vowels(Judge):
    """Share of vowels among a response's characters: something that a tiny model can learn."""

    name, version = "vowels", "1"

    def score(self, prompts, responses):
        return [sum(c in "aeiou" for c in r) / max(len(r), 1) for r in responses]


class Gaps(Vowels):
    """Fails to score every other response."""

    def score(self, prompts, responses):
        scores = super().score(prompts, responses)
        return [float("nan") if i % 2 else s for i, s in enumerate(scores)]


class Broken(Vowels):
    """Stops working."""

    def score(self, prompts, responses):
        raise RuntimeError("out of order")


class Tiring(Vowels):
    """Stops working after its first answer."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, prompts, responses):
        self.asked += 1
        if self.asked > 1:
            raise RuntimeError("out of order")
        return super().score(prompts, responses)
