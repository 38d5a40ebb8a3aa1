"""A run without a named precision takes the faster one."""

import pytest
import torch

from iqstar import precision

CPU_FLAG = "_is_avx512_bf16_supported"


@pytest.mark.parametrize(
    ("has_instructions", "faster", "expected"),
    [(True, True, "bf16-mixed"), (True, False, "32-true"), (False, True, "32-true")],
)
def test_bfloat16_needs_instructions_that_pay(monkeypatch, has_instructions, faster, expected):
    monkeypatch.setattr(torch.cpu, CPU_FLAG, lambda: has_instructions, raising=False)
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: faster)
    assert precision.default_precision("cpu") == expected


def test_the_trial_answers_and_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    assert precision.bfloat16_is_faster() in (True, False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_casts_are_kept_inside_and_forgotten_after():
    """One cast of a weight for two products, though the autocast around keeps none."""
    weight = torch.nn.Parameter(torch.randn(8, 8))
    inputs = torch.randn(2, 8)

    def casts() -> int:
        with torch.profiler.profile() as profile:
            for _ in range(2):
                torch.nn.functional.linear(inputs, weight)
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts.get("aten::_to_copy", 0)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        alone = casts()
        with precision.casts_kept(torch.device("cpu")):
            assert casts() == alone - 1
        assert casts() == alone
        with torch.enable_grad():
            torch.nn.functional.linear(inputs, weight).sum().backward()
    assert weight.grad is not None
