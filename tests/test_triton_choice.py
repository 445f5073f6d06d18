"""Which GPU kernel a call gets, and that none is used that does not agree: the logic, without a GPU."""

import ctypes
import dataclasses
import functools
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from octavo.ops import gpu, reference
from octavo.ops.gpu import choose, cuda_launch, device, kernels, nvrtc, verify
from octavo.ops.gpu.kernel import Call, Instance, Kernel
from octavo.ops.gpu.kernels import cuda_mma, cuda_simt, cuda_wgmma

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CPU, CHECK_LINEAR = torch.device("cpu"), verify.check_linear


@pytest.fixture(autouse=True)
def _no_forcing(monkeypatch):
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    monkeypatch.setattr(verify, "_verdicts", {})


def on_gpu(dtype=BF16, tokens=1, capability=(9, 0), rows=4096, columns=4096, block=64, **rest):
    """A product on a GPU."""
    return Call(
        dtype=dtype,
        tokens=tokens,
        rows=rows,
        columns=columns,
        block_size=block,
        device=torch.device("cuda", 0),
        capability=capability,
        **rest,
    )


def names(call):
    return [kernel.name for kernel in choose.tried("linear", call)]


needs_triton = pytest.mark.skipif(not device.have_triton(), reason="Triton is not installed")


CAPABILITIES = [(6, 1), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)]
SHAPES = [(1024, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_what_is_tried(rows, columns, capability, dtype):
    """Where kernels take over from each other is tuned (docs/GPU.md); what may be tried at all is not."""
    before: set[str] = set()
    for tokens in (1, 2, 8, 9, 16, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513):
        found = names(on_gpu(dtype, tokens, capability, rows, columns))
        assert found[-1] == "panels" and len(set(found)) == len(found)
        if dtype == F32 or capability != (9, 0):
            assert "cuda_wgmma" not in found
        if dtype == F32 or capability < (8, 0):
            assert "triton_gemm" not in found
        # A kernel for few tokens does not come back for more, once another has taken over.
        few = set(found) - {"cuda_wgmma", "panels"}
        assert tokens == 1 or few <= before
        before = few
        assert found == ["panels"] or tokens <= 512
    # The kernel for one token of a 16-bit type is one that can compute it.
    first = choose.tried("linear", on_gpu(dtype, 1, capability, rows, columns))[0]
    assert first.name.startswith("cuda_")


def test_forcing(monkeypatch):
    monkeypatch.setenv(choose.VARIABLE, "panels")
    assert names(on_gpu())[0] == "panels"
    monkeypatch.setenv(choose.VARIABLE, "marlin")
    with pytest.raises(ValueError, match="OCTAVO_GPU_LINEAR=marlin: expected one of cuda_mma"):
        names(on_gpu())


@pytest.mark.parametrize(
    "name, call, reason",
    [
        ("cuda_mma", on_gpu(BF16, 64, (9, 0)), None),
        ("cuda_mma", on_gpu(BF16, 257, (9, 0)), "257 tokens are more than 256"),
        ("cuda_mma", on_gpu(F16, 1, (7, 5)), None),
        ("cuda_mma", on_gpu(F16, 1, (7, 0)), "float16 from compute capability 7.5 on"),
        ("cuda_mma", on_gpu(BF16, 1, (7, 5)), "bfloat16 from 8.0 on"),
        ("cuda_mma", on_gpu(F32, 1, (9, 0)), "tensor cores take float16"),
        ("cuda_wgmma", on_gpu(F16, 5000, (9, 0)), None),
        ("cuda_wgmma", on_gpu(F16, 64, (8, 0)), "on compute capability 9.0"),
        ("cuda_wgmma", on_gpu(F32, 64, (9, 0)), "wgmma takes float16 and bfloat16"),
        ("cuda_wgmma", on_gpu(F16, 64, (9, 0), columns=1001), "not a multiple of 16"),
        ("cuda_simt", on_gpu(F32, 8, (7, 0)), None),
        ("cuda_simt", on_gpu(F16, 9, (7, 0)), "more than 8"),
        ("cuda_simt", on_gpu(F16, 1, (9, 0), columns=1001), "not a multiple of 16"),
        ("cuda_simt", on_gpu(F16, 1, (9, 0), block=96), "not a power of two"),
        ("cuda_simt", on_gpu(F16, 1, (9, 0), aligned=False), "multiple of 16 bytes"),
        ("cuda_simt", on_gpu(F16, 1, (9, 0), contiguous=False), "not contiguous"),
        ("triton_gemv", on_gpu(F16, 2, (9, 0)), "one token"),
        ("triton_gemm", on_gpu(F16, 2, (6, 1)), "7.0"),
        ("panels", on_gpu(F32, 5000, (6, 1), columns=1001, block=96), None),
    ],
)
def test_unsupported_reasons(name, call, reason):
    if name.startswith("triton") and not device.have_triton():
        pytest.skip("Triton is not installed")
    why_not = kernels.named()[name].unsupported_reason(call)
    assert (why_not is None) == (reason is None)
    assert reason is None or reason in why_not


def test_a_kernel_is_one_file(tmp_path, monkeypatch):
    """A new file in `kernels/` is tried, checked and may be forced; nothing else has to know of it."""
    (tmp_path / "fast.py").write_text(
        "from octavo.ops.gpu.kernel import Kernel\n"
        "KERNEL = Kernel('fast', 'linear', 'a test', print, lambda call: None, lambda call: 1)\n"
    )
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    kernels.named.cache_clear()
    try:
        assert names(on_gpu())[0] == "fast" and choose.chosen("linear", on_gpu()).run is print
        monkeypatch.setenv(choose.VARIABLE, "cuda_mma")
        assert names(on_gpu())[:2] == ["cuda_mma", "fast"]
    finally:
        kernels.named.cache_clear()


@needs_triton
def test_the_tables_in_the_documentation_are_the_records():
    script = Path(__file__).parent.parent / "scripts" / "kernel_tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_record_bears_its_files_name():
    assert {name: kernel.name for name, kernel in kernels.named().items()} == {
        name: name for name in kernels.named()
    }
    assert {kernel.operation for kernel in kernels.named().values()} == {"linear", "decode", "encode"}
    for operation in ("linear", "decode", "encode"):
        last = choose.tried(operation, on_gpu(F32, 5000, (6, 1), columns=1001, block=96))[-1]
        assert last.unsupported_reason(on_gpu(F32, 5000, (6, 1), columns=1001, block=96)) is None


def test_without_triton_its_kernels_are_left_out(monkeypatch):
    monkeypatch.setattr(kernels, "named", lambda: {n: k for n, k in known.items() if "triton" not in n})
    known = dict.fromkeys(kernels.files()) | {
        name: Kernel(name, "linear", "", print, lambda call: None, lambda call: 1) for name in kernels.files()
    }
    monkeypatch.setenv(choose.VARIABLE, "triton_gemv")
    choose._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="triton_gemv cannot run here: Triton is not installed"):
        assert "triton_gemv" not in names(on_gpu())


@pytest.mark.parametrize("rows", [100, 1024, 4096, 16384, 50400])
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 32, 64])
def test_tilings_give_every_multiprocessor_a_block(tokens, rows):
    tiles, groups, _ = cuda_mma.tiling_for(tokens, rows, 132)
    # Warps share out a block's rows only as long as there is a block for each multiprocessor.
    assert groups == 1 or rows >= 132 * 16 * tiles * groups
    if tokens <= cuda_simt.MOST_TOKENS:
        each, _ = cuda_simt.tiling_for(tokens, rows, 132)
        small, _ = cuda_simt.tiling_for(tokens, 1, 132)
        assert each >= small


