"""A stack of 8-bit matrices plus a low-rank change: products in parts equal products with the sum, gradients too."""

import pytest
import torch
import torch.nn.functional as F

import octavo
from octavo.tensor import Adapted

from .conftest import relative_error

E, N, K, R = 4, 24, 100, 3


def parts(device, **options):
    weight = octavo.OctavoTensor.from_float(torch.randn(E, N, K, device=device), **options)
    left = torch.randn(E, N, R, device=device, requires_grad=True)
    right = torch.randn(E, R, K, device=device, requires_grad=True)
    return weight, left, right


def grouped(x, stack):
    return F.grouped_mm(
        x, stack.transpose(-2, -1), offs=torch.tensor([2, 2, 5, 7], dtype=torch.int32, device=x.device)
    )


FORMS = {
    "one expert": (lambda x, s: F.linear(x, s[2]), (7, K)),
    "one expert by a tensor": (lambda x, s: F.linear(x, s[torch.tensor(2, device=x.device)]), (7, K)),
    "its transpose": (lambda x, s: x @ s[1].T, (2, 7, K)),
    "matrix first": (lambda x, s: s[1] @ x.T, (7, K)),
    "with a bias": (lambda x, s: F.linear(x, s[2], torch.ones(N, device=x.device)), (7, K)),
    "bmm": (lambda x, s: torch.bmm(x, s.transpose(1, 2)), (E, 5, K)),
    "stack first": (lambda x, s: torch.bmm(s, x.mT), (E, 5, K)),
    "picked": (lambda x, s: torch.bmm(s[torch.tensor([3, 0, 3], device=x.device)], x.mT), (3, 5, K)),
    "grouped": (grouped, (7, K)),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_products_in_parts(form, transposed, no_fallbacks, device):
    function, shape = form
    weight, left, right = parts(device, transposed=transposed)
    x = torch.randn(shape, device=device, requires_grad=True)
    stack = torch.baddbmm(weight, left, right, alpha=0.5)
    assert type(stack) is Adapted and stack.shape == weight.shape and stack.dtype == weight.dtype
    found = function(x, stack)
    expected = function(x, torch.baddbmm(weight.dequantize(), left, right, alpha=0.5))
    assert relative_error(found, expected) < 1e-5
    grad = torch.randn_like(expected)
    inputs = (x, left, right)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert relative_error(one, other) < 1e-5


def test_rows_after_the_last_group_are_zeros(device):
    weight, left, right = parts(device)
    x = torch.randn(9, K, device=device)
    assert grouped(x, torch.baddbmm(weight, left, right))[7:].abs().max() == 0


def test_anything_else_is_done_with_the_sum(device):
    weight, left, right = parts(device)
    total = torch.baddbmm(weight.dequantize(), left, right, alpha=2)
    octavo.reset_fallbacks()
    stack = torch.baddbmm(weight, left, right, alpha=2)
    assert stack.shape == (E, N, K) and len(stack) == E and octavo.fallbacks() == {}
    for function in (
        torch.clone,
        lambda s: s * 2,
        lambda s: s[:, 3:9],
        lambda s: s.sum(0),
        lambda s: s.reshape(-1, K),
    ):
        found = function(stack)
        assert type(found) is torch.Tensor and relative_error(found, function(total)) < 1e-5
    assert octavo.fallbacks() == {"aten.baddbmm.default": 5}
    (gradient,) = torch.autograd.grad((stack * 2).sum(), left)
    assert relative_error(gradient, torch.autograd.grad((total * 2).sum(), left)[0]) < 1e-5
    octavo.reset_fallbacks()


def test_an_adapter_changed_since_is_an_error(device):
    weight, left, right = parts(device)
    stack = torch.baddbmm(weight, left, right)
    with torch.no_grad():
        left += 1
    with pytest.raises(RuntimeError, match="inplace"):
        F.linear(torch.randn(2, K, device=device), stack[0])


def test_other_sums_are_as_before(device):
    weight, left, right = parts(device)
    dense = weight.dequantize()
    assert (
        relative_error(torch.baddbmm(weight, left, right, beta=2), torch.baddbmm(dense, left, right, beta=2))
        < 1e-5
    )
    octavo.reset_fallbacks()
