"""Products with an OctavoTensor, in every form in which modules write them, against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import octavo

from .conftest import relative_error
from .models.weights import make

pytestmark = pytest.mark.usefixtures("no_fallbacks")


def close(found, expected, tolerance=1e-5) -> None:
    assert type(found) is torch.Tensor and found.shape == expected.shape and found.dtype == expected.dtype
    assert relative_error(found, expected) <= tolerance or not expected.numel()


K, N = 100, 24
MATRIX = {
    "F.linear": (lambda x, w, b: F.linear(x, w, b), (N, K), (3, K)),
    "F.linear, 3-D": (lambda x, w, b: F.linear(x, w, b), (N, K), (2, 3, K)),
    "F.linear, one token": (lambda x, w, b: F.linear(x, w, b), (N, K), (K,)),
    "F.linear, no token": (lambda x, w, b: F.linear(x, w, b), (N, K), (0, K)),
    "F.linear by name": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), (N, K), (3, K)),
    "F.linear, no bias": (lambda x, w, b: F.linear(x, w), (N, K), (3, K)),
    "x @ w.T": (lambda x, w, b: x @ w.T, (N, K), (2, 3, K)),
    "x @ w": (lambda x, w, b: x @ w, (K, N), (2, 3, K)),
    "x @ w, one token": (lambda x, w, b: x @ w, (K, N), (K,)),
    "matmul": (lambda x, w, b: torch.matmul(x, w), (K, N), (3, K)),
    "matmul by name": (lambda x, w, b: torch.matmul(input=x, other=w), (K, N), (3, K)),
    "Tensor.matmul": (lambda x, w, b: x.matmul(w), (K, N), (3, K)),
    "mm": (lambda x, w, b: torch.mm(x, w), (K, N), (3, K)),
    "mm by name": (lambda x, w, b: torch.mm(x, mat2=w), (K, N), (3, K)),
    "Tensor.mm": (lambda x, w, b: x.mm(w.t()), (N, K), (3, K)),
    "w @ y": (lambda x, w, b: w @ x.T, (N, K), (3, K)),
    "w @ v": (lambda x, w, b: w @ x, (N, K), (K,)),
    "w.T @ v": (lambda x, w, b: w.T @ x, (K, N), (K,)),
    "mv": (lambda x, w, b: torch.mv(w, x), (N, K), (K,)),
    "addmm (Conv1D)": (lambda x, w, b: torch.addmm(b, x, w), (K, N), (3, K)),
    "addmm by name": (lambda x, w, b: torch.addmm(b, mat1=x, mat2=w), (K, N), (3, K)),
    "addmm, full bias": (lambda x, w, b: torch.addmm(b.expand(3, N).clone(), x, w), (K, N), (3, K)),
    "addmm of a transpose": (lambda x, w, b: torch.addmm(b, x, w.T), (N, K), (3, K)),
    "rows": (lambda x, w, b: F.linear(x, w[4:9]), (N, K), (3, K)),
    "columns in blocks": (lambda x, w, b: F.linear(x[..., 64:], w[:, 64:]), (N, K), (3, K)),
    "chunks": (lambda x, w, b: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1), (N, K), (3, K)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_transposed", [False, True])
@pytest.mark.parametrize("form", MATRIX.values(), ids=MATRIX)
def test_matrix(form, stored_transposed, dtype, device):
    function, shape, x_shape = form
    if stored_transposed and function in (
        MATRIX["columns in blocks"][0],
        MATRIX["rows"][0],
        MATRIX["chunks"][0],
    ):
        pytest.skip("such cuts are inside stored rows: test_tensor.py has them")
    weight = make(*shape, device=device, transposed=stored_transposed).to(dtype)
    x = torch.randn(x_shape, device=device).to(dtype).requires_grad_()
    bias = torch.randn(N, device=device).to(dtype).requires_grad_()
    found = function(x, weight, bias)
    expected = function(x, weight.dequantize(), bias)
    close(found, expected, 1e-5 if dtype == torch.float32 else 1e-2)
    grad = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, (x, bias), grad, allow_unused=True),
        torch.autograd.grad(expected, (x, bias), grad, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other, 1e-5 if dtype == torch.float32 else 2e-2)


E = 4
STACK = {
    "bmm": (lambda x, w: torch.bmm(x, w), (E, K, N), (E, 5, K)),
    "bmm by name": (lambda x, w: torch.bmm(x, mat2=w), (E, K, N), (E, 5, K)),
    "matmul": (lambda x, w: x @ w, (E, K, N), (E, 5, K)),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.ones(E, 5, N).to(x), x, w), (E, K, N), (E, 5, K)),
    "transposed": (lambda x, w: torch.bmm(x, w.transpose(1, 2)), (E, N, K), (E, 5, K)),
    "stack first": (lambda x, w: torch.bmm(w, x.transpose(1, 2)), (E, N, K), (E, 5, K)),
    "stack first, matmul": (lambda x, w: w @ x[:, 0, :, None], (E, N, K), (E, 5, K)),
    "one expert": (lambda x, w: F.linear(x[0], w[2]), (E, N, K), (1, 5, K)),
    "experts picked": (
        lambda x, w: torch.bmm(x, w[torch.tensor([3, 0, 3, 1], device=x.device)]),
        (E, K, N),
        (E, 5, K),
    ),
    "halves of an expert": (
        lambda x, w: torch.cat([F.linear(x[0], half) for half in w[1].chunk(2)], -1),
        (E, N, K),
        (1, 5, K),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored_transposed", [False, True])
@pytest.mark.parametrize("form", STACK.values(), ids=STACK)
def test_stack(form, stored_transposed, dtype, device):
    function, shape, x_shape = form
    if stored_transposed and "chunk" in function.__code__.co_names:
        pytest.skip("such cuts are inside stored rows")
    weight = make(*shape, device=device, transposed=stored_transposed).to(dtype)
    x = torch.randn(x_shape, device=device).to(dtype).requires_grad_()
    found, expected = function(x, weight), function(x, weight.dequantize())
    close(found, expected, 1e-5 if dtype == torch.float32 else 1e-2)
    grad = torch.randn_like(expected)
    close(
        torch.autograd.grad(found, x, grad)[0],
        torch.autograd.grad(expected, x, grad)[0],
        1e-5 if dtype == torch.float32 else 2e-2,
    )


@pytest.mark.parametrize("ends", [[2, 2, 7, 9], [0, 0, 0, 0], [9, 9, 9, 9], [1, 2, 3, 5]])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm(ends, transposed, device):
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm
    weight = make(E, 64, 32, device=device).to(torch.bfloat16)
    weight = weight if transposed else weight.mT
    x = torch.randn(9, weight.shape[1], device=device).bfloat16().requires_grad_()
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    found = grouped(x, weight, offs=offs)
    dense, start, expected = weight.dequantize(), 0, []
    for expert, stop in enumerate(ends):
        expected.append(x[start:stop] @ dense[expert])
        start = stop
    expected = torch.cat([*expected, x.new_zeros(9 - start, weight.shape[-1])])
    close(found, expected, 1e-2)
    if ends[-1] == 9:
        close(found, grouped(x, dense.contiguous(), offs=offs), 1e-2)
    grad = torch.randn_like(expected)
    if expected.requires_grad and found.requires_grad:
        close(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], 2e-2)


def test_embedding(device):
    weight = make(11, 70, device=device)
    ids = torch.randint(0, 11, (2, 3), device=device)
    dense = weight.dequantize()
    for found in (
        F.embedding(ids, weight),
        F.embedding(ids, weight, 0),
        F.embedding(input=ids, weight=weight, padding_idx=3, sparse=True, scale_grad_by_freq=True),
    ):
        assert torch.equal(found, F.embedding(ids, dense))
    module = nn.Embedding(11, 70, padding_idx=2, device=device)
    module.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    assert torch.equal(module(ids.int()), F.embedding(ids, dense.bfloat16()))
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([11]), make(11, 70))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["F.linear", "addmm (Conv1D)", "x @ w.T", "mm", "mv"])
def test_autocast_is_that_of_a_plain_weight(form, dtype, device):
    function, shape, x_shape = MATRIX[form]
    weight = make(*shape, device=device)
    dense = weight.dequantize()
    x, bias = torch.randn(x_shape, device=device), torch.randn(N, device=device)
    with torch.autocast(device.type, dtype):
        found, expected = function(x, weight, bias), function(x, dense, bias)
        with torch.autocast(device.type, enabled=False):
            assert function(x, weight, bias).dtype == torch.float32
    close(found, expected, 2e-2)


def test_stack_under_autocast(device):
    weight, x = make(E, K, N, device=device), torch.randn(E, 5, K, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        close(torch.bmm(x, weight), torch.bmm(x, weight.dequantize()), 1e-2)


def test_einsum(device):
    weight = make(N, K, device=device)
    x = torch.randn(2, 3, K, device=device, requires_grad=True)
    close(torch.einsum("btk,nk->btn", x, weight), torch.einsum("btk,nk->btn", x, weight.dequantize()))
    octavo.reset_fallbacks()  # einsum may shape the weight first


def test_products_that_have_no_path_are_computed_all_the_same(device):
    weight, x = make(N, K, device=device), torch.randn(3, K, device=device)
    dense = weight.dequantize()
    out = torch.empty(3, N, device=device)
    torch.mm(x, weight.T, out=out)
    close(out, x @ dense.T)
    close(F.linear(x.double(), weight.double()), F.linear(x.double(), dense.double()))
    close(weight @ weight.T, dense @ dense.T)
    close(torch.addmm(x, x[:, :3], dense[:3], beta=2, alpha=3), 2 * x + 3 * x[:, :3] @ dense[:3])
    close(torch.addmm(out, x, weight.T, beta=2, alpha=3), torch.addmm(out, x, dense.T, beta=2, alpha=3))
    stack = make(E, K, N, device=device)
    close(torch.matmul(x, stack), torch.matmul(x, stack.dequantize()))
    octavo.reset_fallbacks()


def test_wrong_shapes_are_errors(device):
    weight = make(N, K, device=device)
    for call in (
        lambda: F.linear(torch.randn(3, K + 1, device=device), weight),
        lambda: torch.randn(3, N + 1, device=device) @ weight,
        lambda: F.linear(torch.randn(3, K, device=device), weight, torch.zeros(N + 1, device=device)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()


def test_a_whole_layer_saves_nothing_but_8_bits_for_backward(device):
    layer = nn.Linear(512, 512, device=device)
    layer.weight = nn.Parameter(make(512, 512, device=device), requires_grad=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 512, device=device, requires_grad=True))
    assert sum(t.numel() for t in saved if t.dtype == torch.float32) < 2000


def test_float64_inputs_of_a_float32_weight_are_exact(device):
    weight = make(N, K, device=device).double()
    x = torch.randn(3, K, device=device, dtype=torch.float64)
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.dequantize()))
    octavo.reset_fallbacks()
