"""The sampler inside ``generate`` draws from the distribution that is scored."""

import torch

from iqstar.sampling import CategoricalSampler

CPU = torch.device("cpu")


def draws(scores, rows, **options):
    sampler = CategoricalSampler(
        **{"temperature": 1.0, "vocab_size": scores.shape[-1], "seed": 0, "device": CPU} | options
    )
    forced = sampler(torch.zeros(rows, 1, dtype=torch.long), scores.expand(rows, -1))
    assert torch.isfinite(forced).sum(dim=-1).eq(1).all()  # exactly one token is left in a row
    return forced.argmax(dim=-1)


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


def test_tokens_below_float32_resolution_are_drawn(monkeypatch):
    """A quarter of the mass spread over 2^23 tokens after one of three quarters.

    Each is 3e-8: added to 0.75 in float32 it would vanish, and its token never be drawn.
    """
    many, wanted = 2**23, 1_234_567
    scores = torch.zeros(many + 1)
    scores[0] = torch.tensor(3.0 * many).log()
    uniform = 0.75 + 0.25 * (wanted + 0.5) / many
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, uniform).double())
    assert abs(draws(scores, 1).item() - (wanted + 1)) <= 100  # the softmax itself is in float32


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
