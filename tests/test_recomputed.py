"""Linear layers that compute their input again, and share its cast."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from iqstar.recomputed import Recipe, cast_once, follows_from, linear


class Doubled:
    """Twice a tensor, counted."""

    def __init__(self):
        self.times = 0

    def __call__(self, source):
        self.times += 1
        return 2 * source


def layers(count=2, **options):
    """Linear layers 4 → 3 with a bias."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(4, 3, **options) for _ in range(count))


def gradients(read, modules, source):
    """Gradients of a weighted sum of what two layers make of a tensor."""
    (read(modules[0], source) + read(modules[1], source).cos()).sum().backward()
    return [p.grad for p in modules.parameters()]


def kept_by(compute):
    """Tensors that autograd keeps of a computation, and its result."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = compute()
    return kept, result


def cast_of(x):
    """The cast that a tensor has."""
    with torch.autocast("cpu", torch.bfloat16):
        return cast_once(x)


@pytest.mark.parametrize("bias", [True, False])
def test_gradient_of_a_linear_layer(bias):
    layer = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    trained = [x, *layer.parameters()]

    def product(x, weight, *rest):
        copy = nn.Linear(4, 3, bias=bias, device="meta")
        del copy.weight
        copy.weight = weight
        if rest:
            del copy.bias
            copy.bias = rest[0]
        return linear(copy, x)

    assert torch.equal(linear(layer, x), layer(x))
    assert torch.autograd.gradcheck(product, trained)


def test_an_input_with_a_recipe_is_not_kept_and_computed_once():
    modules, compute = layers(), Doubled()
    source = torch.randn(5, 4, requires_grad=True)
    seen = []

    def loss_of_both():
        doubled = follows_from(source * 2, compute, source)
        seen.append(weakref.ref(doubled))
        return sum(linear(m, doubled).square().sum() for m in modules)

    kept, loss = kept_by(loss_of_both)
    assert not any(t.shape == (5, 4) and t is not source for t in kept)
    assert seen[0]() is None
    loss.backward()
    assert compute.times == 1
    ours = [source.grad, *(p.grad for p in modules.parameters())]
    source.grad = None
    modules.zero_grad()
    sum(m(source * 2).square().sum() for m in modules).backward()
    for mine, plain in zip(
        ours, [source.grad, *(p.grad for p in modules.parameters())], strict=True
    ):
        torch.testing.assert_close(mine, plain)


def test_the_last_reader_lets_it_go():
    recipe, source = Recipe(Doubled()), torch.ones(3)
    recipe.expect_reader()
    recipe.expect_reader()
    first = weakref.ref(recipe.make((source,), torch.float32))
    assert first() is not None  # the second one will read it
    assert torch.equal(recipe.make((source,), torch.float32), 2 * source)
    assert first() is None


def test_another_backward_pass_of_the_same_graph():
    (layer,), source = layers(1), torch.randn(5, 4, requires_grad=True)
    loss = linear(layer, follows_from(source * 2, Doubled(), source)).square().sum()
    once = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    assert torch.equal(once[0], torch.autograd.grad(loss, layer.weight)[0])


def test_a_checkpointed_layer_keeps_its_input_alone():
    (layer,), source = layers(1), torch.randn(5, 4, requires_grad=True)
    held = []

    def block(x):
        middle = x.exp()
        held.append(weakref.ref(middle))
        return linear(layer, follows_from(middle * 2, Doubled(), middle)).square()

    output = checkpoint(block, source, use_reentrant=False)
    assert held[0]() is None
    output.sum().backward()
    grad = layer.weight.grad
    layer.weight.grad = None
    block(source).sum().backward()
    assert torch.equal(grad, layer.weight.grad)


def test_an_input_that_was_changed_in_place_is_kept():
    (layer,), source = layers(1), torch.randn(5, 4)
    weight = layer.weight.detach().clone().requires_grad_()
    changed = follows_from(source.requires_grad_() * 2, Doubled(), source)
    changed.mul_(3)
    linear(layer, changed).sum().backward()
    nn.functional.linear(6 * source, weight).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)


class SameInAView(torch.autograd.Function):
    """Returns what it was given, as FSDP does with what a layer reads."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_view_of_all_of_it_has_the_recipe_and_a_part_has_none():
    (layer,), compute = layers(1), Doubled()
    source = torch.randn(5, 4, requires_grad=True)
    whole, part = (follows_from(source * 2, compute, source) for _ in range(2))
    linear(layer, SameInAView.apply(whole)).sum().backward()
    assert compute.times == 1
    expected = (2 * source).sum(0).expand(3, 4)
    torch.testing.assert_close(layer.weight.grad, expected)
    layer.weight.grad = None
    linear(layer, part[:2]).sum().backward()
    assert compute.times == 1
    torch.testing.assert_close(layer.weight.grad, (2 * source)[:2].sum(0).expand(3, 4))