@pytest.mark.parametrize("rows", [128, 1024, 4096, 16384])
@pytest.mark.parametrize("columns", [64, 1024, 4096, 16384])
@pytest.mark.parametrize("tokens", [33, 64, 128, 300, 2048])
def test_columns_are_split_until_every_multiprocessor_has_a_block(tokens, rows, columns):
    tile = cuda_wgmma.tiling_for(tokens)[0]
    splits = cuda_wgmma.splits_for(tokens, rows, columns, tile, 132)
    blocks = -(-tokens // tile) * -(-rows // cuda_wgmma.ROWS)
    assert splits == 1 or blocks * splits <= 132
    # No split is shorter than LEAST_STEPS, and one more would be, or would be a block too many.
    steps = -(-columns // cuda_wgmma.COLUMNS)
    assert splits == 1 or steps // splits >= cuda_wgmma.LEAST_STEPS
    more = splits + 1
    assert blocks * more > 132 or steps // more < cuda_wgmma.LEAST_STEPS


@pytest.mark.parametrize("columns", [4096, 11008, 2880, 1600, 1001, 16384, 768])
def test_instances_are_checked_on_rows_that_compile_alike(columns):
    pytest.importorskip("triton")
    from octavo.ops.gpu.triton_tables import checked_columns

    # What Triton's kernels are compiled for: divisibility by 16, and whole steps of BLOCK_K.
    for factor in (16, 64, 128, 512):
        assert (checked_columns(columns) % factor == 0) == (columns % factor == 0)


def test_without_a_gpu_the_status_says_so():
    if not torch.cuda.is_available():
        assert gpu.status()["active"] == "none"


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
    assert verify.check_encode(reference, 1037, 64, F16, F32, cpu) == "byte for byte"
    with pytest.raises(verify.Disagreement):
        off = SimpleNamespace(
            quantize=reference.quantize, histogram=lambda *a: reference.histogram(*a).roll(1)
        )
        verify.check_encode(off, 1037, 64, F16, F32, cpu)


def checked(run) -> Kernel:
    """A kernel for products whose check runs `run`."""
    return Kernel(
        name="fast",
        operation="linear",
        summary="",
        run=run,
        unsupported_reason=lambda call: None,
        place=lambda call: 1,
        instance=lambda call: Instance(run, 1040, tuning="tall"),
    )


def test_what_fails_is_named_once_and_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(verify, "check_linear", lambda run, *rest: run(*rest))
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        raise nvrtc.CompilationFailed("no such instruction")

    with pytest.warns(RuntimeWarning, match="GPU kernel fast is not used .*no such instruction"):
        assert not verify.trusted(checked(fails), on_gpu(F16))
    assert not verify.trusted(checked(fails), on_gpu(F16))
    assert calls == [(1, 1040, 64, F16, F16, torch.device("cuda", 0), False)]
    assert verify.trusted(checked(lambda *arguments: "fine"), on_gpu(BF16))
    case = "torch.float16, 1 tokens, block 64, tall, columns 1040"
    assert verify.verdicts() == {
        f"fast, cuda:0, torch.float16, {case}": (False, "CompilationFailed: no such instruction"),
        f"fast, cuda:0, torch.bfloat16, {case}": (True, "fine"),
    }


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("operation", ["linear", "decode", "encode"])
def test_every_operation_is_checked_with_what_its_check_takes(operation, segments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    name = f"check_{operation}"
    signature, seen = inspect.signature(getattr(verify, name)), []

    def check(*arguments):
        seen.append(signature.bind(*arguments).arguments)
        return "fine"

    monkeypatch.setattr(verify, name, check)
    made = Instance(None, 1040, tuning=f"only here, {segments}", segments=segments)
    record = dataclasses.replace(checked(None), operation=operation, instance=lambda call: made)
    assert verify.trusted(record, on_gpu(F16))
    assert seen[0]["dtype"] == F16 and seen[0]["device"] == torch.device("cuda", 0)
    assert seen[0].get("segments", False) == (segments and operation != "encode")


def test_segments_that_fail_their_check_leave_the_kernel_its_table(monkeypatch):
    """The same kernel comes next, not a slower one; what failed is listed for `octavo doctor`."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = []

    def run(x, qdata, absmax, code, block_size, bias, out, segments=False):
        if segments:
            raise nvrtc.CompilationFailed("no such instruction")
        right(x, qdata, absmax, code, block_size, bias, out)

    record = dataclasses.replace(
        checked(run),
        instance=lambda call: Instance(
            functools.partial(run, segments=call.segments), 1040, segments=call.segments
        ),
        bind=lambda call: made.append(call.segments),
        segmented=lambda call: call.tokens == 1,
    )
    monkeypatch.setattr(kernels, "named", lambda: {"fast": record})
    monkeypatch.setattr(
        verify, "check_linear", lambda run, *rest: CHECK_LINEAR(run, *rest[:5], CPU, *rest[6:])
    )
    with pytest.warns(RuntimeWarning, match="fast is not used for .*segments.*no such instruction"):
        kernel = choose.chosen("linear", on_gpu(F16, segments=True))
    assert kernel.name == "fast" and kernel.run is run
    kernel.bind(on_gpu(F16))
    (failed, why), (table, good) = verify.verdicts().items()
    assert "segments" in failed and why == (False, "CompilationFailed: no such instruction")
    assert "segments" not in table and good[0]
    # Where it works, it is what runs, and its launch is bound as such.
    monkeypatch.setattr(verify, "_verdicts", {})
    monkeypatch.setattr(verify, "trusted", lambda kernel, call: True)
    kernel = choose.chosen("linear", on_gpu(F16, segments=True))
    assert kernel.run.keywords == {"segments": True}
    kernel.bind(on_gpu(F16))
    assert made == [False, True]
    # Not for more tokens, where the record says that the table is better; and not for a table.
    for call in (on_gpu(F16, 2, segments=True), on_gpu(F16)):
        assert choose.chosen("linear", call).run is run


@pytest.mark.parametrize(
    "capability, one_token, rows",
    [
        ((6, 0), False, False),  # instructions are the bound
        ((6, 1), True, True),
        ((7, 5), True, True),
        ((8, 0), False, False),
        ((8, 9), True, True),
        ((9, 0), False, False),  # measured with tables
    ],
)
def test_where_segments_are_computed(capability, one_token, rows):
    known = kernels.named()
    call = on_gpu(F16, 1, capability, segments=True)
    assert [its.segments for _, its in known["cuda_simt"].variants(call)] == [True, False][not one_token :]
    assert [its.segments for _, its in known["cuda_decode"].variants(call)] == [True, False][not rows :]
    # A table has one way only, and so have kernels that leave it to others.
    for kernel in known.values():
        assert [its.segments for _, its in kernel.variants(on_gpu(F16, 1, capability))] == [False]


def test_nothing_is_checked_during_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="while a CUDA graph is captured"):
        assert not verify.trusted(checked(right), on_gpu(F16))
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
    kernel = object.__new__(nvrtc.Compiled)
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
    source = cuda_launch.source(*cuda_launch.COMMON, "linear_mma")
    defines = ("-DX_TYPE=2", "-DSCALE=1", "-DM_TILES=1", "-DN_TILES=1", "-DDEPTH=2")
    assert nvrtc.compile_source(source, 90, defines)
    with pytest.raises(nvrtc.CompilationFailed, match="M_TILES"):
        nvrtc.compile_source(source, 90, ("-DX_TYPE=2", "-DSCALE=1"))
