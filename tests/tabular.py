"""A token MDP small enough to be solved exactly, served through the product's own interfaces.

States are the prefixes of responses over a vocabulary of 4 (token 0 ends the response) up to
length 3: 1 + 3 + 9 + 27 = 40 states; the horizon is part of the state. Rewards and the reference
policy are random. Solved backwards by the soft Bellman equations, method (2)–(3), in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from iqstar.distributions import TokenDistributions
from iqstar.head import LanguageHead, head_loss
from iqstar.losses import TokenLoss
from iqstar.mdp import TokenCredits

VOCAB, DEPTH, EOS = 4, 4, 0


class Table(TokenDistributions):
    """Log-probabilities per state; ``states`` names the state of every token."""

    def __init__(self, logprobs: Tensor, states: Tensor) -> None:
        self.table, self.states = logprobs, states

    def __len__(self) -> int:
        return len(self.states)

    def logprobs(self, index: Tensor) -> Tensor:
        return self.table[self.states[index]]


@dataclass
class TokenMDP:
    """A solved MDP; tables are (states, vocab) unless noted."""

    beta: float
    reward: Tensor  # (states, vocab)
    reference: Tensor  # (states, vocab) log-probs
    following: Tensor  # (states, vocab) next state, −1 = terminal
    q: Tensor
    v: Tensor
    optimal: Tensor  # (states, vocab) log-probs

    @property
    def states(self) -> int:
        return len(self.v)


def solve(beta: float = 0.7, seed: int = 0) -> TokenMDP:
    gen = torch.Generator().manual_seed(seed)
    prefixes = [()]
    for prefix in prefixes:
        if len(prefix) < DEPTH - 1:
            prefixes += [(*prefix, a) for a in range(1, VOCAB)]
    number = {p: i for i, p in enumerate(prefixes)}
    following = torch.tensor(
        [[number.get((*p, a), -1) if a != EOS else -1 for a in range(VOCAB)] for p in prefixes]
    )
    states = len(prefixes)
    reward = torch.randn(states, VOCAB, generator=gen, dtype=torch.float64)
    reference = torch.randn(states, VOCAB, generator=gen, dtype=torch.float64).log_softmax(-1)
    q, v = torch.zeros(states, VOCAB).double(), torch.zeros(states).double()
    for s in reversed(range(states)):  # children have larger numbers than their parents
        ahead = torch.where(following[s] >= 0, v[following[s].clamp(min=0)], 0.0)
        q[s] = reward[s] + ahead
        v[s] = beta * torch.logsumexp(reference[s] + q[s] / beta, dim=-1)
    optimal = reference + (q - v[:, None]) / beta
    return TokenMDP(beta, reward, reference, following, q, v, optimal)


def trajectories(mdp: TokenMDP, table: Tensor, number: int, gen: torch.Generator):
    """States and actions visited by ``number`` responses sampled from softmax(table)."""
    state = torch.zeros(number, dtype=torch.long)
    states, actions = [], []
    for _ in range(DEPTH):
        action = torch.multinomial(table[state].softmax(-1), 1, generator=gen)[:, 0]
        states.append(state)
        actions.append(action)
        following = mdp.following[state, action]
        state = following[following >= 0]
        if len(state) == 0:
            break
    return torch.cat(states), torch.cat(actions)


def responses(mdp: TokenMDP, table: Tensor, number: int, gen: torch.Generator):
    """States, actions and mask, each (number, DEPTH), of responses sampled from softmax(table)."""
    state = torch.zeros(number, dtype=torch.long)
    columns = []
    for _ in range(DEPTH):
        running = state >= 0
        here = state.clamp(min=0)
        action = torch.multinomial(table[here].softmax(-1), 1, generator=gen)[:, 0]
        columns.append((here, action, running))
        state = torch.where(running, mdp.following[here, action], -1)
    return (torch.stack(column, dim=1) for column in zip(*columns, strict=True))


def occupancy(mdp: TokenMDP, logprobs: Tensor) -> Tensor:
    """Probability that a response visits each state."""
    mass = torch.zeros(mdp.states).double()
    mass[0] = 1.0
    for s in range(mdp.states):
        for a in range(VOCAB):
            if mdp.following[s, a] >= 0:
                mass[mdp.following[s, a]] += mass[s] * logprobs[s, a].exp()
    return mass


def loss_sum(
    loss: TokenLoss, mdp: TokenMDP, table: Tensor, states: Tensor, actions: Tensor, weight: Tensor
) -> Tensor:
    """Σ weight · loss over (state, action) pairs, through the chunked LM head of the product.

    Hidden states are one-hot and the head's weight is the transposed table, so the head's
    gradient is the table's.
    """
    behaviour = table.detach().log_softmax(-1)[states, actions]
    tokens = TokenCredits(
        actions=actions,
        reference=mdp.reference[states, actions],
        credit=(mdp.optimal - mdp.reference)[states, actions],
        weight=weight,
        behaviour=behaviour,
    )
    target = Table(mdp.optimal, states)

    def per_token(logits: Tensor, index: Tensor, wanted: Tensor | None):
        losses, metrics = loss.per_token(logits, tokens[index], wanted)
        return losses * tokens.weight[index], metrics

    hidden = torch.eye(mdp.states, dtype=torch.float64)[states]
    head = LanguageHead(weight=table.T, vocab_size=VOCAB)
    distributions = target.logprobs if loss.needs_distribution else None
    return head_loss(hidden, head, per_token, distributions)[0]
