"""The native CPU kernels against the reference, for every instruction set this processor has and shapes of every kind."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo import codebook
from octavo.ops import cpu, reference

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason=f"no native kernels: {cpu.status()['reason']}")

ISAS = cpu.status()["supported"] or ["none"]
# The kernels are chosen once for all examples of a test, which is what a fixture of a function's scope does.
# The same examples each time; OCTAVO_TEST_RANDOM=1 (`make test-all`) draws others.
FIXED = settings(
    deadline=None,
    derandomize=not os.environ.get("OCTAVO_TEST_RANDOM"),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the norm of the exact product.
FLOAT32_ERROR = 1e-5


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    """Run the test with one instruction set's kernels."""
    from octavo import _native

    before = _native.active()
    _native.select(request.param)
    yield request.param
    _native.select(before)


def exact(qdata, absmax, code, block_size):
    """The weight in float64."""
    scales = absmax.double().repeat_interleave(block_size, 1)[:, : qdata.shape[1]]
    return code.double()[qdata.long()] * scales


def misaligned(tensor, offset=1):
    """The same values at an address that is not a multiple of the element size."""
    size = tensor.element_size()
    raw = torch.empty(tensor.numel() * size + 64, dtype=torch.uint8)
    start = (-raw.data_ptr()) % 64 + offset
    target = raw[start : start + tensor.numel() * size]
    target.copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
    return target, raw


shapes = st.tuples(
    st.integers(0, 40),
    st.one_of(st.integers(0, 200), st.sampled_from([576, 640, 1023, 1024])),
    st.one_of(st.integers(1, 300), st.sampled_from([16, 32, 48, 64, 96, 128, 4096, 2**40])),
    st.integers(0, 2**32 - 1),
)


