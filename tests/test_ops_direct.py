"""Products past the dispatcher: taken where they may be, with the same values and gradients."""

import pytest
import torch
import torch.nn.functional as F

import octavo
from octavo import ops
from octavo.ops import direct

from .conftest import relative_error


@pytest.fixture
def weight(device):
    return octavo.OctavoTensor.from_float(torch.randn(24, 96, device=device))


@pytest.fixture
def taken(monkeypatch):
    """Names of the products that went straight to a kernel."""
    names = []
    for name in ("_linear", "_transposed"):
        own = getattr(direct, name)
        monkeypatch.setattr(direct, name, lambda *a, name=name, own=own: (names.append(name), own(*a))[1])
    return names


native = pytest.mark.skipif(
    not (ops.cpu.AVAILABLE or torch.cuda.is_available()),
    reason="without native kernels there is one way only",
)


@native
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_values_and_gradients_are_those_of_a_plain_layer(tokens, with_bias, weight, taken, device):
    dense = weight.dequantize()
    x = torch.randn(2, tokens, 96, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True) if with_bias else None
    inputs = (x, bias) if with_bias else (x,)
    out, expected = F.linear(x, weight, bias), F.linear(x, dense, bias)
    assert taken == ["_linear"] and type(out.grad_fn).__name__ == "_LinearBackward"
    assert relative_error(out, expected) < 1e-5
    grad = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert one.dtype == other.dtype and one.shape == other.shape and relative_error(one, other) < 1e-5


@native
def test_the_other_way_round(weight, taken, device):
    x = torch.randn(3, 24, device=device, requires_grad=True)
    out, expected = x @ weight, x @ weight.dequantize()
    assert taken == ["_transposed"]
    assert relative_error(out, expected) < 1e-5
    grad = torch.randn_like(out)
    (one,), (other,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(expected, x, grad)
    assert relative_error(one, other) < 1e-5


@native
def test_only_gradients_that_are_asked_for(weight, device, monkeypatch):
    bias = torch.zeros(24, device=device, requires_grad=True)
    out = F.linear(torch.randn(3, 96, device=device), weight, bias)
    monkeypatch.setattr(direct, "_transposed", None)  # calling it would be a TypeError
    out.sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 3.0))
    with torch.no_grad():
        assert F.linear(torch.randn(3, 96, device=device, requires_grad=True), weight).grad_fn is None


@pytest.mark.parametrize("product", [lambda x, w: F.linear(x, w), lambda x, w: F.linear(x, w) @ w])
def test_gradients_of_gradients(product, weight, device):
    def penalty(w):
        x = torch.linspace(-1, 1, 3 * 96, device=device).view(3, 96).requires_grad_()
        (grad,) = torch.autograd.grad(product(x, w).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    assert relative_error(penalty(weight), penalty(weight.dequantize())) < 1e-4


@pytest.mark.parametrize("way", ["compiled", "vmapped", "fake"])
def test_what_is_traced_or_transformed_goes_through_the_dispatcher(way, weight, taken, device):
    x = torch.randn(5, 2, 96, device=device)
    layer = torch.nn.Linear(96, 24, device=device)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    expected = layer(x)
    taken.clear()
    if way == "compiled":
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    elif way == "vmapped":
        parts = (weight.qdata, weight.absmax, weight.code)
        assert not torch.func.vmap(
            lambda one: torch.tensor(direct._straight(one, parts[0], None, 96)).expand(1)
        )(x).any()
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            assert not direct._straight(x, weight.qdata, None, 96)
    assert not taken


def test_wrong_shapes_and_types_are_left_to_the_checks(weight, device):
    for x in (torch.randn(2, 95, device=device), torch.tensor(1.0, device=device)):
        assert not direct._straight(x, weight.qdata, None, 96)
        with pytest.raises(ValueError, match="last dimension of the input"):
            F.linear(x, weight)
    with pytest.raises(ValueError, match="shape of bias"):
        F.linear(torch.randn(2, 96, device=device), weight, torch.zeros(23, device=device))


@pytest.mark.parametrize("tokens", [1, 8, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_may_be_changed_in_place_while_training(tokens, dtype, device):
    """Whatever kernel a number of tokens is given to."""
    weight = octavo.OctavoTensor.from_float(torch.randn(200, 96, device=device)).to(dtype)
    for product in (
        lambda x: F.linear(x, weight),
        lambda x: x @ weight.T,
        lambda x: x[..., :1].expand(-1, 200) @ weight,
    ):
        x = torch.randn(tokens, 96, device=device, dtype=dtype, requires_grad=True)
        out = product(x)
        out += 1
        out.mul_(2)
        out.sum().backward()
        assert x.grad is not None
