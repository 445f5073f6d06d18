"""Under `torch.inference_mode()` a weight does what it does under `no_grad`, though PyTorch asks other operations of it."""

import pytest
import torch
import torch.nn.functional as F

import octavo
from octavo import OctavoTensor

from .models import causal

MODES = (torch.no_grad, torch.inference_mode)

FORMS = {
    "to the same type": lambda w, e, x: w.to(torch.float32),
    "to bfloat16": lambda w, e, x: w.to(torch.bfloat16),
    "float": lambda w, e, x: w.float(),
    "cpu": lambda w, e, x: w.cpu(),
    "type_as": lambda w, e, x: w.type_as(x),
    "contiguous": lambda w, e, x: w.contiguous(),
    "detach": lambda w, e, x: w.detach(),
    "data": lambda w, e, x: w.data,
    "t": lambda w, e, x: w.t(),
    "T": lambda w, e, x: w.T,
    "mT of a stack": lambda w, e, x: e.mT,
    "swapaxes": lambda w, e, x: w.swapaxes(0, 1),
    "movedim": lambda w, e, x: w.movedim(0, 1),
    "view": lambda w, e, x: w.view(16, 128),
    "flatten": lambda w, e, x: e.flatten(0, 1),
    "expert": lambda w, e, x: e[1],
    "unbind": lambda w, e, x: e.unbind()[2],
    "rows": lambda w, e, x: w[2:7],
    "narrow": lambda w, e, x: w.narrow(0, 1, 3),
    "chunk": lambda w, e, x: w.chunk(2)[1],
    "split": lambda w, e, x: w.split(5)[-1],
    "a column": lambda w, e, x: w[:, 3],
    "squeeze": lambda w, e, x: w[:1].squeeze(0),
    "unsqueeze": lambda w, e, x: w.unsqueeze(0),
    "linear": lambda w, e, x: F.linear(x, w),
    "matmul": lambda w, e, x: x @ w.T,
    "einsum": lambda w, e, x: torch.einsum("bi,oi->bo", x, w),
    "inner": lambda w, e, x: torch.inner(x, w),
    "tensordot": lambda w, e, x: torch.tensordot(x, w, dims=([1], [1])),
    "bmm": lambda w, e, x: torch.bmm(x.expand(4, 3, 128), e.transpose(1, 2)),
    "embedding": lambda w, e, x: F.embedding(torch.tensor([1, 2]), w),
    "sum": lambda w, e, x: w * 2 + 1,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_same_result_and_no_more_floats(form):
    weight = OctavoTensor.from_float(torch.randn(16, 128))
    experts = OctavoTensor.from_float(torch.randn(4, 16, 128))
    x = torch.randn(3, 128)
    found = []
    for mode in MODES:
        octavo.reset_fallbacks()
        with mode():
            result = form(weight, experts, x)
            dense = result.dequantize() if isinstance(result, OctavoTensor) else result
        found.append((type(result), dense, octavo.fallbacks()))
    (kind, expected, counted), (kind_here, dense, counted_here) = found
    assert kind_here is kind and torch.equal(dense, expected)
    assert counted_here == counted


def test_changes_in_place():
    weight = OctavoTensor.from_float(torch.randn(16, 128))
    twin = weight.clone()
    for mode, one in zip(MODES, (weight, twin), strict=True):
        with mode():
            one.mul_(0.5)
            one[3] = 0.25
            one.T[:, 5].zero_()
            one.add_(1.0)
    assert torch.equal(weight.dequantize(), twin.dequantize())


def test_made_inside_used_outside_and_the_other_way_round():
    values, x = torch.randn(16, 128), torch.randn(3, 128)
    outside = OctavoTensor.from_float(values)
    with torch.inference_mode():
        inside = OctavoTensor.from_float(values)
        rows = outside[2:7]
    assert torch.equal(F.linear(x, inside[2:7]), F.linear(x, outside[2:7]))
    assert torch.equal(F.linear(x, rows), F.linear(x, outside[2:7]))
    with torch.inference_mode():
        assert torch.equal(F.linear(x, inside.T.T), F.linear(x, outside))


@pytest.mark.usefixtures("no_fallbacks")
def test_a_model_of_experts():
    model = octavo.quantize_model(causal("mixtral", 0, vocab_size=128))
    ids = torch.randint(0, 128, (1, 12))
    logits = []
    for mode in MODES:
        with mode():
            logits.append(model(ids).logits)
            model(ids, use_cache=True)
    assert torch.equal(*logits)
