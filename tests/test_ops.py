"""The operations, against loops, float64 and plain PyTorch holding the de-quantized weights."""

import pytest
import torch
import torch.nn.functional as F

from octavo import codebook, ops
from octavo.ops import reference

from .conftest import brute_dequantize, packed, relative_error

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# (rows, columns, block): ragged last blocks, rows of one, one long row, a block longer than the row.
SHAPES = [(5, 100, 64), (3, 1, 4), (7, 64, 64), (1, 300, 32), (4, 37, 1), (6, 48, 4096), (2, 65, 64)]


def brute_quantize(weight, code, block_size, half):
    """Weight by weight: the scale, rounded up; then the nearest entry, the lower of two equally near."""
    rows, columns = weight.shape
    qdata = torch.empty(rows, columns, dtype=torch.uint8)
    absmax = torch.zeros(rows, -(-columns // block_size))
    for n in range(rows):
        for b in range(absmax.shape[1]):
            block = weight[n, b * block_size : (b + 1) * block_size]
            scale = block.abs().max()
            if half:
                rounded = scale.half()
                while rounded.float() < scale:
                    rounded = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=torch.float16))
                scale = rounded.float()
            absmax[n, b] = scale
            for i, w in enumerate(block):
                value = w / scale if scale > 0 else torch.tensor(0.0)
                distance = (code.double() - value.double()).abs()
                qdata[n, b * block_size + i] = int(distance.argmin())
    return qdata, absmax


