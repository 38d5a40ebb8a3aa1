"""The chunked LM head against the version that holds all logits."""

import pytest
import torch

import iqstar.head
from iqstar.distributions import HeadDistributions
from iqstar.head import BUDGET, COPIES, LanguageHead, chunk_rows, head_loss
from iqstar.logprobs import forward_kl, generalized_jsd, reverse_kl, token_logprobs

TOKENS, DIM, ROWS, VOCAB = 11, 6, 20, 17
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 4.0},
    "temperature": {"temperature": 0.6},
    "all": {"bias": True, "scale": 1.7, "softcap": 5.0, "temperature": 1.3},
}
heads = pytest.mark.parametrize("name", list(HEADS))


def random(seed, *shape, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def setting(name, dtype=torch.float64, chunk=None):
    """Hidden states and a head with padded rows, all of which want a gradient."""
    budget = None if chunk is None else int(chunk * 4 * COPIES * VOCAB)
    options = dict(HEADS[name])
    bias = random(2, ROWS, dtype=dtype).requires_grad_() if options.pop("bias", False) else None
    weight = random(1, ROWS, DIM, dtype=dtype).requires_grad_()
    head = LanguageHead(weight=weight, bias=bias, vocab_size=VOCAB, budget=budget, **options)
    return random(0, TOKENS, DIM, dtype=dtype).requires_grad_(), head


def naive_logits(hidden, head):
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits[:, : head.vocab_size] * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / head.temperature


def imitation(logits, index, _=None):
    """Squared error at one token plus a divergence, so that every logit has a gradient."""
    target = random(3, TOKENS, VOCAB, dtype=logits.dtype).log_softmax(-1)[index]
    logprobs = token_logprobs(logits, index % VOCAB)
    return (logprobs + 1) ** 2 + reverse_kl(logits, target), {"logprob": logprobs.detach()}


def gradients(value, hidden, head):
    wanted = [t for t in (hidden, head.weight, head.bias) if t is not None]
    return torch.autograd.grad(value, wanted)


@heads
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_loss_and_every_gradient_equal_those_of_the_full_logits(name, chunk):
    hidden, head = setting(name, chunk=chunk)
    total, metrics = head_loss(hidden, head, imitation)
    losses, parts = imitation(naive_logits(hidden, head), torch.arange(TOKENS))
    torch.testing.assert_close(total, losses.sum(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(metrics["logprob"], parts["logprob"].sum(), atol=1e-12, rtol=0)
    pairs = zip(gradients(total, hidden, head), gradients(losses.sum(), hidden, head), strict=True)
    for ours, naive in pairs:
        torch.testing.assert_close(ours, naive, atol=1e-12, rtol=1e-12)


def test_padded_rows_get_no_gradient_and_no_probability():
    hidden, head = setting("bias")
    _, weight, bias = gradients(head_loss(hidden, head, imitation)[0], hidden, head)
    assert torch.count_nonzero(weight[VOCAB:]) == torch.count_nonzero(bias[VOCAB:]) == 0
    prepared = HeadDistributions(hidden.detach(), head.prepared())
    logprobs = prepared.logprobs(torch.arange(TOKENS))
    assert logprobs.shape == (TOKENS, VOCAB)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(TOKENS).double())


def test_the_logits_of_a_chunk_are_all_that_ever_exists(monkeypatch):
    hidden, head = setting("plain", chunk=4)
    seen, logits = [], LanguageHead.logits

    def spy(self, rows):
        seen.append(len(rows))
        return logits(self, rows)

    monkeypatch.setattr(LanguageHead, "logits", spy)
    head_loss(hidden, head, imitation)
    assert seen == [4, 4, 3]


def test_losses_and_their_targets_come_in_blocks_of_a_chunk(monkeypatch):
    monkeypatch.setattr(iqstar.head, "BLOCKS", 2)
    hidden, head = setting("plain", chunk=4)
    targets = random(3, TOKENS, VOCAB).log_softmax(-1)
    asked, seen = [], []

    def target(index):
        asked.append(index.tolist())
        return targets[index]

    def loss(logits, index, wanted):
        seen.append(index.tolist())
        assert torch.equal(wanted, targets[index])
        return reverse_kl(logits, wanted), {}

    total, _ = head_loss(hidden, head, loss, target)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7], [8], [9], [10]]
    naive = reverse_kl(naive_logits(hidden, head), targets).sum()
    torch.testing.assert_close(total, naive, atol=1e-12, rtol=1e-12)
    pairs = zip(gradients(total, hidden, head), gradients(naive, hidden, head), strict=True)
    for ours, full in pairs:
        torch.testing.assert_close(ours, full, atol=1e-12, rtol=1e-12)


