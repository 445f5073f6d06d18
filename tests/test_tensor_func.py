"""torch.func's transforms and other ways of taking gradients, through 8-bit weights: the numbers of plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import octavo

from .conftest import relative_error
from .models import llama_tied, move_adapters, plain_twin, quantized

ONE, X, Y, BIAS = (
    torch.linspace(-1, 1, 96),
    torch.linspace(-1, 1, 5 * 96).view(5, 96),
    torch.ones(24),
    torch.ones(24),
)


def forward_tangent(weight):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(F.linear(forward_ad.make_dual(X, X.cos()), weight)).tangent


def batched_gradients(weight):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(
        F.linear(x, weight), x, torch.eye(120).view(120, 5, 24), is_grads_batched=True
    )[0]


def loss(bias, x, weight):
    return F.linear(x, weight, bias).pow(2).sum()


CASES = {
    "vmap": lambda w: vmap(lambda x: F.linear(x, w))(X),
    "vmap, last dimension": lambda w: vmap(lambda x: F.linear(x, w), in_dims=1, out_dims=1)(X.T.contiguous()),
    "vmap, transposed": lambda w: vmap(lambda x: F.linear(x[:24], w.T))(X),
    "vmap of vmap": lambda w: vmap(vmap(lambda x: F.linear(x, w)))(X.view(5, 1, 96)),
    "vmap of biases": lambda w: vmap(lambda b: F.linear(X, w, b))(torch.eye(24)),
    "vmap of an embedding": lambda w: vmap(lambda i: F.embedding(i, w))(torch.arange(6).view(3, 2)),
    "jacrev": lambda w: jacrev(lambda x: F.linear(x, w))(ONE),
    "jacrev, bias": lambda w: jacrev(lambda b: F.linear(X, w, b))(BIAS),
    "jacrev, transposed": lambda w: jacrev(lambda y: y @ w)(Y),
    "jacfwd": lambda w: jacfwd(lambda x: F.linear(x, w))(ONE),
    "jacfwd, bias": lambda w: jacfwd(lambda b: F.linear(X, w, b))(BIAS),
    "jacfwd, transposed": lambda w: jacfwd(lambda y: y @ w)(Y),
    "hessian": lambda w: hessian(lambda x: F.linear(x, w).pow(3).sum())(ONE),
    "jvp": lambda w: jvp(lambda x: F.linear(x, w).pow(2), (X,), (X.cos(),))[1],
    "vjp": lambda w: vjp(lambda x: F.linear(x, w).pow(2), ONE)[1](Y)[0],
    "linearize": lambda w: linearize(lambda x: F.linear(x, w).pow(2), ONE)[1](ONE.cos()),
    "a gradient for each sample": lambda w: vmap(grad(lambda b, x: loss(b, x, w)), in_dims=(None, 0))(
        BIAS, X
    ),
    "forward mode": forward_tangent,
    "batched gradients": batched_gradients,
    "jacobian, vectorized": lambda w: torch.autograd.functional.jacobian(
        lambda x: F.linear(x, w), ONE, vectorize=True
    ),
    "jacobian, vectorized, forward": lambda w: torch.autograd.functional.jacobian(
        lambda x: F.linear(x, w), ONE, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_transforms(case):
    weight = octavo.OctavoTensor.from_float(torch.randn(24, 96))
    found, expected = CASES[case](weight), CASES[case](weight.dequantize())
    assert found.shape == expected.shape and relative_error(found, expected) < 1e-5


def test_a_stack_of_weights_is_mapped_over_as_well():
    weights = [octavo.OctavoTensor.from_float(torch.randn(24, 96)) for _ in range(5)]
    parts = [
        torch.stack([getattr(weight, name) for weight in weights]) for name in ("qdata", "absmax", "code")
    ]
    found = vmap(lambda x, *parts: octavo.ops.linear(x, *parts, 64))(X, *parts)
    expected = torch.stack([F.linear(x, weight.dequantize()) for x, weight in zip(X, weights, strict=True)])
    assert relative_error(found, expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_each_sample_for_the_adapters_of_a_model():
    peft = pytest.importorskip("peft")
    ids = torch.arange(24).view(3, 8)
    results = []
    model = quantized(llama_tied)
    for each in (model, plain_twin(model)):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        each = peft.get_peft_model(each, config)
        move_adapters(each)
        each.eval()
        each.config._attn_implementation = "eager"
        adapters = {name: p.detach() for name, p in each.named_parameters() if p.requires_grad}

        def sample_loss(adapters, ids, each=each):
            logits = functional_call(each, adapters, (ids[None],), {"use_cache": False}).logits
            return F.cross_entropy(logits[0, :-1], ids[1:])

        results.append(vmap(grad(sample_loss), in_dims=(None, 0))(adapters, ids))
    found, expected = results
    assert found.keys() == expected.keys() and len(found) > 8
    for name in found:
        assert found[name].shape[0] == 3 and relative_error(found[name], expected[name]) < 1e-5, name