@pytest.mark.parametrize("absmax_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_takes_the_nearest_entry(shape, absmax_dtype, device):
    rows, columns, block_size = shape
    weight = torch.randn(rows, columns)
    code = codebook.fit(weight, block_size)
    qdata, absmax = ops.quantize(weight.to(device), code.to(device), block_size, absmax_dtype)
    assert qdata.dtype == torch.uint8 and absmax.dtype == absmax_dtype and qdata.device.type == device.type
    expected_qdata, expected_absmax = brute_quantize(weight, code, block_size, absmax_dtype == torch.float16)
    assert torch.equal(absmax.cpu().float(), expected_absmax)
    # float32 midpoints may differ from exact ones by a rounding: then, and only then, the neighbour is as near.
    differs = (qdata.cpu() != expected_qdata).nonzero()
    for n, k in differs.tolist():
        value = float(weight[n, k] / expected_absmax[n, k // block_size])
        found, best = code[qdata[n, k].long().cpu()], code[expected_qdata[n, k].long()]
        assert abs(abs(value - float(found)) - abs(value - float(best))) < 1e-7


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_code_times_scale(shape, dtype, device):
    parts = packed(*shape, device)
    found = ops.dequantize(*parts, dtype)
    assert found.dtype == dtype and found.shape == shape[:2]
    assert torch.equal(found.cpu(), brute_dequantize(*parts).float().to(dtype))


def test_dequantize_of_strided_parts(device):
    qdata, absmax, code, block_size = packed(8, 128, 64, device)
    found = ops.dequantize(qdata[::2], absmax[::2], code, block_size)
    assert torch.equal(found, ops.dequantize(qdata, absmax, code, block_size)[::2])


def test_scales_are_rounded_up_to_float16(device):
    weight = torch.randn(64, 256, device=device)
    code = codebook.fit(weight, 64)
    _, absmax = ops.quantize(weight, code, 64, torch.float16)
    exact = weight.view(64, 4, 64).abs().amax(-1)
    assert (absmax.float() >= exact).all()
    assert (absmax.float() <= exact * (1 + 2.0**-10)).all()
    assert (weight.view(64, 4, 64).abs() / absmax.float()[..., None] <= 1).all()


def test_round_up_to_half_of_every_float16_and_what_lies_just_above(device):
    halves = torch.arange(0, 0x7C00, device=device).to(torch.int16).view(torch.float16)
    assert torch.equal(reference.round_up_to_half(halves.float()), halves)
    above = torch.nextafter(halves[:-1].float(), torch.tensor(torch.inf, device=device))
    assert torch.equal(reference.round_up_to_half(above), halves[1:])


def test_scales_outside_float16s_normal_range_stay_float32(device):
    code = codebook.dynamic().to(device)
    weight = torch.randn(4, 128, device=device)
    weight[2, 64:] *= 1e-6
    assert ops.quantize(weight, code, 64)[1].dtype == torch.float32
    assert ops.quantize(weight * 1e6, code, 64)[1].dtype == torch.float32
    weight[2, 64:] = 0
    assert ops.quantize(weight, code, 64)[1].dtype == torch.float16


def test_a_tie_takes_the_lower_entry(device):
    code = torch.linspace(-1, 1, 257)[:256].to(device)  # -1, ..., 0 at index 128, steps of 2^-7
    middle = (code[200] + code[201]) / 2
    weight = torch.tensor([[1.0, float(middle), -float(middle), float(code[5])]], device=device)
    qdata, absmax = ops.quantize(weight, code, 4, torch.float32)
    assert absmax.item() == 1.0
    assert qdata.tolist() == [[255, 200, 55, 5]]


def test_zero_blocks_and_zero_weights_decode_to_exact_zeros(device):
    weight = torch.randn(4, 128, device=device)
    weight[1, 64:] = 0
    weight[2, :7] = 0
    for code in (codebook.dynamic().to(device), codebook.fit(weight, 64)):
        qdata, absmax = ops.quantize(weight, code, 64)
        back = ops.dequantize(qdata, absmax, code, 64)
        assert absmax[1, 1] == 0
        assert (back[1, 64:] == 0).all() and (back[2, :7] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_errors(bad, device):
    weight = torch.randn(4, 64, device=device)
    weight[3, 5] = bad
    for action in (
        lambda: ops.quantize(weight, codebook.dynamic().to(device), 64, torch.float32),
        lambda: codebook.fit(weight, 64, torch.float32),
        lambda: codebook.fit(weight, 64),
        lambda: ops.quantize(weight, codebook.dynamic().to(device), 64),
    ):
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            action()


def test_a_scale_too_large_for_float16_is_an_error(device):
    with pytest.raises(ValueError, match=r"65504"):
        ops.quantize(
            torch.full((2, 64), 1e5, device=device), codebook.dynamic().to(device), 64, torch.float16
        )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_quantize_takes_every_float_type(dtype, device):
    weight = torch.randn(4, 64, device=device).to(dtype)
    code = codebook.dynamic().to(device)
    found = ops.quantize(weight, code, 64, torch.float32)
    expected = ops.quantize(weight.float(), code, 64, torch.float32)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("columns", [4096, 512, 384])
def test_dynamic_4096_is_bitsandbytes_on_the_flattened_matrix(columns):
    bnb = pytest.importorskip("bitsandbytes.functional")
    from octavo.config import OctavoConfig
    from octavo.quantizer import quantize_parameter

    weight = torch.randn(64, columns) * 0.02
    qdata, absmax, code, block_size = quantize_parameter(weight, OctavoConfig(codebook="dynamic"))
    theirs, state = bnb.quantize_blockwise(weight, blocksize=4096)
    assert torch.equal(codebook.dynamic(), state.code)
    # Decoding is theirs, bit for bit.
    dense = ops.dequantize(qdata, absmax, code, block_size)
    assert torch.equal(dense, bnb.dequantize_blockwise(qdata.reshape(theirs.shape), state))
    # Their CPU kernel takes an entry's neighbour for 2 weights in a thousand; where it does, ours is nearer.
    differs = qdata != theirs
    assert differs.float().mean() < 5e-3
    other = bnb.dequantize_blockwise(theirs, state)
    assert ((weight - dense).abs() <= (weight - other).abs())[differs].all()
    assert relative_error(dense, weight) == pytest.approx(relative_error(other, weight), rel=1e-3)


# --- products


def plain(parts, dtype):
    return brute_dequantize(*parts).float().to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0), (2, 2, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape, lead, dtype, device):
    rows, columns, _ = shape
    parts = packed(*shape, device)
    x = torch.randn(*lead, columns).to(dtype)
    bias = torch.randn(rows).to(dtype)
    out = ops.linear(x.to(device), *parts, bias.to(device))
    assert out.dtype == dtype and out.shape == (*lead, rows)
    if not out.numel():
        return
    exact = F.linear(x.double(), brute_dequantize(*parts), bias.double())
    # What plain PyTorch does in the same type, with a little room where its error happens to be nearly none.
    yardstick = relative_error(F.linear(x, plain(parts, dtype), bias), exact)
    tolerance = 1e-5 if dtype == torch.float32 else 1.5 * yardstick + 2.0**-11
    assert relative_error(out, exact) <= tolerance


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_transposed(shape, lead, dtype, device):
    rows, columns, _ = shape
    parts = packed(*shape, device)
    x = torch.randn(*lead, rows).to(dtype)
    out = ops.linear_transposed(x.to(device), *parts)
    assert out.dtype == dtype and out.shape == (*lead, columns)
    if not out.numel():
        return
    exact = x.double() @ brute_dequantize(*parts)
    yardstick = relative_error(x @ plain(parts, dtype), exact)
    assert relative_error(out, exact) <= (1e-5 if dtype == torch.float32 else 1.5 * yardstick + 2.0**-11)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operation", ["linear", "linear_transposed"])
def test_accuracy_of_larger_products(operation, dtype, device):
    parts = packed(300, 1100, 64, device)
    dense = ops.dequantize(*parts)
    if operation == "linear_transposed":
        dense = dense.T
    x = torch.randn(17, dense.shape[1], device=device).to(dtype)
    exact = F.linear(x.double(), dense.double())
    yardstick = relative_error(F.linear(x, dense.to(dtype)), exact)
    error = relative_error(getattr(ops, operation)(x, *parts), exact)
    assert error <= (1e-5 if dtype == torch.float32 else 1.05 * yardstick)


@pytest.mark.parametrize("dtype", FLOATS)
def test_panels_add_no_error(dtype, device, monkeypatch):
    """A product cut into many panels is as exact as one in a piece: sums of panels are not rounded in between."""
    monkeypatch.setattr(reference, "PANEL_WEIGHTS", 4 * 512)
    parts = packed(256, 512, 64, device)
    dense = ops.dequantize(*parts)
    x, y = torch.randn(9, 512, device=device).to(dtype), torch.randn(9, 256, device=device).to(dtype)
    for found, left, right in (
        (reference.linear(x, *parts), x, dense.T),
        (reference.linear_transposed(y, *parts), y, dense),
    ):
        exact = left.double() @ right.double()
        yardstick = relative_error(left @ right.to(dtype), exact)
        assert relative_error(found, exact) <= (1e-5 if dtype == torch.float32 else 1.05 * yardstick)


def test_strided_input(device):
    parts = packed(6, 64, 32, device)
    x = torch.randn(64, 5, device=device).T
    torch.testing.assert_close(ops.linear(x, *parts), ops.linear(x.contiguous(), *parts))
    y = torch.randn(3, 5, 12, device=device)[..., ::2]
    torch.testing.assert_close(
        ops.linear_transposed(y, *parts), ops.linear_transposed(y.contiguous(), *parts)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0, 3)])
def test_embedding(lead, ids_dtype, dtype, device):
    parts = packed(11, 70, 64, device)
    ids = torch.randint(0, 11, lead, dtype=ids_dtype)
    found = ops.embedding(ids.to(device), *parts, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), F.embedding(ids, plain(parts, dtype)))


