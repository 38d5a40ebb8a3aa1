"""Layers that keep less for their backward pass compute as before."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from iqstar.adapters import LoRASpec, leave_casts_to_autocast, with_adapters
from iqstar.lean import keep_less
from iqstar.planning.tracing import Trace

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, other activation": LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "qwen3": Qwen3Config(**SIZES),
    "phi3": Phi3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=50, n_embd=24, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}
IDS = torch.arange(36).view(3, 12) % 50
"""Three rows of tokens."""


def both(name, **options):
    """A random model as transformers computes it, and a copy that keeps less."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    for module in theirs.modules():
        if module.__class__.__name__.endswith("Norm"):
            nn.init.normal_(module.weight)  # not all ones
    ours = copy.deepcopy(theirs)
    if options:
        theirs, ours = (with_adapters(m, LoRASpec(**options)) for m in (theirs, ours))
        for model in (theirs, ours):
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, std=0.1)
    keep_less(ours)
    return theirs, ours


def states_and_gradient(model, autocast):
    """Last hidden states, and the gradient of a weighted sum of them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model.get_decoder()(IDS).last_hidden_state
        weights = torch.linspace(-1, 1, states.numel()).view_as(states)
        (states.float() * weights).sum().backward()
    trained = (p for p in model.parameters() if p.grad is not None)
    return states.detach(), torch.cat([p.grad.flatten() for p in trained])


def kept_bytes(model):
    """Bytes that autograd keeps of a forward pass under autocast, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # holding it keeps the address from being reused
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.get_decoder()(IDS.repeat(8, 1))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_same_bits_and_the_same_gradient(name, autocast):
    theirs, ours = both(name)
    (states, grad), (lean_states, lean_grad) = (
        states_and_gradient(m, autocast) for m in (theirs, ours)
    )
    assert torch.equal(states, lean_states)
    apart = (grad - lean_grad).norm() / grad.norm()
    assert apart < (0.01 if autocast else 1e-6)


def test_the_gradient_under_autocast_is_as_near_to_the_exact_one():
    theirs, ours = both("llama")
    _, exact = states_and_gradient(copy.deepcopy(theirs), False)
    errors = [
        float((states_and_gradient(m, True)[1] - exact).norm() / exact.norm())
        for m in (theirs, ours)
    ]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize(
    ("options", "share"), [({}, 0.6), ({"rank": 2}, 0.75)], ids=["all weights", "adapters"]
)
def test_less_is_kept(options, share):
    theirs, ours = both("llama", **options)
    assert kept_bytes(ours) < share * kept_bytes(theirs)
    (states, grad), (lean_states, lean_grad) = (
        states_and_gradient(m, True) for m in (theirs, ours)
    )
    assert torch.equal(states, lean_states)
    assert (grad - lean_grad).norm() < 0.02 * grad.norm()


def test_adapters_keep_no_casts_of_their_own():
    """PEFT casts the product of a gated activation to float32, autocast back: kept twice."""
    theirs, ours = both("llama", rank=2)
    before = states_and_gradient(theirs, True)
    kept = kept_bytes(ours)
    leave_casts_to_autocast(ours)
    products = 2 * 24 * 12 * SIZES["intermediate_size"] * torch.bfloat16.itemsize
    assert kept_bytes(ours) == kept - products
    states, grad = states_and_gradient(ours, True)
    assert torch.equal(states, before[0])
    assert (grad - before[1]).norm() < 0.02 * before[1].norm()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_what_is_computed_again_has_the_bits_that_it_had(monkeypatch, autocast):
    """Of both norms of both layers, the last norm, and the gated activations."""
    _, ours = both("llama")
    noted = []

    def note(tensor, compute, *origin):
        noted.append((tensor.detach().clone(), compute, origin))
        return tensor

    monkeypatch.setattr("iqstar.lean.follows_from", note)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours.get_decoder()(IDS)
    assert len(noted) == 2 * 3 + 1
    assert all(torch.equal(tensor, compute(*origin)) for tensor, compute, origin in noted)