def packed(rows, columns, block_size, seed, scale_type=torch.float16):
    """Random bytes and scales: every index and any layout, unlike what quantizing would give."""
    generator = torch.Generator().manual_seed(seed)
    qdata = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(rows, -(-columns // block_size), generator=generator).add(0.01).to(scale_type)
    return qdata, absmax, random_code(generator), generator


def random_code(generator):
    """A table of free entries, of segments whose parts fit bytes, or of others (docs/FORMAT.md), on any of their grids; or the
    published map."""
    kind, exponent = (int(torch.randint(n, (), generator=generator)) for n in (4, 4))
    if kind == 3:
        return codebook.dynamic()
    if kind == 0:
        return torch.rand(256, generator=generator).mul(2).sub(1).sort().values
    scale = 1 << (11 + exponent)
    step = scale >> 7 if kind == 1 else 1
    base = torch.randint(-scale // step, scale // step, (16,), generator=generator).sort().values * step
    room = torch.cat([base[1:], torch.tensor([scale])]) - base
    slope = (torch.rand(16, generator=generator) * room.div(15).clamp(max=127 if kind == 1 else scale)).to(
        torch.int64
    )
    return ((base[:, None] + slope[:, None] * torch.arange(16)).flatten() / scale).float()


@settings(FIXED, max_examples=30)
@given(shapes, st.sampled_from(FLOATS), st.sampled_from([torch.float16, torch.float32]))
def test_dequantize_equals_the_reference_bit_for_bit(isa, shape, dtype, scale_type):
    rows, columns, block_size, seed = shape
    qdata, absmax, code, _ = packed(rows, columns, block_size, seed, scale_type)
    found = cpu.dequantize(qdata, absmax, code, block_size, dtype)
    expected = reference._panel(qdata, absmax, code, min(block_size, max(columns, 1)), dtype)
    assert torch.equal(found, expected)


@settings(FIXED, max_examples=30)
@given(shapes, st.sampled_from(FLOATS), st.sampled_from([torch.float16, torch.float32]), st.booleans())
def test_quantize_equals_the_reference_byte_for_byte(isa, shape, dtype, scale_type, ties):
    rows, columns, block_size, seed = shape
    block_size = min(block_size, max(columns, 1))
    generator = torch.Generator().manual_seed(seed)
    code = codebook.dynamic() if seed % 2 else torch.linspace(-1, 1, 257)[1:].contiguous()
    if ties:
        # Halves of neighbouring codes, exact in every type, and blocks that hold the largest magnitude 1.
        weight = torch.randint(-256, 257, (rows, columns), generator=generator) / 256
        weight[:, ::block_size] = 1.0
    else:
        weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.05] = 0.0
    if rows:
        weight[0] = 0.0
    weight = weight.to(dtype)
    expected = reference.quantize(weight, code, block_size, scale_type)
    found = cpu.quantize(weight, code, block_size, scale_type)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@settings(FIXED, max_examples=25)
@given(shapes, st.sampled_from(FLOATS), st.sampled_from([torch.float16, torch.float32]))
def test_histogram_equals_the_reference(isa, shape, dtype, scale_type):
    rows, columns, block_size, seed = shape
    block_size = min(block_size, max(columns, 1))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = reference.histogram(weight, block_size, 8193, scale_type)
    assert torch.equal(cpu.histogram(weight, block_size, 8193, scale_type), expected)


@settings(FIXED, max_examples=20)
@given(shapes, st.sampled_from(FLOATS), st.sampled_from([torch.float16, torch.float32]))
def test_squared_error(isa, shape, dtype, scale_type):
    rows, columns, block_size, seed = shape
    qdata, absmax, code, generator = packed(rows, columns, block_size, seed, scale_type)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    error, power = cpu.squared_error(weight, qdata, absmax, code, block_size)
    difference = weight.double() - exact(qdata, absmax, code, min(block_size, max(columns, 1)))
    assert error == pytest.approx(difference.square().sum().item(), rel=1e-5)
    assert power == pytest.approx(weight.double().square().sum().item(), rel=1e-5)


@settings(FIXED, max_examples=25)
@given(
    shapes,
    st.integers(0, 20),
    st.sampled_from(FLOATS),
    st.sampled_from([torch.float16, torch.float32]),
    st.booleans(),
)
def test_linear_is_as_exact_as_torch(isa, shape, tokens, dtype, scale_type, with_bias):
    rows, columns, block_size, seed = shape
    qdata, absmax, code, generator = packed(rows, columns, block_size, seed, scale_type)
    block_size = min(block_size, max(columns, 1))
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    found = cpu.linear_fast(x, qdata, absmax, code, block_size, bias)
    assert found.dtype == dtype and found.shape == (tokens, rows)
    weight = exact(qdata, absmax, code, block_size)
    truth = x.double() @ weight.T + (0 if bias is None else bias.double())
    check_close(found, truth, x, weight, dtype)


@pytest.mark.parametrize("tokens", [1, 2])
def test_float32_by_integers_is_as_exact_as_float32(isa, tokens):
    """Segments times float32 input in two planes of 16 bits: rounding both alike is what makes the second plane fit the first."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 640, generator=generator)
    code = codebook.fit(weight, 64)
    parts = *reference.quantize(weight, code, 64, torch.float16), code, 64
    for _ in range(30):
        x = torch.randn(tokens, 640, generator=generator) * 10 ** (
            torch.rand(640, generator=generator) * 4 - 2
        )
        truth = x.double() @ exact(*parts).T
        error = (cpu.linear_fast(x, *parts).double() - truth).norm() / truth.norm()
        assert error < 1e-6


@settings(FIXED, max_examples=40)
@given(
    st.integers(1, 300),
    st.one_of(st.integers(1, 700), st.sampled_from([256, 512, 2048, 2050])),
    st.sampled_from([16, 32, 64, 128, 2**40]),
    st.one_of(st.integers(1, 40), st.just(515)),
    st.sampled_from(FLOATS),
    st.booleans(),
)
def test_many_tokens(isa, rows, columns, block_size, tokens, dtype, with_bias):
    """The products that kernels have for them: by tiles for segments, and vbmi_bf16's for bfloat16."""
    qdata, absmax, code, generator = packed(rows, columns, block_size, tokens)
    block_size = min(block_size, columns)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    found = cpu.products._linear_gemm(x, qdata, absmax, code, block_size, bias, tokens)
    tiles = isa in ("avx2", "avx512", "vbmi", "vbmi_bf16") and codebook.segments(code) is not None
    if columns % 16 == 0 or block_size != columns:
        assert (found is not None) == (tiles or (isa == "vbmi_bf16" and dtype == torch.bfloat16))
    if found is None:
        return
    weight = exact(qdata, absmax, code, block_size)
    truth = x.double() @ weight.T + (0 if bias is None else bias.double())
    check_close(found, truth, x, weight, dtype)
    if dtype == torch.float32:
        return
    dense = reference.dequantize(qdata, absmax, code, block_size, dtype)
    torch_error = (torch.nn.functional.linear(x, dense, bias).double() - truth).norm()
    # A few outputs may fall to the other side of a rounding: where there are few, one of them is seen.
    one = 0.25 * torch.finfo(dtype).eps * truth.abs().max()
    assert (found.double() - truth).norm() <= torch_error * (1.01 if found.numel() > 4096 else 1.3) + one


@settings(FIXED, max_examples=25)
@given(
    st.one_of(st.integers(1, 600), st.sampled_from([256, 512])),
    st.one_of(st.integers(1, 300), st.sampled_from([64, 128])),
    st.sampled_from([16, 32, 64, 2**40]),
    st.one_of(st.integers(1, 40), st.just(515)),
    st.sampled_from(FLOATS),
)
def test_many_tokens_transposed(isa, rows, columns, block_size, tokens, dtype):
    qdata, absmax, code, generator = packed(rows, columns, block_size, tokens)
    x = torch.randn(tokens, rows, generator=generator).to(dtype)
    out = torch.empty(tokens, columns, dtype=dtype)
    done = cpu.native.library.linear_transposed_gemm(
        *cpu.native.matrix(qdata, absmax, code, min(block_size, columns)),
        x.data_ptr(),
        cpu.TYPES[dtype],
        tokens,
        out.data_ptr(),
        2,
    )
    if not done:
        assert isa in ("neon", "portable") or codebook.segments(code) is None
        return
    weight = exact(qdata, absmax, code, min(block_size, columns))
    check_close(out, x.double() @ weight, x, weight.T, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-30])
def test_many_tokens_of_odd_values(dtype, value):
    """What integers cannot stand for is multiplied in float32: the other tokens are untouched, NaN spreads as it must."""
    weight = torch.randn(64, 512)
    code = codebook.fit(weight, 64)
    parts = *reference.quantize(weight, code, 64, torch.float16), code, 64
    x = torch.randn(40, 512).to(dtype)
    plain = cpu.products._linear_gemm(x, *parts, None, 40)
    if plain is None:
        pytest.skip("no tiles")
    x[7, 100:] = value
    found = cpu.products._linear_gemm(x, *parts, None, 40)
    others = torch.arange(40) != 7
    torch.testing.assert_close(found[others], plain[others], rtol=2**-6, atol=0.2)
    expected = x[7].double() @ exact(*parts).T
    assert torch.equal(found[7].isfinite(), expected.to(dtype).isfinite())


def test_many_tokens_need_blocks_of_sixteen():
    qdata, absmax, code, generator = packed(40, 200, 100, 1)
    x = torch.randn(9, 200, generator=generator).to(torch.bfloat16)
    assert cpu.products._linear_gemm(x, qdata, absmax, code, 100, None, 9) is None
    weight = exact(qdata, absmax, code, 100)
    check_close(
        cpu.linear_fast(x, qdata, absmax, code, 100), x.double() @ weight.T, x, weight, torch.bfloat16
    )


@settings(FIXED, max_examples=25)
@given(shapes, st.integers(0, 12), st.sampled_from(FLOATS), st.sampled_from([torch.float16, torch.float32]))
def test_linear_transposed_is_as_exact_as_torch(isa, shape, tokens, dtype, scale_type):
    rows, columns, block_size, seed = shape
    qdata, absmax, code, generator = packed(rows, columns, block_size, seed, scale_type)
    block_size = min(block_size, max(columns, 1))
    x = torch.randn(tokens, rows, generator=generator).to(dtype)
    found = cpu.linear_transposed_fast(x, qdata, absmax, code, block_size)
    assert found.dtype == dtype and found.shape == (tokens, columns)
    weight = exact(qdata, absmax, code, block_size)
    check_close(found, x.double() @ weight, x, weight.T, dtype)


def check_close(found, truth, x, weight, dtype):
    """Within the rounding of the type: of the weights and the output for 16 bits, of the sum for float32."""
    scale = x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=-1) + truth.abs()
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    # float16's smallest numbers lie 2^-24 apart.
    least = 2**-25 if dtype == torch.float16 else 1e-12
    assert ((found.double() - truth).abs() <= tolerance * scale + least).all()