def test_embedding_outside_the_table_is_an_error():
    parts = packed(11, 64, 64)
    for index in (11, -1):
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            ops.embedding(torch.tensor([index]), *parts)


def test_histogram_counts_squared_scales(device):
    weight = torch.randn(5, 70)
    weight[2, :64] = 0
    weight[4, 3] = 1e4  # beyond 256 medians: counted as 256
    bins = 33
    found = ops.histogram(weight.to(device), 64, bins, torch.float32)
    expected = [0] * bins
    scales = [[float(weight[n, :64].abs().max()), float(weight[n, 64:].abs().max())] for n in range(5)]
    positive = sorted(scale for row in scales for scale in row if scale > 0)
    median = positive[(len(positive) - 1) // 2]
    for n in range(5):
        for k in range(70):
            scale = scales[n][k // 64]
            value = float(weight[n, k]) / scale if scale else 0.0
            expected[int((value + 1) * (bins - 1) / 2 + 0.5)] += min(scale / median, 256) ** 2 * 2**14
    assert found.dtype == torch.int64 and found.shape == (bins,)
    torch.testing.assert_close(found.cpu().double(), torch.tensor(expected).double(), rtol=1e-6, atol=5)


# --- the contract


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 100, 64), (8, 64, 64)])
def test_opcheck(shape, dtype, device):
    rows, columns, block_size = shape
    parts = packed(*shape, device)
    weight = torch.randn(rows, columns, device=device).to(dtype)
    x = torch.randn(2, 3, columns, device=device).to(dtype).requires_grad_()
    y = torch.randn(3, rows, device=device).to(dtype).requires_grad_()
    bias = torch.randn(rows, device=device).to(dtype).requires_grad_()
    ids = torch.randint(0, rows, (2, 3), device=device)
    calls = {
        "quantize": (weight, parts[2], block_size, torch.float16),
        "dequantize": (*parts, dtype),
        "linear": (x, *parts, bias),
        "linear_transposed": (y, *parts),
        "embedding": (ids, *parts, dtype),
        "histogram": (weight, block_size, 33, torch.float32),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.octavo, name).default, arguments)
    torch.library.opcheck(torch.ops.octavo.linear.default, (x, *parts))


