"""Credit transforms: hand-derived values, composition, and what may not be combined.

Whitening over two processes is in test_distributed.py.
"""

import pytest
import torch

from fitting import PROMPTS, attach, make_module
from iqstar.credit import PrefixWeight, TopTokens, Whiten
from iqstar.errors import InputError
from iqstar.losses import (
    CreditAdvantage,
    DistributionImitationLoss,
    RewardImitationLoss,
    TokenPolicyGradientLoss,
)
from iqstar.mdp import TokenCredits

CREDIT = [1.0, -5.0, 3.0, -1.0, 2.0]
POSITIONS = torch.tensor([0, 1, 2, 0, 1])


def tokens(credit=CREDIT, weight=None):
    values = torch.tensor(credit, dtype=torch.float64)
    ones = torch.ones_like(values)
    return TokenCredits(
        actions=ones.long(),
        reference=-ones,
        credit=values,
        weight=ones if weight is None else torch.tensor(weight, dtype=torch.float64),
    )


def test_whitened_credit_has_mean_0_and_deviation_1():
    """Mean 0 already; variance (1 + 25 + 9 + 1 + 4)/5 = 8."""
    white = Whiten().apply(tokens(), POSITIONS).credit
    expected = torch.tensor(CREDIT, dtype=torch.float64) / 8**0.5
    torch.testing.assert_close(white, expected, atol=1e-12, rtol=0)
    shifted = Whiten().apply(tokens([c + 7 for c in CREDIT]), POSITIONS).credit
    torch.testing.assert_close(shifted, expected, atol=1e-12, rtol=0)


def test_whitening_without_shift_only_divides():
    """Mean 7, variance 8 as before."""
    white = Whiten(shift=False).apply(tokens([c + 7 for c in CREDIT]), POSITIONS).credit
    expected = (torch.tensor(CREDIT, dtype=torch.float64) + 7) / 8**0.5
    torch.testing.assert_close(white, expected, atol=1e-12, rtol=0)


def test_whitening_of_equal_or_no_credit_stays_finite():
    assert torch.isfinite(Whiten().apply(tokens([2.0, 2.0]), POSITIONS[:2]).credit).all()
    assert len(Whiten().apply(tokens([]), POSITIONS[:0])) == 0


def test_top_tokens_keeps_the_largest_in_absolute_value():
    """2 of 5 are −5 and 3; at least one is kept; the credit itself is left alone."""
    kept = TopTokens(0.4).apply(tokens(), POSITIONS)
    assert kept.weight.tolist() == [0, 1, 1, 0, 0]
    assert kept.credit.tolist() == CREDIT
    assert TopTokens(0.01).apply(tokens(), POSITIONS).weight.tolist() == [0, 1, 0, 0, 0]
    assert TopTokens(1.0).apply(tokens(), POSITIONS).weight.tolist() == [1] * 5
    assert len(TopTokens().apply(tokens([]), POSITIONS[:0])) == 0


def test_prefix_weight_halves_after_its_half_life():
    assert PrefixWeight(1.0).apply(tokens(), POSITIONS).weight.tolist() == [1, 0.5, 0.25, 1, 0.5]
    weight = PrefixWeight(2.0).apply(tokens(), POSITIONS).weight
    torch.testing.assert_close(
        weight[:3], torch.tensor([1, 0.5**0.5, 0.5]).double(), rtol=1e-6, atol=0
    )


def test_transforms_compose_in_their_order():
    """Weights multiply; TopTokens after Whiten judges the whitened credit."""
    both = PrefixWeight(1.0).apply(TopTokens(0.4).apply(tokens(), POSITIONS), POSITIONS)
    assert both.weight.tolist() == [0, 0.5, 0.25, 0, 0]
    credit = [10.0, 11.0, 12.0, 19.0, 13.0]  # mean 13: 19 and 10 are the extremes
    white = TopTokens(0.4).apply(Whiten().apply(tokens(credit), POSITIONS), POSITIONS)
    assert white.weight.tolist() == [1, 0, 0, 1, 0]


def test_a_module_applies_them_to_the_whole_rollout(tiny):
    """Not to each micro-batch: mean 0 and deviation 1 hold over all of them."""
    module = make_module(
        tiny,
        loss=RewardImitationLoss(),
        transforms=[Whiten(), TopTokens(0.5), PrefixWeight(1.0)],
        micro_batch_size=1,
    )
    batches = attach(module).collect(PROMPTS, seed=1)
    credit = torch.cat([b.tokens.credit for b in batches])
    weight = torch.cat([b.tokens.weight for b in batches])
    assert len(batches) == len(PROMPTS)
    assert credit.mean().item() == pytest.approx(0, abs=1e-6)
    assert credit.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (weight > 0).sum() == round(0.5 * len(credit))
    assert set(weight.tolist()) <= {0, 1, 0.5, 0.25, 0.125, 0.0625}


def test_whitening_leaves_no_distribution_to_imitate(tiny):
    with pytest.raises(InputError, match=r"model\.transforms: Whiten .* RewardImitationLoss"):
        make_module(tiny, loss=DistributionImitationLoss(), transforms=[Whiten()])
    make_module(tiny, loss=DistributionImitationLoss(), transforms=[TopTokens(), PrefixWeight()])
    baseline = TokenPolicyGradientLoss(advantage=CreditAdvantage(state_baseline=True))
    with pytest.raises(InputError, match=r"Whiten .* without state_baseline"):
        make_module(tiny, loss=baseline, transforms=[Whiten()])
    make_module(tiny, loss=TokenPolicyGradientLoss(), transforms=[Whiten()])


@pytest.mark.parametrize(
    "make", [lambda: TopTokens(0.0), lambda: TopTokens(1.1), lambda: PrefixWeight(0.0)]
)
def test_senseless_arguments_are_refused(make):
    with pytest.raises(InputError, match=r"model\.transforms"):
        make()
