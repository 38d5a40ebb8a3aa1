"""Grouped attention is transformers' eager attention without the copies."""

import pytest
import torch

from fitting import attach, make_module
from iqstar.attention import grouped_attention, warn_off_cpus
from iqstar.loading import load_policy
from iqstar.mdp import Message, Prompt
from iqstar.policy import PolicySpec
from iqstar.rollouts import GenerateRollout
from iqstar.scoring import pack_prompts
from tiny import tiny_folder


def test_equals_its_naive_equivalent():
    torch.manual_seed(0)
    q = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 7, 4, dtype=torch.float64)
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.float64)
    mask[:, :, :, 5:] = -torch.inf
    keys, values = (x.repeat_interleave(3, dim=1) for x in (k, v))
    naive = ((q @ keys.mT * 4**-0.5 + mask).softmax(-1) @ values).transpose(1, 2)
    ours, _ = grouped_attention(torch.nn.Identity(), q, k, v, mask)
    torch.testing.assert_close(ours, naive, atol=1e-12, rtol=0)


def test_gradient():
    torch.manual_seed(0)
    q = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.full((3, 5), -torch.inf, dtype=torch.float64).triu(3).expand(2, 1, 3, 5)

    def attend(q, k, v):
        return grouped_attention(torch.nn.Identity(), q, k, v, mask)[0]

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_no_weights_are_kept():
    q, k, v = (torch.randn(2, 2, 30, 4, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        grouped_attention(torch.nn.Identity(), q, k, v, None)
    assert max(sizes) == q.numel()


def test_under_autocast_products_are_in_its_dtype_and_the_softmax_is_not():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = grouped_attention(torch.nn.Identity(), q, k, v, None)
        weights = (q @ k.mT * 4**-0.5).softmax(-1, dtype=torch.float32)
        naive = (weights @ v).transpose(1, 2)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, naive)


def test_gradient_under_autocast_is_near_the_exact_one():
    """Queries and keys are float32 after the rotation of some models, values bfloat16."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, n, 8, 4, requires_grad=True) for n in (4, 2, 2)]
    found = []
    for autocast in (False, True):
        q, k, v = leaves
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            values = v.to(torch.bfloat16) if autocast else v
            output, _ = grouped_attention(torch.nn.Identity(), q, k, values, None)
        output.float().square().sum().backward()
        found.append([x.grad for x in leaves])
        for x in leaves:
            x.grad = None
    for exact, ours in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    "option", [{"softcap": 30.0}, {"dropout": 0.1}, {"position_bias": torch.zeros(1)}]
)
def test_refuses_what_it_does_not_do(option):
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="attn_implementation"):
        grouped_attention(torch.nn.Identity(), x, x, x, None, **option)


def test_same_model_as_eager(tmp_path):
    """Hidden states and sampled responses of a model with grouped heads, in float32."""
    folder = str(tiny_folder(tmp_path))
    prompts = [Prompt(messages=(Message(role="user", content=t),)) for t in ("Hi", "And you?")]
    hidden, sampled = [], []
    for name in ("eager", "grouped"):
        spec = PolicySpec(model=folder, attn_implementation=name)
        policy = load_policy(spec, spec.chat(), "32-true")
        rollout = GenerateRollout(8).roll_out(policy, prompts, 1.0, seed=3)
        sampled.append(rollout.response_ids)
        hidden.append(policy.actor.hidden(pack_prompts(policy.actor, rollout)))
    assert torch.equal(*sampled)
    torch.testing.assert_close(*hidden, atol=1e-6, rtol=1e-5)


def test_a_run_asks_about_its_device(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr("iqstar.trained.warn_off_cpus", lambda *given: asked.append(given))
    attach(make_module(tiny, spec={"attn_implementation": "grouped"}))
    assert asked == [("grouped", torch.device("cpu"))]


def test_on_a_gpu_it_says_whom_it_is_for(recwarn):
    warn_off_cpus("grouped", torch.device("cpu"))
    warn_off_cpus(None, torch.device("cuda", 0))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"attn_implementation: grouped is for CPUs.*cuda:0; null"):
        warn_off_cpus("grouped", torch.device("cuda", 0))