def test_a_frozen_weight_needs_no_input():
    (layer,), compute = layers(1), Doubled()
    layer.weight.requires_grad_(False)
    source = torch.randn(5, 4, requires_grad=True)
    linear(layer, follows_from(source * 2, compute, source)).sum().backward()
    assert compute.times == 0
    torch.testing.assert_close(source.grad, 2 * layer.weight.sum(0).expand(5, 4))
    assert layer.bias.grad.tolist() == [5, 5, 5]


class TestSharedCast:
    """Linear layers that read one tensor under autocast."""

    @pytest.mark.parametrize("gradient", [True, False])
    def test_two_layers_read_one_cast(self, gradient):
        modules, x = layers(), torch.randn(5, 4, requires_grad=gradient)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradient):
            kept, outputs = kept_by(lambda: [linear(m, x) for m in modules])
        assert all(o.dtype == torch.bfloat16 and o.requires_grad == gradient for o in outputs)
        cast = cast_of(x)
        assert cast.dtype == torch.bfloat16
        assert x.iqstar_cast[1] is cast  # made by the first layer, read by both
        casts = {t.data_ptr() for t in kept if t.shape == x.shape}
        assert casts == ({cast.data_ptr()} if gradient else set())

    def test_the_weight_is_kept_not_its_cast(self):
        (layer,), x = layers(1), torch.randn(5, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            kept, _ = kept_by(lambda: linear(layer, x))
        assert [t.dtype for t in kept if t.shape == layer.weight.shape] == [torch.float32]

    def test_a_cast_without_gradient_is_not_taken_for_one_with(self):
        modules, x = layers(), torch.randn(3, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                linear(modules[0], x)
            linear(modules[1], x).sum().backward()
        assert x.grad is not None

    def test_another_tensor_is_cast_anew(self):
        (layer,) = layers(1)
        with torch.autocast("cpu", torch.bfloat16):
            linear(layer, torch.zeros(1, 4))
            assert torch.equal(cast_once(torch.ones(1, 4)), torch.ones(1, 4, dtype=torch.bfloat16))

    def test_nothing_is_cast_outside_of_autocast_nor_in_float64(self):
        x = torch.randn(3, 4)
        assert cast_once(x) is x
        with torch.autocast("cpu", torch.bfloat16):
            assert cast_once(wide := x.double()) is wide

    def test_gradients_add_up_in_float32(self):
        modules, x = layers(), torch.randn(3, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning's is
            mine = gradients(linear, modules, x)
        mine = [x.grad, *mine]
        x.grad = None
        modules.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            plain = gradients(lambda m, x: nn.functional.linear(x, m.weight, m.bias), modules, x)
        for ours, theirs in zip(mine, [x.grad, *plain], strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_inputs_of_every_dtype(self, dtype):
        (layer,) = layers(1, dtype=dtype)
        x = torch.randn(5, 4, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            linear(layer, x).sum().backward()
        assert (x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype)
        torch.testing.assert_close(
            layer.weight.grad.float(), x.float().sum(0).expand(3, 4), atol=0.05, rtol=0.05
        )

    def test_an_input_with_a_recipe_is_computed_once_and_cast(self):
        modules, compute = layers(), Doubled()
        source = torch.randn(5, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            doubled = follows_from(source * 2, compute, source)
            loss = sum(linear(m, doubled).float().sum() for m in modules)
        loss.backward()
        assert compute.times == 1
        wanted = (2 * source).to(torch.bfloat16).float().sum(0).expand(3, 4)
        torch.testing.assert_close(modules[0].weight.grad, wanted, atol=0.02, rtol=0.02)

    def test_under_inference_mode(self):
        (layer,) = layers(1)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert linear(layer, torch.randn(5, 4)).dtype == torch.bfloat16

    def test_the_cast_goes_with_the_tensor(self):
        x = torch.randn(3, 4, requires_grad=True) * 2
        with torch.autocast("cpu", torch.bfloat16):
            gone = weakref.ref(cast_once(x))
        assert gone() is not None
        del x
        assert gone() is None