def test_which_layers_are_known():
    known = {
        name: {type(m).__name__ for m in both(name)[1].modules() if "forward" in vars(m)}
        for name in CONFIGS
    }
    assert known == {
        "llama": {"LlamaRMSNorm", "LlamaMLP", "Linear"},
        "llama, other activation": {"LlamaRMSNorm", "LlamaMLP", "Linear"},
        "qwen3": {"Qwen3RMSNorm", "Qwen3MLP", "Linear"},
        "phi3": {"Phi3RMSNorm", "Linear"},  # its gate and up are one matrix
        "gemma": {"GemmaMLP", "Linear"},  # its norms add one to their weight
        "gemma2": {"Gemma2MLP", "Linear"},
        "gpt2": {"Linear"},  # its head alone
    }


def test_a_checkpointed_layer_computes_no_more_again_than_it_did():
    """PyTorch leaves a block's last product out of what it computes again."""
    theirs, _ = both("llama")
    ours = copy.deepcopy(theirs)
    keep_less(ours, checkpointed=True)
    counts = []
    for model in (theirs, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with Trace() as trace:
            states_and_gradient(model, False)
        counts.append(trace.flops)
    assert counts[1] == counts[0] > 0


class ShiftedNorm(LlamaRMSNorm):
    """Looks like the other, and computes something else."""

    def forward(self, hidden_states):
        return 1e-6 + super().forward(hidden_states)


class SwappedMLP(LlamaMLP):
    """Takes its two factors the other way round."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class GatedNorm(LlamaRMSNorm):
    """May be given more than its input."""

    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class LateNorm(LlamaRMSNorm):
    """Rounds after it has multiplied by the weight, not before."""

    def forward(self, hidden_states):
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        unit = wide * scale
        return self.weight * (unit.to(self.weight.dtype))


class ShiftedLinear(nn.Linear):
    """Reads its input in float32."""

    def forward(self, x):
        return super().forward(x + 1e-3)


def other_mlps():
    """Gated activations that are not alike: no activation at all, factors the other way round."""
    identity = copy.deepcopy(SwappedMLP(CONFIGS["llama"]))
    identity.__class__, identity.act_fn = LlamaMLP, nn.Identity()
    return SwappedMLP(CONFIGS["llama"]), identity


@pytest.mark.parametrize(
    "layer", [ShiftedNorm(24), GatedNorm(24), LateNorm(24), ShiftedLinear(4, 4), *other_mlps()]
)
def test_a_layer_that_computes_something_else_stays_as_it_is(layer):
    keep_less(layer)
    assert "forward" not in vars(layer)
    assert not layer._forward_pre_hooks


def test_trying_out_draws_nothing_and_needs_no_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
        before = torch.get_rng_state()
        keep_less(model)
    assert torch.equal(before, torch.get_rng_state())
    assert "forward" in vars(model.model.norm)
    assert all(p.is_meta for p in model.parameters())


def test_a_copy_computes_with_its_own_weights():
    """The frozen reference is a copy of the policy: it must not follow the policy's norms."""
    _, model = both("llama")
    frozen = copy.deepcopy(model)
    before = frozen(IDS).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(frozen(IDS).logits, before)
    assert not torch.equal(model(IDS).logits, before)


def test_norm_in_a_smaller_dtype_than_float32():
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(24).to(torch.bfloat16)
    nn.init.normal_(theirs.weight)
    ours = copy.deepcopy(theirs)
    keep_less(ours)
    found = []
    for norm in (theirs, ours):
        x = torch.linspace(-2, 3, 120).view(5, 24).to(torch.bfloat16).requires_grad_()
        output = norm(x)
        output.backward(torch.cos(output.detach()))
        found.append((output, x.grad, norm.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    for old, new in zip(found[0][1:], found[1][1:], strict=True):
        assert new.dtype == torch.bfloat16
        torch.testing.assert_close(new, old, atol=0.03, rtol=0.03)
