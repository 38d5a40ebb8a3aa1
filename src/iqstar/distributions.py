"""Next-token distributions at every response token, served chunk by chunk.

An estimator of the optimal policy is an expression over these: π_ref, π_ref told a principle, and
log-linear combinations of them. What is stored is hidden states; logits exist for a chunk at a
time only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iqstar.errors import InputError
from iqstar.head import LanguageHead

NOTHING = 1e-12
"""What rounding leaves of a weight that cancels out."""


class TokenDistributions(ABC):
    """Normalised log-probabilities over the vocabulary at ``len(self)`` response tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of tokens."""

    @abstractmethod
    def logprobs(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """Normalised log-probabilities at the tokens of ``index``, without gradient."""

    @property
    def rows(self) -> int:
        """Tokens to ask for at once (:attr:`iqstar.head.LanguageHead.rows`)."""
        return 128

    def scores(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """Log-probabilities up to a constant for each token, where that is cheaper."""
        return self.logprobs(index)

    def at(self, actions: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """Log-probability of one action at every token."""
        parts = [
            self.logprobs(index).gather(-1, actions[index][:, None])[:, 0]
            for index in torch.arange(len(actions), device=actions.device).split(self.rows)
        ]
        return torch.cat(parts)

    def window(self, start: int, stop: int) -> TokenDistributions:
        """The distributions of tokens ``start`` to ``stop``."""
        return Reindexed(self, torch.arange(start, stop))


class HeadDistributions(TokenDistributions):
    """Those of one model: its hidden states at the tokens, and its head.

    Args:
        hidden: Hidden states that predict the response tokens.
        head: A *prepared* head, shared by all that stem from one model.
    """

    def __init__(self, hidden: Float[Tensor, "tokens dim"], head: LanguageHead) -> None:
        self.hidden = hidden
        self.head = head

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def rows(self) -> int:
        """See :attr:`TokenDistributions.rows`."""
        return self.head.rows

    @torch.no_grad()
    def logprobs(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """See :meth:`TokenDistributions.logprobs`."""
        return self.head.logits(self.hidden[index]).log_softmax(dim=-1)

    @torch.no_grad()
    def scores(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """See :meth:`TokenDistributions.scores`; the logits."""
        return self.head.logits(self.hidden[index])

    def window(self, start: int, stop: int) -> HeadDistributions:
        """See :meth:`TokenDistributions.window`."""
        return HeadDistributions(self.hidden[start:stop], self.head)


class Reindexed(TokenDistributions):
    """Another's distributions in another order: token i gets those of token ``order[i]``."""

    def __init__(self, base: TokenDistributions, order: Int[Tensor, " tokens"]) -> None:
        self.base = base
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def logprobs(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """See :meth:`TokenDistributions.logprobs`."""
        return self.base.logprobs(self.order.to(index.device)[index])

    @property
    def rows(self) -> int:
        """See :attr:`TokenDistributions.rows`."""
        return self.base.rows

    def scores(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """See :meth:`TokenDistributions.scores`."""
        return self.base.scores(self.order.to(index.device)[index])


class LogLinear(TokenDistributions):
    """Normalised product of powers: log π(a|s) = Σ_k w_k log π_k(a|s) − log Z(s).

    Log-probs have the normaliser subtracted, also of sampled tokens alone (method §3). The same
    object is computed once, also where it occurs in nested products.

    Args:
        terms: The weights w_k and the distributions π_k.
    """

    def __init__(self, terms: Sequence[tuple[float, TokenDistributions]]) -> None:
        self.terms = _merged(terms)

    def __len__(self) -> int:
        return len(self.terms[0][1])

    def logprobs(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """See :meth:`TokenDistributions.logprobs`."""
        return self.scores(index).log_softmax(dim=-1)

    def scores(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """See :meth:`TokenDistributions.scores`; without Z."""
        weight, first = self.terms[0]
        total = first.scores(index) * weight
        for weight, term in self.terms[1:]:
            total.add_(term.scores(index), alpha=weight)  # their constants end up in Z
        return total

    @property
    def rows(self) -> int:
        """See :attr:`TokenDistributions.rows`."""
        return min(term.rows for _, term in self.terms)


def _merged(
    terms: Sequence[tuple[float, TokenDistributions]],
) -> tuple[tuple[float, TokenDistributions], ...]:
    """Each distribution once, nested products taken apart; what cancels out is left out."""
    weights: dict[int, float] = {}
    known: dict[int, TokenDistributions] = {}
    for weight, term in terms:
        parts = term.terms if isinstance(term, LogLinear) else ((1.0, term),)
        for inner, part in parts:
            weights[id(part)] = weights.get(id(part), 0.0) + weight * inner
            known[id(part)] = part
    kept = tuple((weights[key], part) for key, part in known.items() if abs(weights[key]) > NOTHING)
    return kept or ((0.0, terms[0][1]),)


class Unknown(TokenDistributions):
    """Where credits were read from a file, which has no distributions.

    Args:
        tokens: Number of response tokens.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens

    def logprobs(self, index: Int[Tensor, " chunk"]) -> Float[Tensor, "chunk vocab"]:
        """Raises.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "model.loss: it asks for distributions over the vocabulary, but model.rollout has the "
            "credits of its responses' own tokens only; use RewardImitationLoss, or DatasetRollout"
        )
