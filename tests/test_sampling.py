"""The sampler draws from the distribution that is scored."""

import pytest
import torch

from iqstar.errors import InputError, NonFiniteLossError
from iqstar.sampling import CategoricalSampler, ForcedDraws, checked, uniform_numbers

CPU = torch.device("cpu")


def draws(scores, rows, seed=0, **options):
    sampler = CategoricalSampler(**{"temperature": 1.0, "vocab_size": scores.shape[-1]} | options)
    return sampler.draw(scores.expand(rows, -1), uniform_numbers(rows, 1, seed, CPU)[:, 0])


def test_frequencies_are_the_softmax():
    scores = torch.tensor([0.0, 1.0, -1.0, 2.0])
    counts = torch.bincount(draws(scores, 40_000), minlength=4) / 40_000
    # Standard error of a frequency is at most 0.5 / √40,000 = 0.0025.
    torch.testing.assert_close(counts, scores.softmax(-1), atol=0.01, rtol=0)


def test_temperature_divides_the_logits():
    scores = torch.tensor([0.0, 1.0])
    counts = torch.bincount(draws(scores, 40_000, temperature=0.5), minlength=2) / 40_000
    torch.testing.assert_close(counts, (scores * 2).softmax(-1), atol=0.01, rtol=0)


def test_padded_rows_and_impossible_tokens_are_never_drawn():
    scores = torch.tensor([0.0, -torch.inf, 0.0, 99.0])
    assert set(draws(scores, 5_000, vocab_size=3).tolist()) == {0, 2}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [4, 300])
def test_logits_that_are_not_finite_draw_nothing(bad, size):
    scores = torch.zeros(size)
    scores[1] = bad
    with pytest.raises(NonFiniteLossError, match=r"not finite.*model\.optimizer"):
        checked(draws(scores, 2))
    forced = ForcedDraws(
        CategoricalSampler(temperature=1.0, vocab_size=size), uniform_numbers(1, 1, 0, CPU)
    )
    with pytest.raises(NonFiniteLossError, match="not finite"):
        forced(torch.zeros(1, 1, dtype=torch.long), scores[None])


def test_tokens_below_float32_resolution_are_drawn():
    """A quarter of the mass spread over 2^23 tokens after one of three quarters.

    Each is 3e-8: added to 0.75 in float32 it would vanish, and its token never be drawn.
    """
    many, wanted = 2**23, 1_234_567
    scores = torch.zeros(1, many + 1)
    scores[0, 0] = torch.tensor(3.0 * many).log()
    sampler = CategoricalSampler(temperature=1.0, vocab_size=many + 1)
    uniform = torch.tensor([0.75 + 0.25 * (wanted + 0.5) / many], dtype=torch.float64)
    # The softmax itself is in float32.
    assert abs(sampler.draw(scores, uniform).item() - (wanted + 1)) <= 100


@pytest.mark.parametrize("size", [3, 256, 257, 1000, 1024])
def test_blocks_change_no_draw(size):
    """Against the whole cumulative distribution, also at its steps and both its ends."""
    generator = torch.Generator().manual_seed(size)
    scores = 4 * torch.randn(1, size, generator=generator)
    scores[0, torch.randperm(size, generator=generator)[: size // 2]] = -torch.inf
    mass = scores.softmax(-1)[0].double()
    sums = mass.cumsum(0)
    middles = (sums - mass / 2)[mass > 0] / sums[-1]
    random = uniform_numbers(500, 1, size, CPU)[:, 0]
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    uniform = torch.cat([middles, random, ends])
    sampler = CategoricalSampler(temperature=1.0, vocab_size=size)
    drawn = sampler.draw(scores.expand(len(uniform), -1), uniform)
    naive = torch.searchsorted(sums, uniform * sums[-1], right=True)
    assert torch.equal(drawn[:-1], naive[:-1])
    possible = (mass > 0).nonzero()[:, 0]
    assert torch.equal(drawn[: len(possible)], possible)  # each at the middle of its share
    assert drawn[-1] == possible[-1]


def test_rows_draw_with_numbers_of_their_own():
    """Whatever rows stand beside them, and in whatever order."""
    scores = torch.randn(8, 600, generator=torch.Generator().manual_seed(0))
    uniform = uniform_numbers(8, 1, 0, CPU)[:, 0]
    sampler = CategoricalSampler(temperature=1.0, vocab_size=600)
    rows = [6, 1, 3]
    assert torch.equal(
        sampler.draw(scores[rows], uniform[rows]), sampler.draw(scores, uniform)[rows]
    )


def test_a_forced_draw_is_all_that_is_left():
    scores, uniform = torch.randn(4, 300), uniform_numbers(4, 2, 0, CPU)
    sampler = CategoricalSampler(temperature=1.0, vocab_size=280)
    forced = ForcedDraws(sampler, uniform)
    for step in range(2):
        left = forced(torch.zeros(4, 1).long(), scores)
        assert torch.isfinite(left).sum(dim=-1).eq(1).all()
        assert torch.equal(left.argmax(-1), sampler.draw(scores, uniform[:, step]))


def test_seed_fixes_the_draws_and_leaves_the_global_state_alone():
    scores = torch.zeros(50)
    before = torch.get_rng_state()
    first, again, other = (draws(scores, 100, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_top_k_and_top_p():
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert set(draws(scores, 2_000, top_k=2).tolist()) == {0, 1}
    assert set(draws(scores, 2_000, top_p=0.5).tolist()) == {0}


def test_a_device_without_float64_is_refused():
    with pytest.raises(InputError, match=r"trainer\.accelerator: .* set it to cpu"):
        uniform_numbers(1, 1, 0, torch.device("mps"))
