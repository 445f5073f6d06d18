"""Which GPU kernel a call gets, and that none is used that does not agree: the logic, without a GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from octavo.ops import reference, triton
from octavo.ops.triton import choose, cuda_kernels, nvrtc, verify, wgmma

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _no_forcing(monkeypatch):
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    monkeypatch.setattr(verify, "_verdicts", {})


def on_gpu(rows=4096, columns=4096, block=64, address=256, contiguous=True):
    """What the choice looks at of a matrix on a GPU."""
    common = {"device": torch.device("cuda", 0), "is_contiguous": lambda: contiguous}
    qdata = SimpleNamespace(
        shape=(rows, columns), data_ptr=lambda: address, numel=lambda: rows * columns, **common
    )
    absmax = SimpleNamespace(shape=(rows, -(-columns // block)), dtype=F16, **common)
    return qdata, absmax, block


@pytest.mark.parametrize(
    "dtype, tokens, capability, expected",
    [
        (BF16, 1, (9, 0), ["cuda_mma", "cuda_simt", "triton_gemv", "triton_gemm", "panels"]),
        (F16, 8, (7, 5), ["cuda_mma", "cuda_simt", "panels"]),
        (F32, 2, (9, 0), ["cuda_mma", "cuda_simt", "panels"]),
        (BF16, 32, (9, 0), ["cuda_mma", "triton_gemm", "panels"]),
        (BF16, 40, (9, 0), ["cuda_wgmma", "cuda_mma", "triton_gemm", "panels"]),
        (BF16, 40, (8, 9), ["cuda_mma", "triton_gemm", "panels"]),
        (BF16, 40, (12, 0), ["cuda_mma", "triton_gemm", "panels"]),
        (F32, 40, (9, 0), ["cuda_mma", "panels"]),
        (BF16, 100, (8, 0), ["triton_gemm", "panels"]),
        (F16, 100, (7, 5), ["panels"]),
        (BF16, 129, (8, 0), ["panels"]),
        (F16, 256, (9, 0), ["cuda_wgmma", "panels"]),
        (F16, 257, (9, 0), ["panels"]),
    ],
)
def test_candidates(dtype, tokens, capability, expected):
    assert choose.candidates(dtype, tokens, capability) == expected


def test_candidates_depend_on_the_shape():
    def first(tokens, rows, columns, capability=(9, 0)):
        return choose.candidates(BF16, tokens, capability, (rows, columns))[0]

    # One token: tall matrices, and long rows.
    assert first(1, 16384, 4096) == first(1, 4096, 16384) == "cuda_simt"
    assert first(1, 4096, 4096) == first(1, 1024, 16384) == first(2, 16384, 4096) == "cuda_mma"
    # Few rows: the other kernels take over earlier.
    assert first(33, 1024, 4096, (8, 0)) == "triton_gemm" and first(33, 4096, 4096, (8, 0)) == "cuda_mma"
    assert first(65, 1024, 4096, (8, 0)) == "panels" and first(65, 4096, 4096, (8, 0)) == "triton_gemm"
    # On a GPU of 20 multiprocessors a quarter of the rows is enough.
    assert choose.candidates(BF16, 33, (8, 0), (1024, 4096), 20)[0] == "cuda_mma"
    # wgmma: the larger the matrix, the more tokens.
    assert first(128, 1024, 4096) == first(256, 4096, 4096) == first(512, 16384, 4096) == "cuda_wgmma"
    assert first(129, 1024, 4096) == first(257, 4096, 4096) == first(513, 16384, 4096) == "panels"


def test_forcing(monkeypatch):
    monkeypatch.setenv(choose.VARIABLE, "panels")
    assert choose.candidates(BF16, 1, (9, 0))[0] == "panels"
    monkeypatch.setenv(choose.VARIABLE, "marlin")
    with pytest.raises(ValueError, match="OCTAVO_GPU_LINEAR=marlin: expected one of cuda_mma"):
        choose.candidates(BF16, 1, (9, 0))


@pytest.mark.parametrize(
    "name, dtype, tokens, matrix, capability, reason",
    [
        ("cuda_mma", BF16, 64, on_gpu(), (9, 0), None),
        ("cuda_mma", BF16, 257, on_gpu(), (9, 0), "257 tokens are more than 256"),
        ("cuda_mma", F16, 1, on_gpu(), (7, 5), "from compute capability 8.0 on"),
        ("cuda_mma", F32, 1, on_gpu(), (9, 0), "tensor cores take float16 and bfloat16"),
        ("cuda_wgmma", F16, 5000, on_gpu(), (9, 0), None),
        ("cuda_wgmma", F16, 64, on_gpu(), (8, 0), "on compute capability 9.0"),
        ("cuda_wgmma", F32, 64, on_gpu(), (9, 0), "wgmma takes float16 and bfloat16"),
        ("cuda_wgmma", F16, 64, on_gpu(columns=1001), (9, 0), "not a multiple of 16"),
        ("cuda_simt", F32, 8, on_gpu(), (7, 0), None),
        ("cuda_simt", F16, 9, on_gpu(), (7, 0), "more than 8"),
        ("cuda_simt", F16, 1, on_gpu(columns=1001), (9, 0), "not a multiple of 16"),
        ("cuda_simt", F16, 1, on_gpu(block=96), (9, 0), "not a power of two"),
        ("cuda_simt", F16, 1, on_gpu(address=8), (9, 0), "multiple of 16 bytes"),
        ("cuda_simt", F16, 1, on_gpu(contiguous=False), (9, 0), "not contiguous"),
        ("triton_gemv", F16, 2, on_gpu(), (9, 0), "one token"),
        ("triton_gemm", F16, 2, on_gpu(), (6, 1), "7.0"),
        ("panels", F32, 5000, on_gpu(columns=1001, block=96), (6, 1), None),
    ],
)
def test_refusals(name, dtype, tokens, matrix, capability, reason, monkeypatch):
    monkeypatch.setattr(choose, "capability", lambda index: capability)
    monkeypatch.setattr(choose, "have_triton", lambda: True)
    qdata, absmax, block = matrix
    why_not = choose.refusal(name, dtype, tokens, qdata, absmax, block)
    assert (why_not is None) == (reason is None)
    assert reason is None or reason in why_not


def test_tilings_give_every_multiprocessor_a_block(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_multiprocessors", lambda device: 132)
    assert cuda_kernels.mma_tiling(1, 4096, 0) == (1, 1, 2)
    assert cuda_kernels.mma_tiling(1, 16384, 0) == (2, 1, 2)
    assert cuda_kernels.mma_tiling(32, 16384, 0) == (2, 2, 1)
    assert cuda_kernels.mma_tiling(32, 4096, 0) == (1, 1, 2)
    assert cuda_kernels.mma_tiling(64, 50400, 0) == (2, 4, 2)
    assert cuda_kernels.simt_tiling(1, 8448, 0) == (4, 1)
    assert cuda_kernels.simt_tiling(1, 8447, 0) == (2, 4)
    assert cuda_kernels.simt_tiling(5, 8448, 0) == (2, 2)


def test_columns_are_split_until_every_multiprocessor_has_a_block():
    # tokens, rows, columns, tokens a block -> shares
    for case, splits in {
        (64, 4096, 4096, 64): 4,
        (64, 16384, 4096, 64): 1,
        (64, 14336, 4096, 64): 1,
        (64, 1024, 4096, 64): 16,
        (300, 1024, 4096, 256): 8,
        # No share of less than 256 columns.
        (64, 128, 1024, 64): 4,
        (64, 128, 64, 64): 1,
        (2048, 50400, 4096, 256): 1,
    }.items():
        assert wgmma.splits_for(*case, 132) == splits, case
    assert wgmma.tiling(33)[0] == 64 and wgmma.tiling(65)[0] == 128 and wgmma.tiling(1000)[0] == 256


@pytest.mark.parametrize("columns", [4096, 11008, 2880, 1600, 1001, 16384, 768])
def test_instances_are_checked_on_rows_that_compile_alike(columns):
    from octavo.ops.triton.choose import like

    # What Triton's kernels are compiled for: divisibility by 16, and whole steps of BLOCK_K.
    for factor in (16, 64, 128, 512):
        assert (like(columns) % factor == 0) == (columns % factor == 0)


def test_without_a_gpu_the_status_says_so():
    if not torch.cuda.is_available():
        assert triton.status()["active"] == "none"


def right(x, qdata, absmax, code, block_size, bias, out):
    out.copy_(reference.linear(x, qdata, absmax, code, block_size, bias))


def test_a_right_kernel_passes_its_check():
    for dtype in (F32, F16, BF16):
        finding = verify.check_linear(right, 3, 1037, 64, dtype, F16, torch.device("cpu"))
        assert finding.startswith("error ")


@pytest.mark.parametrize("fault", ["a row left out", "one bias too many", "halves of a block swapped", "NaN"])
def test_a_wrong_kernel_does_not(fault):
    def wrong(x, qdata, absmax, code, block_size, bias, out):
        if fault == "halves of a block swapped":
            qdata = torch.cat([qdata[:, 32:64], qdata[:, :32], qdata[:, 64:]], 1)
        right(x, qdata, absmax, code, block_size, bias, out)
        if fault == "a row left out":
            out[:, -1] = 0
        elif fault == "one bias too many":
            out += bias
        elif fault == "NaN":
            out[0, 0] = float("nan")

    for dtype in (F32, F16, BF16):
        with pytest.raises(verify.Disagreement):
            verify.check_linear(wrong, 2, 1040, 64, dtype, F16, torch.device("cpu"))


def test_decoding_and_encoding_are_checked_exactly():
    def decode(qdata, absmax, code, block_size, ids, first, out):
        dense = reference.dequantize(qdata, absmax, code, block_size, out.dtype)
        dense = dense if ids is None else dense[ids]
        out.copy_(dense[:, first : first + out.shape[1]])

    def off(*arguments):
        decode(*arguments)
        arguments[-1][0, 0] *= 1.01

    cpu = torch.device("cpu")
    assert verify.check_decode(decode, 1040, 64, F16, F16, cpu) == "bit for bit"
    with pytest.raises(verify.Disagreement, match="weights differ"):
        verify.check_decode(off, 1040, 64, F16, F16, cpu)
    assert verify.check_encode(reference.quantize, reference.histogram, 64, F16, F32, cpu) == "byte for byte"
    with pytest.raises(verify.Disagreement):
        verify.check_encode(reference.quantize, lambda *a: reference.histogram(*a).roll(1), 64, F16, F32, cpu)


def test_what_fails_is_named_once_and_left_out(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls = []

    def check():
        calls.append(1)
        raise nvrtc.CompilationFailed("no such instruction")

    with pytest.warns(RuntimeWarning, match="GPU kernel fast is not used .*no such instruction"):
        assert not verify.trusted("fast", gpu, ("float16",), check)
    assert not verify.trusted("fast", gpu, ("float16",), check)
    assert len(calls) == 1
    assert verify.trusted("fast", gpu, ("bfloat16",), lambda: "fine")
    assert verify.verdicts() == {
        "fast, cuda:0, float16": (False, "CompilationFailed: no such instruction"),
        "fast, cuda:0, bfloat16": (True, "fine"),
    }


def test_nothing_is_checked_during_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="while a CUDA graph is captured"):
        assert not verify.trusted("fast", torch.device("cuda", 0), ("float16",), lambda: "fine")
    assert verify.verdicts() == {}


class Driver:
    """Stands for the CUDA driver: keeps what is launched; `contextless` launches fail first, as in a new thread."""

    def __init__(self, contextless: int = 0):
        self.contextless, self.launched, self.contexts = contextless, [], []

    def cuLaunchKernel(self, function, *rest):
        if self.contextless:
            self.contextless -= 1
            return nvrtc.INVALID_CONTEXT
        *sizes, stream, pointers, extra = rest
        packed = extra._obj
        assert (packed.buffer_follows, packed.size_follows, packed.end) == (1, 2, None)
        size = ctypes.cast(packed.size, ctypes.POINTER(ctypes.c_size_t))[0]
        address = ctypes.cast(ctypes.addressof(packed) + 8, ctypes.POINTER(ctypes.c_void_p))[0]
        self.launched.append((sizes, stream, pointers, ctypes.string_at(address, size)))
        return 0

    def cuCtxSetCurrent(self, context):
        self.contexts.append(context.value)
        return 0


def kernel_of(driver, monkeypatch):
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "current_device", lambda: 0)
    monkeypatch.setattr(nvrtc, "raw_stream", lambda device: 77)
    kernel = object.__new__(nvrtc.Kernel)
    kernel.name, kernel.device, kernel._function = "linear_simt", 0, ctypes.c_void_p(1)
    kernel._context, kernel.shared = ctypes.c_void_p(9), 0
    return kernel


def test_a_launch_hands_over_pointers_and_integers(monkeypatch):
    driver = Driver()
    x = torch.zeros(4)
    kernel_of(driver, monkeypatch).launch(5, 256, x, None, 4096, -2, x)
    ((sizes, stream, pointers, packed),) = driver.launched
    assert (sizes, stream, pointers) == ([5, 1, 1, 256, 1, 1, 0], 77, None)

    class Arguments(ctypes.Structure):
        _fields_ = (
            ("x", ctypes.c_void_p),
            ("none", ctypes.c_void_p),
            ("number", ctypes.c_int),
            ("negative", ctypes.c_int),
            ("again", ctypes.c_void_p),
        )

    found = Arguments.from_buffer_copy(packed)
    assert len(packed) == ctypes.sizeof(Arguments)
    assert [getattr(found, name) for name, _ in Arguments._fields_] == [
        x.data_ptr(),
        None,
        4096,
        -2,
        x.data_ptr(),
    ]


def test_a_thread_without_a_context_is_given_the_modules(monkeypatch):
    driver = Driver(contextless=1)
    kernel_of(driver, monkeypatch).launch(5, 256, torch.zeros(4), 1)
    assert driver.contexts == [9] and len(driver.launched) == 1


def test_nvrtc_compiles_the_source():
    try:
        nvrtc._nvrtc()
    except nvrtc.CompilationFailed:
        pytest.skip("NVRTC is not installed (CPU builds of PyTorch come without it)")
    defines = ("-DX_TYPE=2", "-DSCALE=1", "-DM_TILES=1", "-DN_TILES=1", "-DDEPTH=2")
    assert nvrtc.compile_source(cuda_kernels.source("linear_mma"), 90, defines)
    with pytest.raises(nvrtc.CompilationFailed, match="M_TILES"):
        nvrtc.compile_source(cuda_kernels.source("linear_mma"), 90, ("-DX_TYPE=2", "-DSCALE=1"))
