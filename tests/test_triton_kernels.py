"""Triton's kernels on the CPU, in Triton's interpreter, against float64 and the reference.

Run by test_triton_interpreter.py, or with TRITON_INTERPRET=1 in the environment.
"""

import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu_interpreter
from octavo import codebook
from octavo.ops import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton_interpreter.py", allow_module_level=True)

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def _repaired_interpreter():
    with gpu_interpreter.repaired():
        yield


def packed(rows, columns, block, scales, code=None):
    code = codebook.dynamic() if code is None else code
    return *reference.quantize(torch.randn(rows, columns), code, block, scales), code


def segments():
    """Sixteen lines on the finest grid."""
    starts = torch.tensor([0, 60, 50, 40, 30, 20, 10, 5, 2, 5, 10, 20, 30, 40, 50, 60]).cumsum(0) * 31 - 12000
    slopes = torch.tensor([61, 40, 51, 33, 17, 9, 8, 2, 3, 7, 18, 34, 56, 81, 77, 99])
    return ((starts[:, None] + slopes[:, None] * torch.arange(16)).reshape(256) / 16384).float()


def fitted():
    return codebook.fit(torch.randn(64, 512), 64)


def error(found, exact):
    assert torch.isfinite(found).all()
    return ((found.double() - exact).norm() / exact.norm()).item()


def limit(dtype, x, weight, bias, exact):
    """What PyTorch's own product on the rounded weights errs by, and a little; 1e-5 in float32."""
    if dtype == torch.float32:
        return 1e-5
    return 1.1 * error(F.linear(x, weight.to(dtype), bias), exact) + 1e-6


def check_linear(run, dtype, tokens, rows, columns, block, scales, with_bias, code=None):
    qdata, absmax, code = packed(rows, columns, block, scales, code)
    x = torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    weight = reference.dequantize(qdata, absmax, code, block, torch.float32)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = torch.full((tokens, rows), float("nan"), dtype=dtype)
    run(x, qdata, absmax, code, block, bias, out)
    assert error(out, exact) <= limit(dtype, x, weight, bias, exact)
    again = torch.full_like(out, float("nan"))
    run(x, qdata, absmax, code, block, bias, again)
    assert torch.equal(out, again)


@pytest.mark.parametrize("way", ["load", "gather", "segments"])
@pytest.mark.parametrize(
    "dtype, rows, columns, block, scales, with_bias",
    [
        (torch.float32, 13, 300, 64, torch.float32, True),
        (torch.float16, 16, 1037, 32, torch.float16, False),
        (torch.bfloat16, 9, 512, 4096, torch.float16, True),
        (torch.float16, 8, 700, 96, torch.float32, False),  # blocks that are no power of two
    ],
)
def test_gemv(way, dtype, rows, columns, block, scales, with_bias):
    from octavo.ops.gpu.kernels.triton_gemv import gemv

    def run(*arguments):
        gemv(*arguments, gather=way == "gather", segments=way == "segments")

    code = segments() if way == "segments" else None
    check_linear(run, dtype, 1, rows, columns, block, scales, with_bias, code)


@pytest.mark.parametrize("way, split_k", [("load", 2), ("gather", 3), ("segments", 2)])
@pytest.mark.parametrize(
    "dtype, tokens, rows, columns, block, scales, with_bias",
    [
        (torch.float32, 2, 65, 300, 64, torch.float16, True),
        (torch.float16, 17, 70, 517, 32, torch.float16, True),
        (torch.bfloat16, 33, 64, 512, 4096, torch.float32, False),
    ],
)
def test_gemm(way, split_k, dtype, tokens, rows, columns, block, scales, with_bias):
    from octavo.ops.gpu.kernels.triton_gemm import gemm

    def run(*arguments):
        gemm(*arguments, gather=way == "gather", segments=way == "segments", split_k=split_k)

    code = segments() if way == "segments" else None
    check_linear(run, dtype, tokens, rows, columns, block, scales, with_bias, code)


def test_split_fills_the_gpu_and_keeps_splits_long():
    from octavo.ops.gpu.kernels.triton_gemm import WANTED_PROGRAMS, split_k_for

    for programs in (1, 64, 200, 1000):
        for columns in (128, 1024, 4096, 16384):
            split_k = split_k_for(programs, columns, 128)
            assert split_k == 1 or columns // split_k >= 4 * 128
            assert split_k == 1 or programs * split_k // 2 < WANTED_PROGRAMS


