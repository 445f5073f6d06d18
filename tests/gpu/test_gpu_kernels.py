"""The kernels on a GPU: against float64, with poisoned outputs, each by name and through the choice."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import octavo
from octavo import codebook, ops
from octavo.ops import gpu, reference
from octavo.ops.gpu import choose, kernels, kinds, recomputed, verify
from octavo.ops.gpu.kernel import Instance
from octavo.ops.gpu.kernels import cuda_decode, cuda_simt, cuda_wgmma, panels

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def has_bfloat16() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def packed(rows, columns, block, scales, device, fitted=False):
    weight = torch.randn(rows, columns, device=device)
    code = (codebook.fit(weight, block) if fitted else codebook.dynamic()).to(device)
    return (*reference.quantize(weight, code, block, scales), code)


def error(found, exact):
    assert torch.isfinite(found).all()
    return ((found.double() - exact).norm() / exact.norm()).item()


def limit(dtype, x, weight, bias, exact):
    if dtype == torch.float32:
        return 1e-5
    return 1.1 * error(F.linear(x, weight.to(dtype), bias), exact) + 1e-6


@pytest.mark.parametrize(
    "rows, columns, block", [(1000, 4096, 64), (77, 11008, 128), (515, 1037, 32), (48, 2560, 4096)]
)
@pytest.mark.parametrize(
    "name, segments",
    [
        (name, segments)
        for name, kernel in kernels.named().items()
        if kernel.operation == "linear"
        for segments in ([False, True] if kernel.segmented else [False])
    ],
)
def test_linear(name, segments, rows, columns, block, device):
    """Every type and number of tokens a kernel takes: the error, every element written, and the same bits twice. A kernel that
    computes a codebook of segments gives the bits that its table gives."""
    kernel, tried = kernels.named()[name], 0
    for scales in (torch.float16, torch.float32):
        qdata, absmax, code = packed(rows, columns, block, scales, device, segments)
        weight = reference.dequantize(qdata, absmax, code, block, torch.float32)
        for dtype, tokens in itertools.product(TYPES, (1, 2, 7, 8, 16, 31, 64, 128, 200)):
            call = choose.product(dtype, tokens, qdata, absmax, block)
            if kernel.unsupported_reason(call) or (name == "triton_gemm" and kernel.place(call) is None):
                continue
            # One of the odd token counts is enough for the second type of scales.
            if scales == torch.float32 and tokens not in (1, 7, 31):
                continue
            tried += 1
            x = torch.randn(tokens, columns, device=device).to(dtype)
            bias = torch.randn(rows, device=device).to(dtype) if tokens % 2 else None
            exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            outputs = [torch.full((tokens, rows), float("nan"), dtype=dtype, device=device) for _ in range(2)]
            kernel.run(x, qdata, absmax, code, block, bias, outputs[0])
            kernel.run(
                x, qdata, absmax, code, block, bias, outputs[1], **({"segments": True} if segments else {})
            )
            assert error(outputs[0], exact) <= limit(dtype, x, weight, bias, exact), (dtype, tokens, scales)
            assert torch.equal(*outputs), (dtype, tokens, scales)
    assert tried or (name.startswith("cuda") and (columns % 16 or not has_bfloat16()))


@pytest.mark.parametrize("copies", [1, 4, 32])
def test_copies_of_the_table_change_no_bit(copies, device):
    qdata, absmax, code = packed(256, 4096, 64, torch.float16, device)
    x = torch.randn(1, 4096, device=device).half()
    out, other = torch.empty(1, 256, device=device).half(), torch.empty(1, 256, device=device).half()
    cuda_simt.linear(x, qdata, absmax, code, 64, None, out)
    cuda_simt.linear(x, qdata, absmax, code, 64, None, other, extra=(("COPIES", copies),), grid=3)
    assert torch.equal(out, other)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows, columns, block", [(300, 4096, 64), (515, 1037, 32), (40, 330, 96)])
def test_decoding_is_the_reference_bit_for_bit(dtype, rows, columns, block, fitted, device):
    qdata, absmax, code = packed(rows, columns, block, torch.float16, device, fitted)
    expected = reference.dequantize(qdata, absmax, code, block, dtype)
    if fitted:
        for kernel in kernels.named().values():
            call = choose.Call.on(qdata, dtype=dtype, block_size=block, segments=True)
            if kernel.operation == "decode" and kernel.segmented and not kernel.unsupported_reason(call):
                out = torch.full_like(expected, float("nan"))
                kernel.run(qdata, absmax, code, block, None, 0, out, segments=True)
                assert torch.equal(out, expected), kernel.name
    assert torch.equal(ops.dequantize(qdata, absmax, code, block, dtype), expected)
    for kind in (torch.int32, torch.int64):
        ids = torch.randint(0, rows, (3, 5), device=device, dtype=kind)
        assert torch.equal(ops.embedding(ids, qdata, absmax, code, block, dtype), expected[ids.long()])
    assert torch.isnan(
        ops.embedding(torch.tensor([-1, rows], device=device), qdata, absmax, code, block, dtype)
    ).all()


@pytest.mark.parametrize(
    "dtype, scales, columns, block",
    [
        (torch.float32, torch.float16, 4096, 64),
        (torch.float32, torch.float32, 1037, 64),
        (torch.float16, torch.float32, 1037, 32),
        (torch.bfloat16, torch.float16, 3000, 4096),
    ],
)
def test_quantizing_is_the_reference_byte_for_byte(dtype, scales, columns, block, device):
    weight = (
        torch.randn(200, columns, device=device) * torch.logspace(-3, 3, 200, device=device)[:, None]
    ).to(dtype)
    weight[7] = 0.0
    code = codebook.dynamic().to(device)
    found = (*ops.quantize(weight, code, block, scales), ops.histogram(weight, block, 8193, scales))
    wanted = (
        *reference.quantize(weight, code, block, scales),
        reference.histogram(weight, block, 8193, scales),
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    on_cpu = reference.quantize(weight.cpu(), code.cpu(), block, scales)
    assert torch.equal(found[0].cpu(), on_cpu[0]) and torch.equal(found[1].cpu(), on_cpu[1])
    weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        ops.quantize(weight, code, block, scales)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_gradients(dtype, tokens, device):
    rows, columns, block = 3000, 2048, 64
    qdata, absmax, code = packed(rows, columns, block, torch.float16, device)
    weight = reference.dequantize(qdata, absmax, code, block, torch.float32)
    x = torch.randn(tokens, columns, device=device).to(dtype).requires_grad_()
    bias = torch.randn(rows, device=device).to(dtype).requires_grad_()
    back = torch.randn(tokens, rows, device=device).to(dtype)
    ops.linear(x, qdata, absmax, code, block, bias).backward(back)
    exact = back.double() @ weight.double()
    assert error(x.grad, exact) <= limit(dtype, back, weight.t(), None, exact)
    assert error(bias.grad, back.double().sum(0)) <= 1e-2


@pytest.mark.parametrize("limit", [0, recomputed.LIMIT])
def test_a_checkpointed_layer_has_the_gradient_of_a_plain_one(limit, device, monkeypatch):
    """Whether its backward pass de-quantizes anew or takes up what was recomputed; and nothing is kept afterwards."""
    monkeypatch.setattr(recomputed, "LIMIT", limit)
    up, down = (
        packed(*shape, 64, torch.float16, device, fitted=True) for shape in ((2048, 1024), (1024, 2048))
    )
    x = torch.randn(700, 1024, device=device).half().requires_grad_()
    back = torch.randn(700, 1024, device=device).half()

    def layer(x):
        return ops.direct.linear(ops.direct.linear(x, *up, 64), *down, 64)

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).backward(back)
    weights = [reference.dequantize(*parts, 64, torch.float32).double() for parts in (up, down)]
    exact = back.double() @ weights[1] @ weights[0]
    assert error(x.grad, exact) < 2e-3
    assert not recomputed._kept


def test_a_thread_in_which_nothing_of_cuda_has_run(device):
    """Autograd runs backward passes in such threads; a driver call of ours may be the first there."""
    import threading

    parts = packed(64, 512, 64, torch.float16, device)
    expected = ops.dequantize(*parts[:3], 64, torch.float16)
    kept = [torch.empty_like(expected), torch.empty_like(expected)]
    failures = []

    def run(out):
        try:
            cuda_decode.decode(*parts[:3], 64, None, 0, out)
        except Exception as failure:
            failures.append(failure)

    for out in kept:
        thread = threading.Thread(target=run, args=(out,))
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    assert not failures and all(torch.equal(out, expected) for out in kept)


def test_launches_with_sizes_filled_in_follow_the_tensors(device):
    """The second call of a shape goes straight to the driver: other weights, inputs and biases must not be mixed up."""
    cases = [packed(96, 1024, 64, torch.float16, device) for _ in range(3)]
    for tokens in (1, 3):
        for parts in cases * 2:
            x = torch.randn(2, tokens, 1024, device=device).half()
            for bias in (None, torch.randn(96, device=device).half()):
                weight = reference.dequantize(*parts[:3], 64, torch.float32)
                exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
                assert error(ops.linear(x, *parts[:3], 64, bias), exact) < 1e-3
                # Not contiguous, not aligned: the sizes are the same, the way is not.
                odd = torch.empty(2, tokens, 1025, device=device).half()[..., 1:].copy_(x)
                assert error(ops.linear(odd, *parts[:3], 64, bias), exact) < 1e-3
    assert choose._bound


@pytest.mark.parametrize("splits", [1, 2, 5, None])
@pytest.mark.parametrize("tokens", [1, 33, 100, 256, 300])
def test_wgmma(tokens, splits, device):
    if torch.cuda.get_device_capability() != cuda_wgmma.CAPABILITY:
        call = choose.product(torch.float16, tokens, *packed(16, 64, 64, torch.float16, device)[:2], 64)
        assert cuda_wgmma.KERNEL.unsupported_reason(call)
        return
    for rows, columns, block, dtype in ((515, 1040, 64, torch.bfloat16), (1000, 11008, 32, torch.float16)):
        qdata, absmax, code = packed(rows, columns, block, torch.float16, device)
        weight = reference.dequantize(qdata, absmax, code, block, torch.float32)
        x = torch.randn(tokens, columns, device=device).to(dtype)
        bias = torch.randn(rows, device=device).to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        outputs = [torch.full((tokens, rows), float("nan"), dtype=dtype, device=device) for _ in range(2)]
        for out in outputs:
            cuda_wgmma.linear(x, qdata, absmax, code, block, bias, out, splits=splits)
        assert error(outputs[0], exact) <= limit(dtype, x, weight, bias, exact)
        assert torch.equal(*outputs)


@pytest.mark.parametrize("tokens", [300, 2048])
def test_a_bias_is_added_before_rounding(tokens, device):
    """Several panels: 50400 x 4096 in 16 bits is more than a workspace."""
    qdata = torch.randint(0, 256, (50400, 4096), dtype=torch.uint8, device=device)
    absmax = (torch.rand(50400, 64, device=device) * 0.01 + 0.02).half()
    code = codebook.dynamic().to(device)
    weight = reference.dequantize(qdata, absmax, code, 64, torch.float32)
    x, bias = torch.randn(tokens, 4096, device=device).half(), torch.randn(50400, device=device).half()
    out = torch.empty(tokens, 50400, dtype=torch.float16, device=device)
    panels.linear(x, qdata, absmax, code, 64, bias, out)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert error(out, exact) <= limit(torch.float16, x, weight, bias, exact)


def test_no_large_float_copy_is_ever_held(device):
    rows, columns = 50400, 4096
    qdata = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device=device)
    absmax = torch.rand(rows, columns // 64, device=device).half()
    code = codebook.dynamic().to(device)
    x = torch.randn(256, columns, device=device).half().requires_grad_()
    ops.linear(x, qdata, absmax, code, 64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ops.linear(x, qdata, absmax, code, 64)
    out.backward(torch.ones_like(out))
    taken = torch.cuda.max_memory_allocated() - before
    # The result and its gradient, 26 MB each, and panels; the matrix would be 413 MB in 16 bits.
    assert taken < 200 << 20, f"{taken / 2**20:.0f} MiB"


def test_a_moved_codebook_is_known_and_the_choice_follows_it(device, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    weight = octavo.OctavoTensor.from_float(torch.randn(64, 512), dtype=torch.float16).to(device)
    torch.cuda.set_sync_debug_mode("error")
    # Noted on the host, before the move: asking does not wait for the device.
    assert kinds.is_segments(weight.code)
    torch.cuda.set_sync_debug_mode("default")
    assert not kinds.is_segments(codebook.dynamic().to(device))


def test_every_kernel_that_was_used_was_checked_and_none_refused(device):
    status = gpu.status()
    assert status["kernels"]
    assert all(good for good, _ in status["kernels"].values()), status


def test_a_wrong_kernel_is_named_and_left_out(device, monkeypatch):
    def wrong(x, qdata, absmax, code, block_size, bias, out):
        out.fill_(1.0)

    record = dataclasses.replace(
        cuda_simt.KERNEL, run=wrong, instance=lambda call: Instance(wrong, 1040), bind=None
    )
    monkeypatch.setitem(kernels.named(), "cuda_simt", record)
    monkeypatch.setenv("OCTAVO_GPU_LINEAR", "cuda_simt")
    monkeypatch.setattr(verify, "_verdicts", {})
    monkeypatch.setattr(choose, "_products", {})
    monkeypatch.setattr(choose, "_bound", {})
    qdata, absmax, code = packed(64, 512, 64, torch.float16, device)
    x = torch.randn(1, 512, device=device).half()
    with pytest.warns(RuntimeWarning, match="GPU kernel cuda_simt is not used"):
        out = ops.linear(x, qdata, absmax, code, 64)
    exact = F.linear(x.double(), reference.dequantize(qdata, absmax, code, 64, torch.float32).double())
    assert error(out, exact) < 1e-2
