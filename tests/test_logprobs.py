"""Pure functions on log-probabilities: naive equivalents, closed-form gradients, exact zeros."""

import math

import pytest
import torch

from iqstar.logprobs import (
    LARGEST_LOG_RATIO,
    entropy,
    forward_kl,
    generalized_jsd,
    kl_divergence,
    reverse_kl,
    sampled_kl,
    token_logprobs,
)


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum(-1)


def naive_jsd(logits, target, weight):
    logp = logits.log_softmax(-1)
    middle = (weight * logp.exp() + (1 - weight) * target.exp()).log()
    return weight * kl(logp, middle) + (1 - weight) * kl(target, middle)


#: name → (ours, what its docstring says it is, left to autograd)
DIVERGENCES = {
    "reverse": (reverse_kl, lambda z, q: kl(z.log_softmax(-1), q)),
    "forward": (forward_kl, lambda z, q: kl(q, z.log_softmax(-1))),
    "jsd ½": (lambda z, q: generalized_jsd(z, q, 0.5), lambda z, q: naive_jsd(z, q, 0.5)),
    "jsd 0.1": (lambda z, q: generalized_jsd(z, q, 0.1), lambda z, q: naive_jsd(z, q, 0.1)),
}
divergences = pytest.mark.parametrize("name", list(DIVERGENCES))


def random(seed, *shape, scale=3.0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=gen, dtype=torch.float64)).to(dtype)


@divergences
def test_a_divergence_and_its_gradient_equal_the_naive_ones(name):
    ours, naive = DIVERGENCES[name]
    logits = random(0, 5, 7).requires_grad_()
    target, upstream = random(1, 5, 7).log_softmax(-1), random(2, 5)
    values, expected = ours(logits, target), naive(logits, target)
    torch.testing.assert_close(values, expected, atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad((values * upstream).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), logits)
    torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)


@divergences
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_distributions_have_exactly_no_divergence_and_no_gradient(name, dtype):
    """Autograd through a log-softmax leaves about 1e-7 here, which Adam turns into full steps."""
    logits = random(0, 50, 300, dtype=dtype).requires_grad_()
    target = logits.detach().log_softmax(-1)
    values = DIVERGENCES[name][0](logits, target)
    (grad,) = torch.autograd.grad(values.sum(), logits)
    assert torch.count_nonzero(values) == 0
    assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("name", [*DIVERGENCES, "kl", "entropy"])