def test_the_gradient_from_above_is_multiplied_in():
    hidden, head = setting("all")
    once = gradients(head_loss(hidden, head, imitation)[0], hidden, head)
    thrice = gradients(3 * head_loss(hidden, head, imitation)[0], hidden, head)
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)


def test_without_gradient_the_loss_is_the_same():
    hidden, head = setting("all")
    with torch.no_grad():
        total, _ = head_loss(hidden, head, imitation)
    assert not total.requires_grad
    torch.testing.assert_close(total, head_loss(hidden, head, imitation)[0].detach())


def test_a_frozen_head_passes_the_gradient_on_and_takes_none():
    """LoRA: the head is frozen, the hidden states are not."""
    hidden, head = setting("plain")
    head.weight.requires_grad_(False)
    (frozen,) = torch.autograd.grad(head_loss(hidden, head, imitation)[0], hidden)
    head.weight.requires_grad_(True)
    (free,) = torch.autograd.grad(head_loss(hidden, head, imitation)[0], hidden)
    assert torch.equal(frozen, free)


def test_a_bias_alone_can_be_trained():
    hidden, head = setting("bias")
    head.weight.requires_grad_(False)
    total = head_loss(hidden.detach(), head, imitation)[0]
    (found,) = torch.autograd.grad(total, head.bias)
    naive = imitation(naive_logits(hidden.detach(), head), torch.arange(TOKENS))[0].sum()
    torch.testing.assert_close(found, *torch.autograd.grad(naive, head.bias))


def test_a_metric_may_be_a_view_of_the_logits():
    """Their gradient takes their place only when the metrics are summed."""
    hidden, head = setting("all")
    _, metrics = head_loss(
        hidden, head, lambda z, i, _: (reverse_kl(z, z.detach() * 0), {"first": z.detach()[:, 0]})
    )
    torch.testing.assert_close(metrics["first"], naive_logits(hidden, head).detach()[:, 0].sum())


def test_no_token_makes_a_loss_of_zero():
    hidden, head = setting("bias")
    total, metrics = head_loss(hidden[:0], head, imitation)
    assert total == 0
    assert metrics["logprob"] == 0
    for grad in gradients(total, hidden, head):
        assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, generalized_jsd])
def test_a_target_from_the_same_head_leaves_exactly_no_gradient(autocast, divergence):
    """The policy's and the frozen model's logits are the same bits, so their divergence is 0."""
    hidden, head = setting("all", torch.float32, chunk=4)
    extra = (0.5,) if divergence is generalized_jsd else ()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        frozen = HeadDistributions(hidden.detach().clone(), head.prepared())
        total, _ = head_loss(
            hidden, head, lambda z, _, target: (divergence(z, target, *extra), {}), frozen.logprobs
        )
    for grad in gradients(total, hidden, head):
        assert torch.count_nonzero(grad) == 0
    assert total == 0


def test_under_autocast_products_are_bf16_and_everything_after_is_fp32():
    hidden, head = setting("all", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        prepared = head.prepared()
        logits = prepared.logits(hidden.detach())
        total, _ = head_loss(hidden, head, imitation)
    assert prepared.weight.dtype == torch.bfloat16
    assert logits.dtype == total.dtype == torch.float32
    grads = gradients(total, hidden, head)
    assert {g.dtype for g in grads} == {torch.float32}
    exact = gradients(head_loss(hidden, head, imitation)[0], hidden, head)
    for ours, wanted in zip(grads, exact, strict=True):
        assert (ours - wanted).norm() / wanted.norm() < 2e-2  # bf16 has 8 bits: 2⁻⁸ ≈ 4e-3 each


@pytest.mark.parametrize("vocab_size", [100, 8_192, 49_152, 262_144, 10**9])
def test_a_chunk_stays_inside_the_budget(vocab_size):
    rows = chunk_rows(vocab_size, BUDGET, COPIES)
    assert rows == 1 or rows * vocab_size * 4 * COPIES <= BUDGET
    assert 1 <= rows <= 512
    assert chunk_rows(vocab_size, 2 * BUDGET, COPIES) >= rows


def test_the_head_itself_knows_its_rows():
    _, head = setting("plain", chunk=3)
    assert head.rows == head.prepared().rows == 3
    assert setting("plain")[1].rows == 512