@pytest.mark.parametrize("block_size", [16, 32, 64, 100, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 33])
def test_linear_error_against_float64(dtype, tokens, block_size):
    """float32: at most 1e-5. 16 bits: no worse than torch on the de-quantized weights in the same type."""
    torch.manual_seed(tokens)
    weight = torch.randn(512, 1111)
    code = codebook.fit(weight, block_size, torch.float16)
    qdata, absmax = cpu.quantize(weight, code, block_size, torch.float16)
    truth_weight = exact(qdata, absmax, code, block_size)
    # An outlier a thousand times the rest, as real models have.
    x = torch.randn(tokens, 1111)
    x[:, 5] = 1000.0
    x = x.to(dtype)
    truth = x.double() @ truth_weight.T
    error = (cpu.linear_fast(x, qdata, absmax, code, block_size).double() - truth).norm() / truth.norm()
    if dtype == torch.float32:
        assert error <= FLOAT32_ERROR
    else:
        torch_weight = reference.dequantize(qdata, absmax, code, block_size, dtype)
        torch_error = (torch.nn.functional.linear(x, torch_weight).double() - truth).norm() / truth.norm()
        assert error <= torch_error * 1.02


def test_embedding_takes_the_rows_asked_for():
    qdata, absmax, code, _ = packed(50, 100, 32, 0)
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    full = reference.dequantize(qdata, absmax, code, 32, torch.bfloat16)
    assert torch.equal(cpu.embedding(ids, qdata, absmax, code, 32, torch.bfloat16), full[ids])
    assert torch.equal(cpu.embedding(ids.int(), qdata, absmax, code, 32, torch.bfloat16), full[ids])
    assert cpu.embedding(
        torch.empty(0, 3, dtype=torch.long), qdata, absmax, code, 32, torch.float32
    ).shape == (0, 3, 100)


