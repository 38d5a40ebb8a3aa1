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