def test_autocast_changes_no_bit(name):
    """It takes a product of vectors in bfloat16: a small KL, which is of second order, was lost."""
    logits, other = (random(seed, 8, 50, dtype=torch.float32) for seed in (0, 1))
    target = (logits + 0.03 * other).log_softmax(-1)
    functions = {
        "kl": lambda x, y: kl_divergence(x.log_softmax(-1), y),
        "entropy": lambda x, _: entropy(x.log_softmax(-1)),
    }
    divergence = functions.get(name) or DIVERGENCES[name][0]
    plain, under = (logits.clone().requires_grad_() for _ in range(2))
    value = divergence(plain, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence(under, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, value)
    found.sum().backward()
    value.sum().backward()
    assert torch.equal(under.grad, plain.grad)


def test_autograd_alone_would_leave_a_gradient():
    """Why the closed forms exist; if this fails, they may go."""
    logits = random(0, 50, 300, dtype=torch.float32).requires_grad_()
    loss = kl(logits.log_softmax(-1), logits.detach().log_softmax(-1)).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.count_nonzero(grad) > 0


@divergences
def test_a_divergence_is_never_negative_and_has_a_gradient_without_a_mean(name):
    """Σ_a ∂D/∂z_a = 0, because adding a constant to all logits changes no distribution."""
    logits = random(3, 40, 9).requires_grad_()
    values = DIVERGENCES[name][0](logits, random(4, 40, 9).log_softmax(-1))
    (grad,) = torch.autograd.grad(values.sum(), logits)
    assert (values > 0).all()
    assert grad.sum(-1).abs().max() < 1e-12


@divergences
def test_impossible_tokens_count_nothing(name):
    """A token that neither distribution allows (−inf) leaves value and gradient as without it."""
    ours = DIVERGENCES[name][0]
    logits, target = random(5, 3, 4), random(6, 3, 4).log_softmax(-1)
    never = torch.full((3, 1), -math.inf, dtype=torch.float64)
    short, long = logits.requires_grad_(), torch.cat([logits.detach(), never], -1).requires_grad_()
    values, expected = ours(long, torch.cat([target, never], -1)), ours(short, target)
    torch.testing.assert_close(values, expected)
    (grad,) = torch.autograd.grad(values.sum(), long)
    (wanted,) = torch.autograd.grad(expected.sum(), short)
    torch.testing.assert_close(grad[:, :4], wanted)
    assert torch.count_nonzero(grad[:, 4]) == 0


def test_kl_by_hand():
    """KL((½,½)‖(¼,¾)) = ½ log 2 + ½ log ⅔ = ½ log 4/3; the other way ¾ log 3/2 − ¼ log 2."""
    p = torch.tensor([[0.5, 0.5]]).double().log()
    q = torch.tensor([[0.25, 0.75]]).double().log()
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    assert reverse_kl(p, q).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    backwards = 0.75 * math.log(3 / 2) - 0.25 * math.log(2)
    assert forward_kl(p, q).item() == pytest.approx(backwards, abs=1e-15)


def test_jsd_of_disjoint_distributions_is_log_2():
    p = torch.tensor([[0.0, -math.inf]]).double()
    q = torch.tensor([[-math.inf, 0.0]]).double()
    assert generalized_jsd(p, q, 0.5).item() == pytest.approx(math.log(2), abs=1e-15)


def test_entropy_by_hand():
    """Log 4 over four equal tokens, also if a fifth is impossible; 0 for a certain one."""
    inf = math.inf
    rows = torch.tensor([[0.0, 0, 0, 0, -inf], [0, -inf, -inf, -inf, -inf]]).double()
    expected = torch.tensor([math.log(4), 0.0], dtype=torch.float64)
    torch.testing.assert_close(entropy(rows.log_softmax(-1)), expected, atol=1e-15, rtol=0)


def test_token_logprobs_equal_log_softmax_and_gather():
    logits, actions = random(7, 6, 11).requires_grad_(), torch.arange(6)
    values = token_logprobs(logits, actions)
    naive = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    torch.testing.assert_close(values, naive, atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(values.sum(), logits)
    (wanted,) = torch.autograd.grad(naive.sum(), logits)
    torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)


def test_huge_logits_stay_finite():
    logits = random(8, 4, 6, scale=1e4, dtype=torch.float32).requires_grad_()
    target = random(9, 4, 6, scale=1e4, dtype=torch.float32).log_softmax(-1)
    for ours, _ in DIVERGENCES.values():
        values = ours(logits, target)
        (grad,) = torch.autograd.grad(values.sum(), logits)
        assert torch.isfinite(values).all()
        assert torch.isfinite(grad).all()


def test_kl_of_equal_bits_is_exactly_zero():
    logp = random(10, 20, 30, dtype=torch.float32).log_softmax(-1)
    assert torch.count_nonzero(kl_divergence(logp, logp.clone())) == 0


def test_the_sampled_kl_is_an_unbiased_non_negative_estimate():
    """Its mean over p, by enumeration, is KL(p‖q): E_p[e^δ − 1 − δ] = Σ q − 1 + KL = KL."""
    logp, logq = random(11, 1, 9).log_softmax(-1), random(12, 1, 9).log_softmax(-1)
    estimates = sampled_kl(logp[0], logq[0])
    assert (estimates >= 0).all()
    mean = (logp[0].exp() * estimates).sum()
    torch.testing.assert_close(mean, kl_divergence(logp, logq)[0], atol=1e-12, rtol=0)


def test_the_sampled_kl_of_a_token_that_the_policy_gave_up_is_finite():
    """e^100 is inf in float32: one token of that kind must not make a whole gradient NaN."""
    logprobs = torch.tensor([-100.0, -1.0], requires_grad=True)
    total = sampled_kl(logprobs, torch.tensor([0.0, -1.0])).sum()
    (grad,) = torch.autograd.grad(total, logprobs)
    assert total.isfinite()
    assert grad[0].item() == pytest.approx(1 - math.exp(LARGEST_LOG_RATIO))  # it is pulled back
    assert grad[1] == 0


def test_jsd_has_a_slope_where_the_policy_is_next_to_nothing():
    """e^{-95} against 1: the exponential of the log-ratio overflows float32."""
    logits = torch.tensor([[0.0, -95.0, -3.0]], requires_grad=True)
    target = torch.tensor([[-20.0, 0.0, -20.0]]).log_softmax(-1)
    exact = logits.detach().double().requires_grad_()
    for given, aim in ((logits, target), (exact, target.double())):
        generalized_jsd(given, aim, 0.5).sum().backward()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)