@pytest.mark.parametrize("bad", [-1, 50])
def test_embedding_refuses_an_id_outside_the_table(bad):
    qdata, absmax, code, _ = packed(50, 100, 32, 0)
    with pytest.raises(IndexError, match=f"id {bad} .*50 rows"):
        cpu.embedding(torch.tensor([1, bad]), qdata, absmax, code, 32, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_weights_that_are_not_finite_are_refused(value, dtype):
    weight = torch.ones(9, 130, dtype=dtype)
    weight[8, 129] = value
    for call in (
        lambda: cpu.quantize(weight, codebook.dynamic(), 64, torch.float32),
        lambda: cpu.histogram(weight, 64, 8193, torch.float32),
        lambda: cpu.scale_range(weight, 64),
    ):
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            call()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-38, 3e38])
def test_extreme_inputs_behave_as_in_torch(dtype, value):
    qdata, absmax, code, _ = packed(20, 128, 64, 3)
    x = torch.zeros(2, 128)
    x[1, 70] = value
    x = x.to(dtype)
    found = cpu.linear_fast(x, qdata, absmax, code, 64)
    expected = (x.double() @ exact(qdata, absmax, code, 64).T).to(torch.float32).to(dtype)
    assert torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0, equal_nan=True)


def test_subnormal_weights_are_exact():
    qdata, absmax, code, _ = packed(8, 96, 32, 4, torch.float32)
    absmax *= 1e-38
    for dtype in FLOATS:
        expected = reference._panel(qdata, absmax, code, 32, dtype)
        assert torch.equal(cpu.dequantize(qdata, absmax, code, 32, dtype), expected)


