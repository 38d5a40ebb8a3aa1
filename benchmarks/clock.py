"""Where the seconds of a training step go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any


class Clock:
    """Adds up the seconds of each phase of a step.

    A step lasts from the end of the step before to its own end, so that nothing between steps is
    lost; what belongs to no phase is ``other``.

    Attributes:
        steps: Seconds of every finished step: of each phase, and the ``total``.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._phases: Counter[str] = Counter()
        self._mark = self._end = time.perf_counter()

    def mark(self) -> None:
        """A phase begins."""
        self._mark = time.perf_counter()

    def add(self, phase: str) -> None:
        """What was done since the last mark belongs to a phase; the next phase begins."""
        self._phases[phase] += time.perf_counter() - self._mark
        self.mark()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, all of whose seconds belong to a phase."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.mark()
            result = function(*arguments, **options)
            self.add(phase)
            return result

        return call

    def end_step(self) -> None:
        """A step is over."""
        now = time.perf_counter()
        phases = dict(self._phases)
        total = now - self._end
        phases["other"] = total - sum(phases.values())
        self.steps.append(phases | {"total": total})
        self._phases.clear()
        self._mark = self._end = now
