"""Gradients of the products: those of a plain float layer, from quantized tensors alone."""

import pytest
import torch
import torch.nn.functional as F

from octavo import ops
from octavo.ops import reference

from .conftest import packed, relative_error

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_gradients_are_those_of_a_plain_linear(lead, dtype, device):
    parts = packed(24, 100, 64, device)
    dense = ops.dequantize(*parts, dtype)
    x = torch.randn(*lead, 100, device=device).to(dtype).requires_grad_()
    bias = torch.randn(24, device=device).to(dtype).requires_grad_()
    grad = torch.randn(*lead, 24, device=device).to(dtype)
    found = torch.autograd.grad(ops.linear(x, *parts, bias), (x, bias), grad)
    expected = torch.autograd.grad(F.linear(x, dense, bias), (x, bias), grad)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert relative_error(one, other) < (1e-6 if dtype == torch.float32 else 2e-2)


def test_gradient_of_a_bias_in_another_type(device):
    parts = packed(24, 64, 64, device)
    bias = torch.zeros(24, device=device, requires_grad=True)
    ops.linear(torch.randn(3, 64, device=device).bfloat16(), *parts, bias).sum().backward()
    assert bias.grad.dtype == torch.float32 and torch.equal(bias.grad, torch.full_like(bias, 3.0))


def test_double_backward(device):
    parts = packed(24, 64, 32, device)
    dense = ops.dequantize(*parts)

    def penalty(product):
        x = torch.linspace(-1, 1, 3 * 64, device=device).view(3, 64).requires_grad_()
        (grad,) = torch.autograd.grad(product(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    found = penalty(lambda x: ops.linear(x, *parts))
    torch.testing.assert_close(found, penalty(lambda x: F.linear(x, dense)), rtol=1e-4, atol=1e-2)
    found = penalty(lambda x: ops.linear_transposed(ops.linear(x, *parts), *parts))
    torch.testing.assert_close(found, penalty(lambda x: x @ dense.T @ dense), rtol=1e-4, atol=100)


def test_no_gradient_is_computed_that_is_not_asked_for(device, monkeypatch):
    parts = packed(24, 64, 32, device)
    bias = torch.zeros(24, device=device, requires_grad=True)
    out = ops.linear(torch.randn(3, 64, device=device), *parts, bias)
    monkeypatch.setattr(torch.ops.octavo, "linear_transposed", None)  # calling it would be a TypeError
    out.sum().backward()
    assert bias.grad is not None


def test_backward_saves_only_the_quantized_tensors(device):
    qdata, absmax, code, block_size = packed(256, 512, 64, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(4, 512, device=device, requires_grad=True)
        ops.linear(x, qdata, absmax, code, block_size, None)
    assert {t.data_ptr() for t in saved} == {qdata.data_ptr(), absmax.data_ptr(), code.data_ptr()}


def test_no_full_float_copy_is_held(monkeypatch):
    """With small panels, the largest allocation of forward and backward is far below the float weight."""
    parts = packed(1024, 1024, 64)
    monkeypatch.setattr(reference, "PANEL_WEIGHTS", 8 * 1024)
    x = torch.randn(2, 1024, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.linear(x, *parts).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 1024 * 1024 * 4 / 8