@pytest.mark.parametrize("fake", [False, True])
def test_wrong_arguments_say_what_was_expected_and_found(fake):
    from torch._subclasses.fake_tensor import FakeTensorMode

    qdata, absmax, code, _block_size = packed(8, 128, 64)
    x, ids = torch.randn(2, 128), torch.tensor([1])
    wrong = [
        ("linear", (torch.randn(2, 100), qdata, absmax, code, 64), r"last dimension.*128.*\(2, 100\)"),
        ("linear", (torch.tensor(1.0), qdata, absmax, code, 64), r"last dimension"),
        ("linear", (x, qdata.float(), absmax, code, 64), r"type of qdata.*uint8.*float32"),
        ("linear", (x, qdata[0], absmax, code, 64), r"dimensions of qdata"),
        ("linear", (x, qdata, absmax, code, 32), r"shape of absmax.*\(8, 4\).*\(8, 2\)"),
        ("linear", (x, qdata, absmax.double(), code, 64), r"type of absmax"),
        ("linear", (x, qdata, absmax, code[:16], 64), r"shape of code.*\(256,\).*\(16,\)"),
        ("linear", (x, qdata, absmax, code.half(), 64), r"type of code"),
        ("linear", (x.double(), qdata, absmax, code, 64), r"type of the input"),
        ("linear", (x, qdata, absmax, code, 64, torch.zeros(7)), r"shape of bias.*\(8,\).*\(7,\)"),
        ("linear", (x, qdata, absmax, code, 0), r"block_size.*positive.*0"),
        ("linear_transposed", (x, qdata, absmax, code, 64), r"last dimension.*8.*\(2, 128\)"),
        ("dequantize", (qdata, absmax, code, 64, torch.float64), r"type asked for"),
        ("embedding", (ids.float(), qdata, absmax, code, 64, torch.float32), r"type of ids"),
        ("quantize", (x[0], code, 64, torch.float16), r"dimensions of the weight"),
        ("quantize", (x.long(), code, 64, torch.float16), r"type of the weight"),
        ("quantize", (x, code, 64, torch.bfloat16), r"type of the scales"),
        ("histogram", (x, 64, 32, torch.float32), r"bins.*odd.*32"),
    ]
    for name, arguments, message in wrong:
        if fake:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                arguments = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
                with pytest.raises(ValueError, match=f"octavo.{name}.*{message}"):
                    getattr(torch.ops.octavo, name)(*arguments)
        else:
            with pytest.raises(ValueError, match=f"octavo.{name}.*{message}"):
                getattr(torch.ops.octavo, name)(*arguments)


def test_meta_device():
    parts = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in packed(8, 100, 64)]
    assert ops.linear(torch.empty(2, 3, 100, device="meta"), *parts).shape == (2, 3, 8)
    assert ops.embedding(torch.empty(4, dtype=torch.int64, device="meta"), *parts).shape == (4, 100)
    assert ops.dequantize(*parts, torch.bfloat16).dtype == torch.bfloat16


def test_empty_matrices(device):
    code = codebook.dynamic().to(device)
    for rows, columns in ((0, 64), (4, 0)):
        qdata, absmax = ops.quantize(torch.empty(rows, columns, device=device), code, 64, torch.float16)
        assert qdata.shape == (rows, columns) and absmax.shape == (rows, -(-columns // 64))
        assert ops.dequantize(qdata, absmax, code, 64).shape == (rows, columns)
        out = ops.linear(torch.ones(3, columns, device=device), qdata, absmax, code, 64)
        assert torch.equal(out, torch.zeros(3, rows, device=device))