def test_float16_scales_are_rounded_up_everywhere():
    """Every kind of float16: subnormal, normal, and values just above and below one."""
    halves = torch.arange(1, 0x7C00, 7, dtype=torch.int16).view(torch.float16).float()
    values = torch.cat(
        [halves, torch.nextafter(halves, torch.tensor(0.0)), torch.nextafter(halves, torch.tensor(9e9))]
    )
    weight = values[values <= 65504].reshape(-1, 1)
    _, absmax = cpu.quantize(weight, codebook.dynamic(), 1, torch.float16)
    assert torch.equal(absmax, reference.block_absmax(weight, 1, torch.float16))


def test_inputs_that_are_not_contiguous():
    qdata, absmax, code, generator = packed(96, 128, 32, 5)
    weight = exact(qdata, absmax, code, 32).float()
    x = torch.randn(128, 6, generator=generator).T
    wide = torch.zeros(96, 256, dtype=torch.uint8)
    wide[:, ::2] = qdata
    found = cpu.linear_fast(x, wide[:, ::2], absmax.T.contiguous().T, code, 32, torch.ones(192)[::2])
    assert torch.allclose(found, x @ weight.T + 1, atol=1e-4)
    requantized = cpu.quantize(weight.T.contiguous().T, codebook.dynamic(), 32, torch.float32)
    assert torch.equal(requantized[0], reference.quantize(weight, codebook.dynamic(), 32, torch.float32)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_addresses_that_are_not_aligned(dtype, offset):
    """Tensors mapped from a file may start at any byte."""
    from octavo import _native

    qdata, absmax, code, generator = packed(33, 130, 64, 6)
    x = torch.randn(2, 130, generator=generator).to(dtype)
    expected = cpu.linear_fast(x, qdata, absmax, code, 64)
    places = [misaligned(t, offset) for t in (qdata, absmax, code, x, torch.empty_like(expected))]
    q, a, c, i, o = (place.data_ptr() for place, _ in places)
    kind = cpu.TYPES[dtype]
    _native.linear(q, a, True, c, 33, 130, 64, i, kind, 2, 0, 0, o, 2)
    assert torch.equal(places[4][0], expected.view(-1).view(torch.uint8))
    weight = torch.randn(33, 130, generator=generator).to(dtype)
    expected = cpu.quantize(weight, code, 64, torch.float16)
    (w, _keep), (d, _), (s, _) = (misaligned(t, offset) for t in (weight, qdata, absmax))
    assert _native.quantize(w.data_ptr(), kind, 33, 130, c, 64, True, d.data_ptr(), s.data_ptr(), 2)
    assert torch.equal(d, expected[0].view(-1)) and torch.equal(s, expected[1].view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_number_of_threads_changes_nothing(dtype):
    qdata, absmax, code, generator = packed(700, 640, 64, 7)
    x, grad = (
        torch.randn(3, 640, generator=generator).to(dtype),
        torch.randn(2, 700, generator=generator).to(dtype),
    )
    weight = torch.randn(700, 640, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                (
                    cpu.linear_fast(x, qdata, absmax, code, 64),
                    cpu.linear_fast(x.repeat(10, 1), qdata, absmax, code, 64),
                    cpu.linear_transposed_fast(grad, qdata, absmax, code, 64),
                    *cpu.quantize(weight, code, 64, torch.float16),
                    cpu.histogram(weight, 64, 8193, torch.float16),
                    cpu.dequantize(qdata, absmax, code, 64, dtype),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
