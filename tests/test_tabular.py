"""Identities 1 and 2 of method §7, on an exactly solved token MDP (tests/tabular.py)."""

import pytest
import torch

from iqstar.baselines.advantages import (
    clipped_value_loss,
    generalized_advantages,
    penalised_rewards,
)
from iqstar.distributions import LogLinear
from iqstar.logprobs import kl_divergence
from iqstar.losses import (
    AssignedAdvantage,
    ConstantAdvantage,
    CreditAdvantage,
    DistributionImitationLoss,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    RewardImitationLoss,
    TokenPolicyGradientLoss,
)
from iqstar.mdp import TokenCredits
from tabular import VOCAB, Table, loss_sum, occupancy, responses, solve, trajectories

LOSSES = {
    "reward": RewardImitationLoss(),
    "reverse": DistributionImitationLoss(ReverseKL()),
    "forward": DistributionImitationLoss(ForwardKL()),
    "jsd": DistributionImitationLoss(GeneralizedJSD(0.5)),
    "gradient": TokenPolicyGradientLoss(),
    "baseline": TokenPolicyGradientLoss(advantage=CreditAdvantage(state_baseline=True)),
}
# Millions of small calls, whose shapes the other tests check.
pytestmark = pytest.mark.usefixtures("unchecked_shapes")
losses = pytest.mark.parametrize("name", list(LOSSES))


@pytest.fixture(scope="module")
def mdp():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of 160 numbers: threads only cost
    yield solve()
    torch.set_num_threads(threads)


def every_pair(mdp):
    states = torch.arange(mdp.states).repeat_interleave(VOCAB)
    return states, torch.arange(VOCAB).repeat(mdp.states)


def test_credit_is_the_advantage_of_the_solved_mdp(mdp):
    """(3)–(4): β log π*/π_ref = Q* − V*, and π* is a distribution."""
    assert mdp.states <= 200
    assert mdp.optimal.exp().sum(-1) == pytest.approx(1, abs=1e-10)
    credit = mdp.beta * (mdp.optimal - mdp.reference)
    torch.testing.assert_close(credit, mdp.q - mdp.v[:, None], atol=1e-10, rtol=0)


def test_credit_telescopes(mdp):
    """(5): summed over a response, credit is its return minus the value of the prompt."""
    states, actions = trajectories(mdp, mdp.reference, 1, torch.Generator().manual_seed(3))
    credit = mdp.beta * (mdp.optimal - mdp.reference)[states, actions].sum()
    expected = mdp.reward[states, actions].sum() - mdp.v[0]
    torch.testing.assert_close(credit, expected, atol=1e-10, rtol=0)


def test_a_cut_response_keeps_its_value(mdp):
    """(5) for a truncated response: V* of the state where it was cut remains."""
    action = 1
    after = mdp.following[0, action]
    credit = mdp.beta * (mdp.optimal - mdp.reference)[0, action]
    expected = mdp.reward[0, action] + mdp.v[after] - mdp.v[0]
    torch.testing.assert_close(credit, expected, atol=1e-10, rtol=0)


def test_credit_is_normalised_at_every_state(mdp):
    """(6): E_π*[exp(−A*/β)] = 1 and Σ π_ref exp(A*/β) = 1."""
    scaled = mdp.optimal - mdp.reference
    assert (mdp.optimal - scaled).exp().sum(-1) == pytest.approx(1, abs=1e-10)
    assert (mdp.reference + scaled).exp().sum(-1) == pytest.approx(1, abs=1e-10)


def test_log_linear_estimates_are_normalised(mdp):
    """π_ref · (π*/π_ref)^γ: its credit satisfies (6) too, because the normaliser is subtracted."""
    states = torch.arange(mdp.states)
    reference, optimal = Table(mdp.reference, states), Table(mdp.optimal, states)
    estimate = LogLinear([(1.0, reference), (2.0, optimal), (-2.0, reference)])
    assert estimate.logprobs(states).exp().sum(-1) == pytest.approx(1, abs=1e-10)
    sampled = estimate.at(torch.full((mdp.states,), 2))
    torch.testing.assert_close(sampled, estimate.logprobs(states)[:, 2])


@losses
def test_optimal_policy_is_a_fixed_point(mdp, name):
    table = mdp.optimal.clone().requires_grad_()
    states, actions = every_pair(mdp)
    loss = loss_sum(LOSSES[name], mdp, table, states, actions, torch.ones(len(states)).double())
    (grad,) = torch.autograd.grad(loss, table)
    assert abs(loss.item()) < 1e-10
    assert grad.abs().max() < 1e-10


def distance(mdp, table):
    """Total variation to π* at every state."""
    return 0.5 * (table.detach().softmax(-1) - mdp.optimal.exp()).abs().sum(-1)


