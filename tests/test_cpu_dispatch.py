"""Which CPU kernels are chosen and said to be, and that the registered operations reach them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from octavo import codebook, ops
from octavo.ops import cpu, reference

native = pytest.mark.skipif(not cpu.AVAILABLE, reason=f"no native kernels: {cpu.status()['reason']}")


def run_with(isa: str, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, cpu.ISA_VARIABLE: isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


REPORT = "import json; from octavo.ops import cpu; print(json.dumps(cpu.status()))"


@native
@pytest.mark.parametrize("isa", cpu.status()["supported"])
def test_the_environment_chooses_the_kernels(isa):
    done = run_with(isa, REPORT)
    status = json.loads(done.stdout.splitlines()[-1])
    assert status["active"] == isa and cpu.ISA_VARIABLE in status["reason"]


def test_none_leaves_the_reference_in_charge():
    done = run_with(
        "none",
        REPORT + "; import torch, octavo.ops as ops; from octavo import codebook; c = codebook.dynamic(); "
        "q = ops.quantize(torch.ones(2, 64), c, 64); print(ops.linear(torch.ones(1, 64), *q, c, 64).tolist())",
    )
    *_, status, product = done.stdout.splitlines()
    assert json.loads(status)["active"] == "reference"
    assert json.loads(product) == [[64.0, 64.0]]


def test_unknown_kernels_are_refused_with_the_known_ones():
    done = run_with("fastest", REPORT)
    if cpu.native.library is None:
        assert json.loads(done.stdout.splitlines()[-1])["active"] == "reference"
    else:
        assert done.returncode != 0
        assert f"{cpu.ISA_VARIABLE}=fastest: expected none or one of" in done.stderr


@native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    """A second runtime's spinning threads would fight PyTorch's."""
    done = run_with(
        cpu.status()["active"],
        "import torch, octavo.ops as ops; from octavo import codebook; c = codebook.dynamic(); "
        "q = ops.quantize(torch.randn(512, 512), c, 64); torch.randn(512, 512) @ torch.randn(512, 512); "
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.rsplit('/', 1)[-1]}))",
    )
    assert done.stdout.splitlines()[-1] == "1"


@native
def test_the_operations_reach_the_native_kernels(monkeypatch):
    called = []
    real = cpu.native.library

    class Recorder:
        def __getattr__(self, name):
            called.append(name)
            return getattr(real, name)

    monkeypatch.setattr(cpu.native, "library", Recorder())
    weight, code = torch.randn(24, 128), codebook.dynamic()
    qdata, absmax = ops.quantize(weight, code, 64, torch.float32)
    ops.dequantize(qdata, absmax, code, 64)
    ops.linear(torch.randn(2, 128), qdata, absmax, code, 64)
    ops.linear_transposed(torch.randn(2, 24), qdata, absmax, code, 64)
    ops.embedding(torch.tensor([3]), qdata, absmax, code, 64)
    ops.histogram(weight, 64, 257)
    assert called == ["quantize", "dequantize", "linear", "linear_transposed", "embedding", "histogram"]


@pytest.mark.parametrize("tokens", [1, 40])
def test_gradients_are_those_of_the_dense_product(tokens):
    weight, code = torch.randn(96, 128), codebook.dynamic()
    packed = ops.quantize(weight, code, 64, torch.float32)
    dense = reference.dequantize(*packed, code, 64, torch.float32)
    bias = torch.randn(96, requires_grad=True)
    x = torch.randn(tokens, 128, requires_grad=True)
    out = ops.linear(x, *packed, code, 64, bias)
    seed = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, bias), seed)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), seed)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@native
def test_scale_range():
    weight = torch.zeros(4, 130)
    assert cpu.scale_range(weight, 64) == (0.0, 0.0)
    weight[1, 5], weight[2, 129] = -0.25, 3.0
    assert cpu.scale_range(weight, 64) == (0.25, 3.0)


def test_bandwidth_is_measured_with_and_without_kernels(monkeypatch):
    assert cpu.read_bandwidth(size=1 << 22, repeats=2) > 1e6
    monkeypatch.setattr(cpu.native, "AVAILABLE", False)
    assert cpu.read_bandwidth(size=1 << 22, repeats=2) > 1e6
