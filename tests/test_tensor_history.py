"""8-bit weights with a gradient history: gradients are those of plain weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

import octavo

from .conftest import relative_error

X = torch.linspace(-1, 1, 5 * 96).view(5, 96)
# An in-place change re-quantizes: what is computed with the weight differs by so much.
ROUNDING = 0.01


def added(weight, delta):
    weight += delta
    return weight


def assigned(weight, index, values):
    weight[index] = values
    return weight


def changed_view(view, delta, weight):
    view += delta
    return weight


INSIDE = (slice(None), slice(3, 9))
CHANGES = {
    "+=": added,
    "mul_": lambda w, d: w.mul_(1 + d),
    "mul_ by one number": lambda w, d: w.mul_(2 + d.sum()),
    "copy_": lambda w, d: w.copy_(w.detach() * 2 + d),
    "rows assigned": lambda w, d: assigned(w, slice(2, 5), 1 + d[2:5]),
    "a row assigned": lambda w, d: assigned(w, 3, 1 + d[3]),
    "columns assigned": lambda w, d: assigned(w, INSIDE, 1 + d[INSIDE]),
    "columns assigned after +=": lambda w, d: assigned(added(w, d), INSIDE, 1 + d[INSIDE]),
    "a view of rows": lambda w, d: changed_view(w[2:5], d[2:5], w),
    "the transpose": lambda w, d: changed_view(w.T, d.T, w),
}
USES = {
    "linear": lambda w, x: F.linear(x, w),
    "bias": lambda w, x: F.linear(x, w, torch.ones(24)),
    "matmul": lambda w, x: x @ w.T,
    "addmm": lambda w, x: torch.addmm(torch.ones(24), x, w.T),
    "bmm": lambda w, x: torch.bmm(x[None], w.T[None]),
    "einsum": lambda w, x: torch.einsum("tk,nk->tn", x, w),
    "embedding": lambda w, x: F.embedding(torch.tensor([1, 2]), w) @ x.T,
    "rows": lambda w, x: F.linear(x, w[3:7]),
    "blocks": lambda w, x: F.linear(x[:, :64], w[:, :64]),
    "rows by number": lambda w, x: x @ w[torch.tensor([1, 3])].T,
    "groups of rows": lambda w, x: F.linear(x, w.view(2, 12, 96)[1]),
    "a copy": lambda w, x: F.linear(x, w.clone().to(torch.float32)),
}


def gradients(weight, change, use, inputs: bool):
    """Gradients of a delta (which starts at 0) and of the input."""
    delta = torch.zeros(24, 96, requires_grad=True)
    x = X.clone().requires_grad_(inputs)
    use(change(copy.deepcopy(weight), delta), x).pow(2).sum().backward()
    return [delta.grad, x.grad] if inputs else [delta.grad]


def plain(weight):
    """`weight` without the class, whose `dequantize` a plain tensor has not."""
    return weight.dequantize()


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_by_a_trained_value(change, inputs):
    weight = octavo.OctavoTensor.from_float(torch.randn(24, 96))
    found = gradients(weight, CHANGES[change], USES["linear"], inputs)
    expected = gradients(plain(weight), CHANGES[change], USES["linear"], inputs)
    for one, other in zip(found, expected, strict=True):
        assert one is not None and relative_error(one, other) < ROUNDING


@pytest.mark.parametrize("use", USES)
def test_uses_of_a_weight_with_a_history(use):
    weight = octavo.OctavoTensor.from_float(torch.randn(24, 96))
    found = gradients(weight, added, USES[use], True)
    for one, other in zip(found, gradients(plain(weight), added, USES[use], True), strict=True):
        assert one is not None and relative_error(one, other) < ROUNDING


def test_dequantize_keeps_the_history():
    weight, delta = (
        octavo.OctavoTensor.from_float(torch.randn(24, 96)),
        torch.zeros(24, 96, requires_grad=True),
    )
    weight += delta
    dense = weight.dequantize(torch.float64)
    dense += 1  # no view: it may be changed in place
    dense.sum().backward()
    assert torch.equal(delta.grad, torch.ones(24, 96))
    assert not weight.detach().dequantize().requires_grad
    with pytest.raises(RuntimeError, match="requires grad"):
        weight.numpy()


@pytest.mark.parametrize(
    "use",
    {
        "bmm": lambda w: torch.bmm(X.expand(4, 5, 96), w.mT),
        "one expert": lambda w: F.linear(X, w[2]),
        "baddbmm": lambda w: torch.baddbmm(w, torch.ones(4, 24, 2), torch.ones(4, 2, 96), alpha=0.5)[1],
        "grouped_mm": lambda w: torch._grouped_mm(
            X.repeat(4, 1).bfloat16(), w.mT.bfloat16(), offs=torch.tensor([5, 10, 15, 20], dtype=torch.int32)
        ),
    }.values(),
)
def test_stacks_of_experts(use):
    weight = octavo.OctavoTensor.from_float(torch.randn(4, 24, 96))
    grads = []
    for each in (weight.clone(), weight.dequantize()):
        delta = torch.zeros(4, 24, 96, requires_grad=True)
        each += delta
        use(each).float().pow(2).sum().backward()
        grads.append(delta.grad)
    assert relative_error(*grads) < ROUNDING


def test_a_weight_without_one_goes_past_autograd():
    """What has no history keeps the short way, whatever was done to it without gradients."""
    weight = octavo.OctavoTensor.from_float(torch.randn(24, 96))
    with torch.no_grad():
        weight += torch.ones(24, 96, requires_grad=True)
    weight += 1.0
    octavo.reset_fallbacks()
    out = F.linear(X.clone().requires_grad_(), weight)
    assert out.requires_grad and not octavo.fallbacks()
