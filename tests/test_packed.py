"""Packed matrices multiply as plain ones do, serve one rollout, and leave nothing behind."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from iqstar.lean import keep_less
from iqstar.packed import weights_packed
from iqstar.recomputed import linear
from iqstar.sampling import CategoricalSampler, uniform_numbers
from test_policy import load
from tiny import tiny_model

served = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


def layer_of(dtype=torch.float32, bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(64, 48, bias=bias, dtype=dtype)


def packed(layer):
    own = vars(layer).get("forward")
    return own is not None and getattr(own, "__func__", None) is not linear


@served
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_layer(bias):
    """Of rows of every number and shape, none of them included, to within rounding."""
    layer = layer_of(bias=bias)
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1))
    rows = [x, x[:1], x[0], x[0, :0], x[:, ::2]]
    with torch.no_grad(), weights_packed(layer, rows=5):
        assert packed(layer)
        ours = [layer(y) for y in rows]
    assert not packed(layer)
    for mine, y in zip(ours, rows, strict=True):
        torch.testing.assert_close(mine, layer(y).detach(), atol=1e-6, rtol=1e-6)


def test_what_computes_otherwise_is_left_alone():
    """Another dtype, a subclass, a layer that somebody changed, and layers that are not linear."""

    class Other(nn.Linear):
        pass

    changed = layer_of()
    changed.forward = own = lambda x: x
    dtypes = [layer_of(dtype) for dtype in (torch.float64, torch.bfloat16)]
    model = nn.ModuleList([*dtypes, Other(4, 4), changed, nn.Embedding(4, 4)])
    with weights_packed(model, rows=2):
        assert not any(packed(m) for m in model if m is not changed)
        assert changed.forward is own
    assert changed.forward is own
    plain = layer_of()
    with torch.autocast("cpu", torch.bfloat16), weights_packed(plain, rows=2):
        assert not packed(plain)


@served
def test_a_layer_that_keeps_less_is_packed_and_keeps_less_again():
    layer = layer_of()
    keep_less(layer)
    own = layer.forward
    with weights_packed(layer, rows=2):
        assert packed(layer)
    assert layer.forward == own


@served
def test_a_layer_that_cannot_be_packed_says_why_and_stays(monkeypatch):
    layers = nn.ModuleList([layer_of(), layer_of()])
    keep_less(layers)
    own = [layer.forward for layer in layers]

    def full(layer, rows):
        raise MemoryError("no room")

    monkeypatch.setattr("iqstar.packed._packed_forward", full)
    with pytest.raises(MemoryError, match="no room"), weights_packed(layers, rows=2):
        pass
    assert [layer.forward for layer in layers] == own


@served
def test_layers_are_given_back_when_generation_fails():
    layer = layer_of()
    with pytest.raises(RuntimeError, match="inner product"), weights_packed(layer, rows=2):
        layer(torch.zeros(2, 63))
    assert not packed(layer)


@served
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_policy_samples_with_the_weights_of_the_moment(tiny, monkeypatch, name):
    """The second rollout sees what an optimiser step changed; tokens are those of plain products.

    GPT-2 has no linear layers but its head.
    """
    actor = load(tiny).actor
    if name == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        config = GPT2Config(vocab_size=actor.chat.vocab_size, **sizes)
        torch.manual_seed(0)
        actor.model = AutoModelForCausalLM.from_config(config)
    layers = [m for m in actor.model.modules() if type(m) is nn.Linear]
    seen = []

    def sample():
        sampler = CategoricalSampler(temperature=1.0, vocab_size=actor.chat.vocab_size)
        uniform = uniform_numbers(2, 8, 0, torch.device("cpu"))

        def ended(row):
            seen.append(all(packed(layer) for layer in layers))
            return False

        return actor.generate([[5, 6, 7], [8, 9]], 8, sampler, uniform, ended)

    def plainly():
        with monkeypatch.context() as patch:
            patch.setattr("iqstar.packed.packable", lambda layer: False)
            return sample()

    before = sample()
    assert all(seen)
    assert before == plainly()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.5)
    after = sample()
    assert after != before
    assert after == plainly()
    assert not any(packed(layer) for layer in layers)


@served
def test_all_layers_of_a_model_are_packed():
    model = tiny_model()
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    with weights_packed(model, rows=4):
        assert len(layers) > 7
        assert all(packed(layer) for layer in layers)