def train(mdp, step, steps=300, lr=0.2):
    table = mdp.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        step(table).backward()
        optimizer.step()
        schedule.step()
    return table


@losses
def test_exact_enumeration_reaches_the_optimal_policy(mdp, name):
    """Every state, every action weighted by π_θ: max TV to π* below 1e-2 in 300 steps."""
    states, actions = every_pair(mdp)

    def step(table):
        weight = table.detach().softmax(-1)[states, actions]
        return loss_sum(LOSSES[name], mdp, table, states, actions, weight) / mdp.states

    assert distance(mdp, mdp.reference).max() > 0.3
    assert distance(mdp, train(mdp, step)).max() < 1e-2


@losses
def test_sampled_trajectories_reach_the_optimal_policy(mdp, name):
    """64 fresh responses a step: TV weighted by π*'s occupancy below 1e-2 in 300 steps."""
    gen = torch.Generator().manual_seed(0)

    def step(table):
        states, actions = trajectories(mdp, table.detach(), 64, gen)
        weight = torch.ones(len(states)).double()
        return loss_sum(LOSSES[name], mdp, table, states, actions, weight) / len(states)

    weight = occupancy(mdp, mdp.optimal)
    table = train(mdp, step)
    assert (weight * distance(mdp, table)).sum() / weight.sum() < 1e-2


def test_ppo_solves_it(mdp):
    """PPO's own parts, with the MDP's rewards at every token: TV by π*'s occupancy below 1e-2.

    Two passes over each of 1,000 rollouts of 64 responses. β is the price of the KL in (1).
    """
    gen = torch.Generator().manual_seed(0)
    table = mdp.reference.clone().requires_grad_()
    values = torch.zeros(mdp.states, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([table, values], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    loss = TokenPolicyGradientLoss(0.2, AssignedAdvantage())
    none = torch.zeros(64, dtype=torch.float64)
    for _ in range(1000):
        states, actions, mask = responses(mdp, table.detach(), 64, gen)
        behaviour = table.detach().log_softmax(-1)[states, actions]
        ratio = torch.where(mask, behaviour - mdp.reference[states, actions], 0.0)
        before = torch.where(mask, values.detach()[states], 0.0)
        rewards = penalised_rewards(none, ratio, mask, mdp.beta)
        rewards = rewards + torch.where(mask, mdp.reward[states, actions], 0.0)
        advantages = generalized_advantages(rewards, before, 1.0, 0.95)
        where = states[mask]
        tokens = TokenCredits(
            actions=actions[mask],
            reference=mdp.reference[where, actions[mask]],
            credit=advantages[mask],
            weight=torch.ones(len(where)).double(),
            behaviour=behaviour[mask],
        )
        returns = (advantages + before)[mask]
        for _ in range(2):
            optimizer.zero_grad()
            policy, _ = loss.per_token(table[where], tokens, None)
            value = clipped_value_loss(values[where], before[mask], returns, 0.5)
            (policy.mean() + 0.5 * value.mean()).backward()
            optimizer.step()
            schedule.step()
    weight = occupancy(mdp, mdp.optimal)
    assert (weight * distance(mdp, table)).sum() / weight.sum() < 1e-2
    visited = weight > 0.05
    torch.testing.assert_close(values.detach()[visited], mdp.v[visited], atol=0.05, rtol=0)


def test_constant_advantage_does_not_reach_it(mdp):
    """The control carries no credit, so it has another fixed point."""
    states, actions = every_pair(mdp)
    loss = TokenPolicyGradientLoss(advantage=ConstantAdvantage(1.0))

    def step(table):
        weight = table.detach().softmax(-1)[states, actions]
        return loss_sum(loss, mdp, table, states, actions, weight) / mdp.states

    assert distance(mdp, train(mdp, step, steps=200, lr=0.1)).max() > 0.1


@pytest.mark.parametrize("name", ["reward", "gradient"])
def test_expected_gradient_is_that_of_the_reverse_kl(mdp, name):
    """(7): with actions drawn from π_θ, E[∇loss] = ∇ Σ_s KL(π_θ‖π*)(s); the β² is divided out.

    The policy gradient shares it: ∇ E_π[log π/π*] has the same score-function form.
    """
    torch.manual_seed(1)
    start = (mdp.reference + torch.randn_like(mdp.reference)).requires_grad_()
    states, actions = every_pair(mdp)
    weight = start.detach().softmax(-1)[states, actions]
    loss = loss_sum(LOSSES[name], mdp, start, states, actions, weight)
    (grad,) = torch.autograd.grad(loss, start)
    kl = kl_divergence(start.log_softmax(-1), mdp.optimal).sum()
    (expected,) = torch.autograd.grad(kl, start)
    torch.testing.assert_close(grad, expected, atol=1e-8, rtol=0)
