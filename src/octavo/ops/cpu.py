"""The operations of `octavo.ops` on CPUs, by the native kernels of `octavo._native` (sources in csrc/).

Importing this registers them. Without the native module, or with the environment variable OCTAVO_CPU_ISA=none, nothing is
registered and the plain-PyTorch definitions stay in charge; `status()` tells which, and why. OCTAVO_CPU_ISA=vbmi, avx512, avx2
or portable picks kernels, for tests.

The functions take what `octavo.ops.schema` describes. `linear_fast` is `linear` for callers that have checked their
tensors once and for all: no dispatcher, no checks, no gradient.

Example:
    >>> import octavo.ops.cpu as cpu
    >>> sorted(cpu.status())
    ['active', 'pool', 'reason', 'supported', 'threads']
"""

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import reference
from .schema import implementation

try:
    from octavo import _native

    _import_error = None
except ImportError as error:
    _native = None
    _import_error = str(error)

ISA_VARIABLE = "OCTAVO_CPU_ISA"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Most tokens for the fused product; more go through panels of de-quantized rows and PyTorch's matmul. Measured on one core of
# a Zen 5, 2048 x 2048, ms a call, fused against panels:
#   bfloat16   8: 0.39 / 0.61   16: 0.77 / 0.74   24: 1.15 / 0.85
#   float32    8: 0.66 / 1.2    24: 1.9 / 2.4     32: 2.6 / 3.0     64: 5.6 / 6.3 (4096 x 4096: 25 / 24)
#   float16    8: 0.41 / 1.3    24: 1.2 / 2.4     32: 1.6 / 3.1, and so on in proportion (panels in float32: PyTorch's float16
#              takes 9.5 at 32)
_FUSED_TOKENS = {torch.bfloat16: 14, torch.float32: 32, torch.float16: 1 << 40}
# The same for avx2, neon and portable, where looking a code up costs more: on avx2, 2048 x 2048, bfloat16, one core of a Zen 5:
# 4: 1.2 / 1.7   8: 2.3 / 1.9.
_FUSED_TOKENS_SLOW = 4
# Most tokens for the fused product with the transposed matrix, measured as above in bfloat16: 4: 0.52 / 0.60, 8: 0.86 / 0.71.
_FUSED_TOKENS_TRANSPOSED = 6
# Bytes of a de-quantized panel: it should stay in the second-level caches. Measured as above, 8192 x 2048, 512 tokens of
# bfloat16, against PyTorch on a dense matrix: 0.5 MB 0.986, 1 MB 1.007, 2 MB 1.008, 4 MB 1.004, 8 MB 0.964.
_PANEL_BYTES = 2 << 20
# Panels of columns start at multiples of this.
_COLUMN_STEP = 64

_requested = os.environ.get(ISA_VARIABLE, "").strip().lower()
_active = None


