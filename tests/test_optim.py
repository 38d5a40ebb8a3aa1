"""Optimiser groups and schedules: hand-derived learning rates."""

import math

import pytest
import torch
from torch import nn

from fitting import LORA, attach, make_module
from iqstar.errors import InputError
from iqstar.optim import Constant, WarmupCosine, default_optimizer, parameter_groups


def rates(schedule, steps, lr=2.0):
    """The learning rate of every optimiser step."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=lr)
    scheduler = schedule.build(optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_and_cosine_by_hand():
    """10 steps, 2 of them warm-up: ⅓, ⅔, 1, then 0.1 + 0.9·½(1 + cos(π k/8)), k = 1 … 7."""
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 8)]
    expected = [2 * f for f in (1 / 3, 2 / 3, 1, *cosine)]
    assert rates(WarmupCosine(warmup=0.2, floor=0.1), 10) == pytest.approx(expected)


def test_without_warm_up_it_starts_at_the_full_rate_and_never_rests_at_zero():
    found = rates(WarmupCosine(warmup=0.0, floor=0.0), 4)
    expected = [2 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert found == pytest.approx(expected)
    assert min(rates(WarmupCosine(warmup=0.5, floor=0.0), 4)) > 0


def test_constant_is_constant():
    assert rates(Constant(), 3) == [2.0] * 3


@pytest.mark.parametrize("options", [{"warmup": 1.0}, {"warmup": -0.1}, {"floor": 1.1}])
def test_senseless_schedules_are_refused(options):
    with pytest.raises(InputError, match=r"model\.schedule"):
        WarmupCosine(**options)


def test_vectors_and_embeddings_do_not_decay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear, self.norm = (
                nn.Embedding(5, 3),
                nn.Linear(3, 4),
                nn.LayerNorm(4),
            )
            self.frozen = nn.Linear(3, 3).requires_grad_(False)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight  # tied: an embedding too, and there only once

    model = Model()
    decayed, kept = parameter_groups(model)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert {id(p) for p in kept["params"]} == {
        id(model.embed.weight),
        id(model.linear.bias),
        id(model.norm.weight),
        id(model.norm.bias),
    }
    assert len(kept["params"]) == 4
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1.0, weight_decay=0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]


def test_every_trained_weight_is_in_one_group(tiny):
    for spec in ({}, {"lora": LORA}):
        module = attach(make_module(tiny, spec=spec))
        groups = parameter_groups(module.actor)
        ids = [id(p) for g in groups for p in g["params"]]
        assert len(ids) == len(set(ids))
        assert set(ids) == {id(p) for p in module.actor.parameters() if p.requires_grad}
        assert all(g["params"] for g in groups)


def test_the_default_is_adamw_without_decay():
    optimizer = default_optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 2e-5
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