@pytest.mark.parametrize("table", ["dynamic", "segments", "fitted"])
@pytest.mark.parametrize(
    "dtype, columns, block",
    [
        (torch.float32, 300, 64),
        (torch.float16, 1040, 32),
        (torch.bfloat16, 130, 4096),
        (torch.bfloat16, 300, 64),
    ],
)
def test_decode_is_the_reference_bit_for_bit(dtype, columns, block, table):
    from octavo.ops import gpu
    from octavo.ops.gpu import kinds

    code = {"dynamic": codebook.dynamic, "segments": segments, "fitted": fitted}[table]()
    assert kinds.is_segments(code) == (table != "dynamic")
    qdata, absmax, code = packed(11, columns, block, torch.float16, code)
    qdata.view(-1)[:256] = torch.arange(256)
    expected = reference.dequantize(qdata, absmax, code, block, dtype)
    assert torch.equal(gpu.dequantize(qdata, absmax, code, block, dtype), expected)
    for kind in (torch.int64, torch.int32):
        ids = torch.tensor([[3, 0], [10, 3]], dtype=kind)
        rows = gpu.embedding(ids, qdata, absmax, code, block, dtype)
        assert rows.shape == (2, 2, columns)
        assert torch.equal(rows, expected[ids.long()])
    wrong = gpu.embedding(torch.tensor([11, -1]), qdata, absmax, code, block, dtype)
    assert torch.isnan(wrong).all()