def _load() -> tuple[bool, str]:
    """Choose the kernels: whether native ones are used, and why."""
    if _requested == "none":
        return False, f"{ISA_VARIABLE}=none"
    if _native is None:
        return False, (
            f"the native kernels were not built ({_import_error}); reinstall where there is a C++17 compiler, with pip -v to "
            "see what fails"
        )
    if _requested:
        if _requested not in _native.supported():
            raise ValueError(
                f"{ISA_VARIABLE}={_requested}: expected none or one of {', '.join(_native.supported())} on this processor"
            )
        _native.select(_requested)
        why = f"{ISA_VARIABLE}={_requested}"
    else:
        features = _native.cpu_features()
        why = (
            f"the processor has {features}"
            if features
            else "no kernels for more than plain C++ on this processor"
        )
    _native.share_openmp_of(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return True, why


AVAILABLE, _reason = _load()


def status() -> dict[str, object]:
    """Which kernels run on the CPU, and why.

    Returns:
        active: name of the kernels, "reference" for plain PyTorch; reason; supported: names that could be chosen, best
        first; threads; pool: what runs them.
    """
    return {
        "active": _native.active() if AVAILABLE else "reference",
        "reason": _reason,
        "supported": list(_native.supported()) if _native is not None else [],
        "threads": torch.get_num_threads(),
        "pool": _native.pool() if AVAILABLE else "PyTorch",
    }


def _matrix(qdata, absmax, code, block_size):
    """The arguments by which the native functions take a matrix. The tensors must outlive the call and be contiguous."""
    rows, columns = qdata.shape
    return (
        qdata.data_ptr(),
        absmax.data_ptr(),
        absmax.dtype is torch.float16,
        code.data_ptr(),
        rows,
        columns,
        block_size,
    )


def _panel_types() -> dict[torch.dtype, torch.dtype]:
    """In which type panels are multiplied, by the type of the input.

    PyTorch multiplies float16 slowly on every x86, and bfloat16 on those without instructions for it.
    """
    types = {torch.float32: torch.float32, torch.float16: torch.float32, torch.bfloat16: torch.bfloat16}
    features = _native.cpu_features() if _native is not None else ""
    if "avx" in features and "avx512_bf16" not in features:
        types[torch.bfloat16] = torch.float32
    return types


_PANEL_TYPES = _panel_types()


def _fused_tokens() -> dict[torch.dtype, int]:
    if _native is None or _native.active() in ("avx2", "neon", "portable"):
        return dict.fromkeys(_TYPES, _FUSED_TOKENS_SLOW)
    return _FUSED_TOKENS


FUSED_TOKENS = _fused_tokens()


def linear_fast(x, qdata, absmax, code, block_size, bias=None):
    """`octavo.ops.linear` on CPU tensors, without checks, gradient or dispatcher. See there for shapes."""
    rows, columns = qdata.shape
    dtype = x.dtype
    if not rows or not columns:
        out = torch.zeros((*x.shape[:-1], rows), dtype=dtype)
        return out if bias is None else out + bias.to(dtype)
    tokens = x.numel() // columns
    if tokens > FUSED_TOKENS[dtype]:
        return _linear_panels(x, qdata, absmax, code, block_size, bias)
    out = torch.empty((*x.shape[:-1], rows), dtype=dtype)
    # A name for each, so that a copy lives as long as its address is used.
    x, qdata, absmax, code = x.contiguous(), qdata.contiguous(), absmax.contiguous(), code.contiguous()
    bias_pointer = bias_type = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_pointer, bias_type = bias.data_ptr(), _TYPES[bias.dtype]
    _native.linear(
        qdata.data_ptr(),
        absmax.data_ptr(),
        absmax.dtype is torch.float16,
        code.data_ptr(),
        rows,
        columns,
        block_size,
        x.data_ptr(),
        _TYPES[dtype],
        tokens,
        bias_pointer,
        bias_type,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _panel_rows(columns: int, dtype: torch.dtype) -> int:
    return max(64, _PANEL_BYTES // (columns * dtype.itemsize) // 64 * 64)


def _linear_panels(x, qdata, absmax, code, block_size, bias):
    """Many tokens: a panel of rows is de-quantized into a buffer that stays in cache and multiplied by PyTorch."""
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    rows, columns = qdata.shape
    dtype = _PANEL_TYPES[x.dtype]
    flat = x.reshape(-1, columns).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    step = min(_panel_rows(columns, dtype), rows)
    panel = torch.empty((step, columns), dtype=dtype)
    matrix = _matrix(qdata, absmax, code, block_size)
    threads, kind, pointer = torch.get_num_threads(), _TYPES[dtype], panel.data_ptr()
    if step == rows:
        _native.dequantize(*matrix, 0, rows, 0, columns, pointer, kind, threads)
        return F.linear(flat, panel, bias).to(x.dtype).view(*x.shape[:-1], rows)
    out = torch.empty((flat.shape[0], rows), dtype=dtype)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        _native.dequantize(*matrix, start, stop, 0, columns, pointer, kind, threads)
        weight, part = panel[: stop - start].t(), out[:, start:stop]
        if bias is None:
            torch.mm(flat, weight, out=part)
        else:
            torch.addmm(bias[start:stop], flat, weight, out=part)
    return out.to(x.dtype).view(*x.shape[:-1], rows)


def linear_transposed_fast(x, qdata, absmax, code, block_size):
    """`octavo.ops.linear_transposed` on CPU tensors, without checks or gradient. See there for shapes."""
    rows, columns = qdata.shape
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    tokens = x.numel() // rows if rows else 0
    if not tokens or not columns:
        return torch.zeros((*x.shape[:-1], columns), dtype=x.dtype)
    matrix = _matrix(qdata, absmax, code, block_size)
    threads = torch.get_num_threads()
    if tokens <= _FUSED_TOKENS_TRANSPOSED:
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype)
        _native.linear_transposed(*matrix, x.data_ptr(), _TYPES[x.dtype], tokens, out.data_ptr(), threads)
        return out
    # Panels of columns: each sum over the rows is one matmul's, in float32.
    dtype = _PANEL_TYPES[x.dtype]
    flat = x.reshape(-1, rows).to(dtype)
    out = torch.empty((tokens, columns), dtype=dtype)
    step = min(_panel_rows(rows, dtype), -(-columns // _COLUMN_STEP) * _COLUMN_STEP)
    panel = torch.empty(rows * step, dtype=dtype)
    pointer, kind = panel.data_ptr(), _TYPES[dtype]
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        width = stop - start
        _native.dequantize(*matrix, 0, rows, start, stop, pointer, kind, threads)
        torch.mm(flat, panel[: rows * width].view(rows, width), out=out[:, start:stop])
    return out.to(x.dtype).view(*x.shape[:-1], columns)


def dequantize(qdata, absmax, code, block_size, dtype):
    """The whole matrix [N, K] in `dtype`."""
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    rows, columns = qdata.shape
    out = torch.empty((rows, columns), dtype=dtype)
    _native.dequantize(
        *_matrix(qdata, absmax, code, block_size),
        0,
        rows,
        0,
        columns,
        out.data_ptr(),
        _TYPES[dtype],
        torch.get_num_threads(),
    )
    return out


def embedding(ids, qdata, absmax, code, block_size, dtype):
    """Rows `ids` [...] of the matrix → [..., K]. Raises IndexError for an id outside it."""
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    columns = qdata.shape[1]
    out = torch.empty((*ids.shape, columns), dtype=dtype)
    bad = _native.embedding(
        *_matrix(qdata, absmax, code, block_size),
        flat.data_ptr(),
        flat.shape[0],
        out.data_ptr(),
        _TYPES[dtype],
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise IndexError(
            f"octavo.embedding: id {int(flat[bad])} is outside the table's {qdata.shape[0]} rows"
        )
    return out


def _weight(weight):
    """A weight the native functions read: contiguous, and float32 where it is of no type they know."""
    return (weight if weight.dtype in _TYPES else weight.to(torch.float32)).contiguous()


def _raise_not_finite(operation, weight):
    bad = int((~torch.isfinite(weight)).sum())
    raise ValueError(f"octavo.{operation}: the weight holds {bad} NaN or infinite values")


def quantize(weight, code, block_size, absmax_dtype):
    """qdata uint8 [N, K] and absmax [N, ceil(K / B)], the bytes of `reference.quantize`."""
    weight, code = _weight(weight), code.contiguous()
    rows, columns = weight.shape
    qdata = torch.empty((rows, columns), dtype=torch.uint8)
    absmax = torch.empty((rows, -(-columns // block_size)), dtype=absmax_dtype)
    finite = _native.quantize(
        weight.data_ptr(),
        _TYPES[weight.dtype],
        rows,
        columns,
        code.data_ptr(),
        block_size,
        absmax_dtype is torch.float16,
        qdata.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    if not finite:
        _raise_not_finite("quantize", weight)
    return qdata, absmax


def scale_range(weight, block_size) -> tuple[float, float]:
    """Smallest positive and largest scale of the blocks of a weight [N, K]; (0, 0) if all are zero.

    Raises:
        ValueError: if the weight holds NaN or infinity.
    """
    weight = _weight(weight)
    rows, columns = weight.shape
    found = _native.scale_range(
        weight.data_ptr(), _TYPES[weight.dtype], rows, columns, block_size, torch.get_num_threads()
    )
    if found is None:
        _raise_not_finite("scale_range", weight)
    return found


def read_bandwidth(size: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second that the memory delivers to all threads together: the best of some passes over `size` bytes."""
    memory = torch.ones(size // 8, dtype=torch.int64)
    threads, best = torch.get_num_threads(), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        _native.read_through(memory.data_ptr(), size, threads)
        best = min(best, time.perf_counter() - start)
    return size / best


def histogram(weight, block_size, bins, absmax_dtype):
    """int64 [bins], the numbers of `reference.histogram`."""
    weight = _weight(weight)
    rows, columns = weight.shape
    counts = torch.empty(bins, dtype=torch.int64)
    finite = _native.histogram(
        weight.data_ptr(),
        _TYPES[weight.dtype],
        rows,
        columns,
        block_size,
        bins,
        absmax_dtype is torch.float16,
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    if not finite:
        _raise_not_finite("histogram", weight)
    return counts


def _linear(x, qdata, absmax, code, block_size, bias=None):
    if bias is not None and bias.dtype not in _TYPES:
        return reference.linear(x, qdata, absmax, code, block_size, bias)
    return linear_fast(x, qdata, absmax, code, block_size, bias)


if AVAILABLE:
    implementation("linear", "CPU")(_linear)
    implementation("linear_transposed", "CPU")(linear_transposed_fast)
    implementation("dequantize", "CPU")(dequantize)
    implementation("embedding", "CPU")(embedding)
    implementation("quantize", "CPU")(quantize)
    implementation("histogram", "CPU")(histogram)
