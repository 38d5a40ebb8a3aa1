"""What the curves show: sums and counts kept apart until the end, so that means are global.

A mean of means would weigh a rank or a batch with few response tokens like one with many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torchmetrics import Metric


def distinct_n(responses: Sequence[str] | Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams, pooled over all responses (Li et al. 2016).

    1 where no n-gram occurs twice, close to 0 where the responses repeat themselves or each
    other. It falls as the number or the length of the responses grows, so only sets of the same
    size and about the same length compare. No n-gram reaches over the end of a response.

    Args:
        responses: Texts, split at white space and lower-cased, or lists of tokens.
        n: Length of the n-grams, at least 1.

    Returns:
        The ratio; NaN where no response has ``n`` tokens.

    Raises:
        ValueError: If ``n`` is less than 1.
    """
    if n < 1:
        raise ValueError(f"distinct_n: n must be at least 1, got {n}")
    grams: Counter[tuple[Hashable, ...]] = Counter()
    for response in responses:
        tokens = response.lower().split() if isinstance(response, str) else list(response)
        grams.update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return len(grams) / total if (total := grams.total()) else float("nan")


class TokenMeans(Metric):
    """Means of named quantities over all their tokens, on all ranks.

    Every quantity is a sum and a count; both are summed over updates and ranks, then divided.
    Sums are held in float64 where the device has it (fp32 sums drift after millions of tokens).

    Args:
        names: The quantities. Others are added by the first update that holds them; then all
            ranks must see the same new names in the same update, because states are synchronised
            in the order in which they were added. Give the names where a rank may get no update.
        kwargs: Those of ``torchmetrics.Metric``.
    """

    full_state_update = True  # forward() must cope with quantities that its own update adds.
    higher_is_better = None
    is_differentiable = False

    def __init__(self, names: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._names: list[str] = []
        self._add(names)

    @property
    def names(self) -> tuple[str, ...]:
        """The quantities so far, in the order in which they are synchronised."""
        return tuple(self._names)

    def update(self, values: Mapping[str, tuple[Shaped[Tensor, ""], Shaped[Tensor, ""]]]) -> None:
        """Adds to the sums and counts.

        Args:
            values: For each quantity its sum over some tokens and the number of these tokens.
        """
        self._add(sorted(set(values) - set(self._names)))
        for name, (total, count) in values.items():
            for prefix, value in (("sum", total), ("count", count)):
                state = getattr(self, _state(prefix, name))
                setattr(self, _state(prefix, name), state + value.detach().to(state))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """The mean of each quantity; NaN where its count is 0."""
        return {
            name: getattr(self, _state("sum", name)) / getattr(self, _state("count", name))
            for name in self._names
        }

    def count(self, name: str) -> Float[Tensor, ""]:
        """This rank's count of a quantity since the last reset."""
        count: Tensor = getattr(self, _state("count", name))
        return count

    def _add(self, names: Sequence[str]) -> None:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        for name in names:
            for prefix in ("sum", "count"):
                zero = torch.zeros((), dtype=dtype, device=self.device)
                self.add_state(_state(prefix, name), zero, dist_reduce_fx="sum")
            self._names.append(name)


def _state(prefix: str, name: str) -> str:
    """Attribute of a state; no attribute of a metric has a colon in it."""
    return f"{prefix}:{name}"
