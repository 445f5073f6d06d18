"""torch.compile over modules that hold 8-bit weights."""

import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn

import octavo
from octavo import OctavoTensor

from .conftest import relative_error


class Small(nn.Module):
    """An embedding, a feed-forward layer, a Conv1D-like product and a tied head, with a trainable adapter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Parameter(torch.randn(128, 64) * 0.1)
        self.norm = nn.LayerNorm(64)
        self.adapter = nn.Parameter(torch.randn(64, 64) * 0.1)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + torch.addmm(x.new_zeros(64), F.gelu(self.up(x)).flatten(0, 1), self.down).view(x.shape)
        x = self.norm(x) + F.linear(x, self.adapter)
        return self.head(x)


def small(device) -> nn.Module:
    model = Small().to(device)
    octavo.quantize_model(model, octavo.OctavoConfig(skip=["adapter"]))
    assert isinstance(model.down, OctavoTensor) and isinstance(model.head.weight, OctavoTensor)
    for parameter in model.parameters():
        if not isinstance(parameter, OctavoTensor):
            parameter.requires_grad = True
    return model


def has_compiler(device) -> bool:
    return device.type == "cuda" or shutil.which("g++") is not None or shutil.which("clang++") is not None


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_in_one_graph(backend, device):
    if backend == "inductor" and not has_compiler(device):
        pytest.skip("inductor needs a C++ compiler, and there is none")
    model = small(device)
    ids = torch.randint(0, 96, (2, 7), device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = model(ids)
    expected.square().mean().backward()
    gradient = model.adapter.grad.clone()
    model.zero_grad()
    found = compiled(ids)
    found.square().mean().backward()
    assert relative_error(found, expected) < 1e-5
    assert relative_error(model.adapter.grad, gradient) < 1e-4
    with torch.no_grad():
        assert relative_error(compiled(ids), model(ids)) < 1e-5


def test_a_change_of_the_weight_is_seen_by_the_compiled_model(device):
    layer = nn.Linear(64, 128, bias=False, device=device)
    octavo.quantize_model(layer, octavo.OctavoConfig())
    x = torch.randn(3, 64, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), layer(x)) < 1e-6
    before = layer(x)
    layer.weight.data *= 2
    assert relative_error(compiled(x), 2 * before) < 0.02
    # torch 2.10 swaps no parameter that a compiled graph watches.
    if Version(torch.__version__).release[:2] > (2, 10):
        layer.to(torch.bfloat16)
        assert compiled(x.bfloat16()).dtype == torch.bfloat16


def test_several_lengths_with_dynamic_shapes(device):
    model = small(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (3, 5, 17):
        ids = torch.randint(0, 96, (2, length), device=device)
        assert relative_error(compiled(ids), model(ids)) < 1e-5


def test_experts_one_by_one(device):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 64, 128))

        def forward(self, x):
            gate, up = torch.bmm(x, self.weight).chunk(2, -1)
            return gate * up + x @ self.weight[1][:, :64]

    model = octavo.quantize_model(Experts().to(device), octavo.OctavoConfig())
    x = torch.randn(3, 5, 64, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), expected) < 1e-5


def test_export(device):
    layer = octavo.quantize_model(nn.Sequential(nn.Linear(64, 128)).to(device), octavo.OctavoConfig())
    x = torch.randn(3, 64, device=device)
    exported = torch.export.export(layer, (x,))
    assert any("octavo.linear" in str(node.target) for node in exported.graph.nodes)
    assert relative_error(exported.module()(x), layer(x)) < 1e-5


def test_the_key_of_a_compiled_graph_is_the_layout_and_not_the_values():
    weight = torch.randn(16, 128)
    same = OctavoTensor.from_float(weight), OctavoTensor.from_float(weight * 3)
    others = [
        OctavoTensor.from_float(weight, octavo.OctavoConfig(block_size=32)),
        OctavoTensor.from_float(weight, dtype=torch.bfloat16),
        OctavoTensor.from_float(weight.t().contiguous(), transposed=True),
        OctavoTensor.from_float(torch.randn(16, 192)),
    ]
    assert len({each._stable_hash_for_caching() for each in same}) == 1
    assert len({each._stable_hash_for_caching() for each in (same[0], *others)}) == 1 + len(others)