@pytest.mark.parametrize(
    "dtype, scales, columns, block",
    [
        (torch.float32, torch.float16, 200, 64),
        (torch.float32, torch.float32, 96, 48),
        (torch.float16, torch.float32, 70, 4096),
        (torch.bfloat16, torch.float16, 70, 32),
        (torch.float64, torch.float32, 65, 64),
    ],
)
def test_quantize_and_histogram_are_the_reference_byte_for_byte(dtype, scales, columns, block):
    from octavo.ops import gpu

    weight = (torch.randn(7, columns) * torch.logspace(-2, 2, 7)[:, None]).to(dtype)
    weight[2] = 0.0
    weight[4, ::2] = weight[4].abs().max()  # values at exactly 1
    # Halves of 1/255 between codes: ties go to the lower entry.
    code = torch.linspace(-1, 1, 256)
    code[127] = 0.0
    for found, expected in zip(
        (*gpu.quantize(weight, code, block, scales), gpu.histogram(weight, block, 8193, scales)),
        (
            *reference.quantize(weight, code, block, scales),
            reference.histogram(weight, block, 8193, scales),
        ),
        strict=True,
    ):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_ties_and_zeros():
    from octavo.ops import gpu

    code = torch.linspace(-128, 127, 256) / 128
    weight = torch.cat([torch.tensor([1.0]), (torch.arange(-127, 128) + 0.5) / 128]).view(1, -1)
    found = gpu.quantize(weight, code, 256, torch.float32)[0]
    assert torch.equal(found, reference.quantize(weight, code, 256, torch.float32)[0])
    zeros = torch.zeros(2, 64)
    assert gpu.histogram(zeros, 32, 33, torch.float16).sum() == 0
    assert not gpu.quantize(zeros, code, 32, torch.float16)[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_an_error(bad):
    from octavo.ops import gpu

    weight = torch.randn(3, 100)
    weight[1, 70] = bad
    for scales in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            gpu.quantize(weight, codebook.dynamic(), 64, scales)
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            gpu.histogram(weight, 64, 33, scales)


def test_scales_too_large_for_float16_are_an_error():
    from octavo.ops import gpu

    with pytest.raises(ValueError, match="float32"):
        gpu.quantize(torch.full((1, 64), 1e5), codebook.dynamic(), 64, torch.float16)


@pytest.mark.parametrize(
    "dtype, tokens",
    [(torch.float32, 1), (torch.float32, 3), (torch.float16, 3), (torch.bfloat16, 1), (torch.bfloat16, 130)],
)
def test_linear_and_its_transpose_through_the_choice(dtype, tokens, monkeypatch):
    from octavo.ops import gpu
    from octavo.ops.gpu.kernels import panels

    # Small panels, so that there are several, the last one partial.
    monkeypatch.setattr(panels, "LARGEST_PANEL_BYTES", 1)
    monkeypatch.setattr(panels, "STEP", 32)
    rows, columns, block = 40, 140, 64
    qdata, absmax, code = packed(rows, columns, block, torch.float16)
    weight = reference.dequantize(qdata, absmax, code, block, torch.float32)
    x, bias = torch.randn(2, tokens, columns).to(dtype), torch.randn(rows)
    exact = F.linear(x.double(), weight.double(), bias.double())
    out = gpu.linear(x, qdata, absmax, code, block, bias)
    assert out.shape == (2, tokens, rows) and out.dtype == dtype
    assert error(out, exact) <= limit(dtype, x, weight, bias.to(dtype), exact)
    back = torch.randn(2, tokens, rows).to(dtype)
    exact = back.double() @ weight.double()
    out = gpu.linear_transposed(back, qdata, absmax, code, block)
    assert error(out, exact) <= limit(dtype, back, weight.t(), None, exact)


def test_panels_fill_the_gpu_within_bounds():
    from octavo.ops.gpu.kernels.panels import LARGEST_PANEL_BYTES, step_for

    # Larger for few tokens than for many, whose product fills the GPU with a smaller panel.
    assert (
        step_for(128, 16384, 4096, 2) >= step_for(2048, 16384, 4096, 2) >= step_for(1 << 16, 16384, 4096, 2)
    )
    # One panel where a bias is added, if the bound allows it: it is then added before rounding.
    assert step_for(2048, 4096, 16384, 2, bias=True) == 16384
    assert step_for(2048, 4096, 50400, 2, bias=True) == step_for(2048, 4096, 50400, 2) < 50400
    # Never beyond the bound, and in equal parts.
    for tokens, other, total in (
        (1, 4096, 50400),
        (300, 50400, 4096),
        (2048, 128256, 4096),
        (129, 16384, 4096),
    ):
        step = step_for(tokens, other, total, 2)
        assert step == total or step % 256 == 0
        assert step * other * 2 <= max(LARGEST_PANEL_BYTES, 256 * other * 2)
        assert -(-total // step) * step < total + 256 * -(-total // step)


@pytest.fixture
def eager(monkeypatch):
    """Products of CPU tensors, as eager code asks for them, by the GPU's kernels in the interpreter; each decoding is noted."""
    from octavo.ops import direct, gpu
    from octavo.ops.gpu import choose
    from octavo.ops.gpu.kernels import panels

    monkeypatch.setattr(direct, "_linear", gpu.linear)
    monkeypatch.setattr(direct, "_transposed", gpu.linear_transposed)
    monkeypatch.setattr(direct.cpu, "AVAILABLE", True)
    monkeypatch.setattr(panels.recomputed, "LIMIT", 512 << 20)
    decoded = []

    def decode(qdata, *rest):
        decoded.append(qdata.numel())
        choose.decode(qdata, *rest)

    monkeypatch.setattr(panels, "decode", decode)
    return decoded


def checkpointed_step(matrices, x, checkpointing):
    """A layer of two products, its gradient by x."""
    from torch.utils.checkpoint import checkpoint

    from octavo.ops import direct

    def layer(x):
        hidden = torch.relu(direct.linear(x, *matrices[0], 64))
        return direct.linear(hidden, *matrices[1], 64) + x

    x = x.clone().requires_grad_()
    out = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
    out.square().sum().backward()
    return x.grad


@pytest.mark.parametrize(
    "limit, decodings",
    [
        (512 << 20, 4),  # forward and recomputed; backward finds them
        (4 * 64 * 32, 5),  # room for one of the two: the one that is needed first is kept last
        (1, 6),
    ],
)
def test_a_checkpointed_layer_decodes_twice_not_three_times(eager, monkeypatch, limit, decodings):
    from octavo.ops.gpu.kernels import panels

    monkeypatch.setattr(panels.recomputed, "LIMIT", limit)
    matrices = [packed(32, 64, 64, torch.float16, segments()), packed(64, 32, 64, torch.float16)]
    x = torch.randn(130, 64)
    dense = [reference.dequantize(*matrix, 64, torch.float32) for matrix in matrices]
    plain = x.clone().double().requires_grad_()
    hidden = torch.relu(plain @ dense[0].double().T)
    (hidden @ dense[1].double().T + plain).square().sum().backward()
    for _ in range(2):
        eager.clear()
        found = checkpointed_step(matrices, x, checkpointing=True)
        assert error(found, plain.grad) < 1e-5
        assert len(eager) == decodings
        assert not panels.recomputed._kept
    # Without checkpoints nothing is recomputed, and nothing kept.
    eager.clear()
    assert error(checkpointed_step(matrices, x, checkpointing=False), plain.grad) < 1e-5
    assert len(eager) == 4


def test_what_no_backward_pass_asks_for_is_let_go_at_its_end(eager):
    """A product whose input needs no gradient is recomputed too, and its backward pass never comes."""
    from torch.utils.checkpoint import checkpoint

    from octavo.ops import direct
    from octavo.ops.gpu.kernels import panels

    matrix = packed(32, 64, 64, torch.float16)
    fixed, scale = torch.randn(130, 64), torch.randn(32, requires_grad=True)
    seen = []

    def layer(scale):
        out = direct.linear(fixed, *matrix, 64)
        seen.append(len(panels.recomputed._kept))
        return out * scale

    checkpoint(layer, scale, use_reentrant=False).sum().backward()
    assert seen == [0, 1] and not panels.recomputed._kept


def test_a_codebook_that_is_not_contiguous():
    from octavo.ops import gpu

    qdata, absmax, code = packed(32, 64, 64, torch.float16)
    strided = torch.stack([code, torch.full_like(code, 9.0)], 1)[:, 0]
    assert not strided.is_contiguous()
    wanted = reference.dequantize(qdata, absmax, code, 64, torch.float32)
    assert torch.equal(gpu.dequantize(qdata, absmax, strided, 64, torch.float32), wanted)
    x = torch.randn(3, 64)
    assert error(gpu.linear(x, qdata, absmax, strided, 64), x.double() @ wanted.double().T) < 1e-5


def test_empty_tensors():
    from octavo.ops import gpu

    qdata, absmax, code = packed(5, 64, 32, torch.float16)
    matrix = (qdata, absmax, code, 32)
    assert gpu.linear(torch.empty(0, 64), *matrix).shape == (0, 5)
    assert gpu.linear_transposed(torch.empty(2, 0, 5), *matrix).shape == (2, 0, 64)
    assert gpu.embedding(torch.empty(0, dtype=torch.int64), *matrix, torch.float16).shape == (0, 64)
    narrow = gpu.linear(torch.empty(3, 0), qdata[:, :0], absmax[:, :0], code, 32)
    assert torch.equal(narrow, torch.zeros(3, 5))
    assert gpu.quantize(torch.empty(0, 64), code, 32, torch.float16)[0].shape == (0, 64)


@pytest.fixture
def nothing_chosen(monkeypatch):
    """OCTAVO_GPU_LINEAR is read when a kernel is chosen, once for each shape."""
    from octavo.ops.gpu import choose

    monkeypatch.setattr(choose, "_products", {})
    monkeypatch.setattr(choose, "_bound", {})


@pytest.mark.usefixtures("nothing_chosen")
@pytest.mark.parametrize("name", ["triton_gemv", "triton_gemm", "panels"])
def test_a_kernel_can_be_forced(name, monkeypatch):
    from octavo.ops import gpu
    from octavo.ops.gpu import kernels

    monkeypatch.setenv("OCTAVO_GPU_LINEAR", name)
    record = kernels.named()[name]
    monkeypatch.setitem(kernels.named(), name, dataclasses.replace(record, run=(spy := Spy(record.run))))
    qdata, absmax, code = packed(5, 64, 32, torch.float16)
    gpu.linear(torch.randn(1, 64), qdata, absmax, code, 32)
    assert spy.calls == 1


@pytest.mark.usefixtures("nothing_chosen")
def test_a_kernel_that_cannot_run_warns_and_the_next_is_taken(monkeypatch):
    from octavo.ops import gpu
    from octavo.ops.gpu import choose

    monkeypatch.setenv("OCTAVO_GPU_LINEAR", "cuda_mma")
    qdata, absmax, code = packed(5, 64, 32, torch.float16)
    with pytest.warns(RuntimeWarning, match="cuda_mma cannot run here: CUDA kernels need an NVIDIA GPU"):
        gpu.linear(torch.randn(1, 64), qdata, absmax, code, 32)
    monkeypatch.setenv("OCTAVO_GPU_LINEAR", "fast")
    choose._products.clear()
    with pytest.raises(ValueError, match="expected one of cuda_mma"):
        gpu.linear(torch.randn(1, 64), qdata, absmax, code, 32)


class Spy:
    """A kernel that counts its calls."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, 0

    def __call__(self, *arguments):
        self.calls += 1
        self.kernel(*arguments)
