"""Products with a quantized matrix and with its transpose: fused for a few tokens, by tiles or panels for a block.

The panels are multiplied by PyTorch, or, for bfloat16 where the processor has instructions for it, by the kernels themselves.

Shapes are those of `octavo.ops.schema`. `linear_fast` and `linear_transposed_fast` are for callers that have checked their
tensors once and for all: no dispatcher, no checks, no gradient.

Example:
    >>> import torch
    >>> from octavo import codebook, ops
    >>> code = codebook.dynamic()
    >>> qdata, absmax = ops.quantize(torch.randn(16, 256), code, 64)
    >>> ops.linear(torch.randn(3, 256), qdata, absmax, code, 64).shape
    torch.Size([3, 16])
"""

import os
import threading

import torch
import torch.nn.functional as F

from . import native
from .native import TYPES

# Most tokens for the fused product, row by row as the weights are read; more go by the kernels' product of a block of tokens
# (GEMM), or through panels of de-quantized rows and PyTorch's matmul.
#
# In bfloat16 where the kernels have instructions for it (csrc/gemm_bf16.h), against that product. Cycles for 64 weights on one
# core of a Zen 5:
#            from cache      from memory
#   tokens   fused   GEMM    fused   GEMM
#        8   26.5    25.5    26      31
#       16   53      34
_FUSED_TOKENS_BEFORE_GEMM = 8
# Most tokens for that product; more are taken in groups of 512 (csrc/types.h), each of which decodes the weights again. Time over
# PyTorch's with a dense matrix, two cores of a Zen 5:
#            8192 x 2048      2048 x 8192
#   tokens   GEMM   panels    GEMM   panels
#      512   1.02   1.03      1.00   1.07
#     1024   1.02   1.01      1.02   1.02
#     2048   1.11   1.01      1.16   1.01
_GEMM_TOKENS = 512
# On processors with matrix tiles (AMX), which PyTorch uses and these kernels do not, panels take over at what its packing of a
# panel costs, an estimate that is not measured.
_GEMM_TOKENS_TILES = 32
# For a codebook of free entries, against panels. Milliseconds per call, fused / panels, 2048 x 2048, one core of a Zen 5:
#   tokens     8             16            24            32          64
#   bfloat16   0.39 / 0.61   0.77 / 0.74   1.15 / 0.85
#   float32    0.66 / 1.2                  1.9 / 2.4     2.6 / 3.0   5.6 / 6.3 (4096 x 4096: 25 / 24)
#   float16    0.41 / 1.3                  1.2 / 2.4     1.6 / 3.1   and so on in proportion
# (float16's panels are in float32: PyTorch's float16 takes 9.5 at 32 tokens.)
_ALWAYS = 1 << 40
_FUSED_TOKENS_FREE = {torch.bfloat16: 14, torch.float32: 32, torch.float16: _ALWAYS}
# The same where free entries are looked up slowly (avx2, neon, portable). On avx2 in bfloat16:
#   tokens     4             8
#              1.2 / 1.7     2.3 / 1.9
_FUSED_TOKENS_SLOW = 4
# On AVX2 for a codebook of segments, against its product by tiles (csrc/tiles256.h). One core of a Zen 4 that others used too,
# 4096 x 4096, processor time of PyTorch's float32 (with AVX-512) over ours, fused / tiles:
#   tokens      4          8          12         16         32         96    512
#   float32     2.58/1.41  1.56/1.30  1.32/1.34  1.16/1.31  0.90/1.21  1.22  1.12
#   bfloat16    3.90/1.93  2.47/1.88  1.98/1.79  1.80/1.72  1.42/1.62  1.59  1.53
#   float16     3.92/1.81  2.51/1.69  2.00/1.66  1.76/1.57  1.35/1.48  1.47  1.45
_FUSED_TOKENS_TILES = {torch.float32: 11, torch.bfloat16: 19, torch.float16: 24}
# Most tokens for the fused product with the transposed matrix. Likewise, in bfloat16:
#   tokens     4             8
#              0.52 / 0.60   0.86 / 0.71
_FUSED_TOKENS_TRANSPOSED = 6
# Rows of a de-quantized panel, and the most bytes of one: half of the third-level cache of the processor measured on. The input
# is read anew for each panel, so few rows cost time. Time over PyTorch's with a dense matrix, two cores of a Zen 5, bfloat16:
#   panels of MB                            2      4      8      16     32
#   2048 x 8192, 2048 tokens                1.19   1.08   1.02   1.03   1.13
#   8192 x 2048, 2048 tokens                1.01   1.01   1.01   1.03   1.12
#   2048 x 8192, 1024 tokens                1.19   1.13   1.08   1.05   1.03
#   16384 x 4096 transposed, 1024 tokens    1.50   1.23   1.12   1.06   1.09
_PANEL_ROWS = 1024
_PANEL_BYTES = 16 << 20
# Panels of columns start at multiples of this.
_COLUMN_STEP = 64


def _panel_types() -> dict[torch.dtype, torch.dtype]:
    """In which type panels are multiplied, by the type of the input.

    PyTorch multiplies float16 slowly on every x86, and bfloat16 on those without instructions for it, or held to older ones
    together with the kernels (benchmarks/__init__.py).
    """
    types = {torch.float32: torch.float32, torch.float16: torch.float32, torch.bfloat16: torch.bfloat16}
    features = native.library.cpu_features() if native.library is not None else ""
    held = os.environ.get("OCTAVO_CPU_ISA", "vbmi_bf16") != "vbmi_bf16"
    if "avx" in features and (held or "avx512_bf16" not in features):
        types[torch.bfloat16] = torch.float32
    return types


_PANEL_TYPES = _panel_types()


_ISA = native.library.active() if native.library is not None else None


def _fused_tokens() -> tuple[dict[torch.dtype, int], dict[torch.dtype, int]]:
    """Most tokens for the fused product: with codebooks of segments, and of free entries."""
    if _ISA == "avx2":
        return _FUSED_TOKENS_TILES, dict.fromkeys(TYPES, _FUSED_TOKENS_SLOW)
    if _ISA in ("avx512", "vbmi"):
        return _FUSED_TOKENS_TILES | {torch.float32: 32}, _FUSED_TOKENS_FREE
    if _ISA == "vbmi_bf16":
        free = _FUSED_TOKENS_FREE | {torch.bfloat16: _FUSED_TOKENS_BEFORE_GEMM}
        return free | {torch.float16: _FUSED_TOKENS_TILES[torch.float16]}, free
    slow = dict.fromkeys(TYPES, _FUSED_TOKENS_SLOW)
    return slow, slow


def _gemm_tokens() -> dict[torch.dtype, int]:
    """Most tokens for a product by the kernels alone: by tiles, or in bfloat16 with instructions for it."""
    if _ISA == "avx2":
        return dict.fromkeys(TYPES, _ALWAYS)
    # Tiles in float32 are AVX2's, which a library that uses AVX-512 may outdo; those of integers do more at a time.
    if _ISA in ("avx512", "vbmi"):
        return dict.fromkeys(TYPES, _ALWAYS) | {torch.float32: 0}
    if _ISA == "vbmi_bf16":
        tiles = "amx_bf16" in native.library.cpu_features()
        most = _GEMM_TOKENS_TILES if tiles else _GEMM_TOKENS
        return {torch.float32: 0, torch.float16: _ALWAYS, torch.bfloat16: most}
    return dict.fromkeys(TYPES, 0)


FUSED_TOKENS, FUSED_TOKENS_FREE = _fused_tokens()
GEMM_TOKENS = _gemm_tokens()


def _fused(tokens: int, dtype: torch.dtype, code: torch.Tensor) -> bool:
    """Whether so few tokens are multiplied row by row, as the weights are read."""
    computed, free = FUSED_TOKENS[dtype], FUSED_TOKENS_FREE[dtype]
    if computed == free or tokens <= min(computed, free) or tokens > max(computed, free):
        return tokens <= computed
    return tokens <= (computed if native.library.segments(code.data_ptr()) else free)


def linear_fast(x, qdata, absmax, code, block_size, bias=None):
    """`octavo.ops.linear` on CPU tensors, without checks, gradient or dispatcher. See there for shapes."""
    rows, columns = qdata.shape
    dtype = x.dtype
    if not rows or not columns:
        out = torch.zeros((*x.shape[:-1], rows), dtype=dtype)
        return out if bias is None else out + bias.to(dtype)
    tokens = x.numel() // columns
    code = code.contiguous()
    if not _fused(tokens, dtype, code):
        if tokens <= GEMM_TOKENS[dtype]:
            out = _linear_gemm(x, qdata, absmax, code, block_size, bias, tokens)
            if out is not None:
                return out
        return _linear_panels(x, qdata, absmax, code, block_size, bias)
    return _native(native.library.linear, x, qdata, absmax, code, block_size, bias, tokens)[0]


def _linear_gemm(*arguments):
    """A block of tokens in one native call, or None where the kernels, the codebook or the blocks do not allow it."""
    out, done = _native(native.library.linear_gemm, *arguments)
    return out if done else None


def _native(function, x, qdata, absmax, code, block_size, bias, tokens):
    """A product in one native call, and what the call says."""
    out = torch.empty((*x.shape[:-1], qdata.shape[0]), dtype=x.dtype)
    # A name for each, so that a copy lives as long as its address is used.
    x, qdata, absmax, code = x.contiguous(), qdata.contiguous(), absmax.contiguous(), code.contiguous()
    bias_pointer = bias_kind = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_pointer, bias_kind = bias.data_ptr(), TYPES[bias.dtype]
    done = function(
        *native.matrix(qdata, absmax, code, block_size),
        x.data_ptr(),
        TYPES[x.dtype],
        tokens,
        bias_pointer,
        bias_kind,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out, done


_kept = threading.local()


def _panel(numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """Room for a panel, kept by each thread.

    Memory fresh from the system costs a page fault every 4 KB: a tenth of a product of 512 tokens.
    """
    bytes_wanted = numbers * dtype.itemsize
    kept = getattr(_kept, "panel", None)
    if kept is None or kept.numel() < bytes_wanted:
        kept = torch.empty(bytes_wanted, dtype=torch.uint8)
        if bytes_wanted <= _PANEL_BYTES:
            _kept.panel = kept
    return kept[:bytes_wanted].view(dtype)


def _panel_rows(columns: int, dtype: torch.dtype) -> int:
    return max(64, min(_PANEL_ROWS, _PANEL_BYTES // (columns * dtype.itemsize) // 64 * 64))


def panel_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of the largest panel that a product with a matrix or its transpose de-quantizes, for inputs of `dtype`."""
    dtype = _PANEL_TYPES[dtype]
    numbers = max(
        min(rows, _panel_rows(columns, dtype)) * columns, min(columns, _panel_rows(rows, dtype)) * rows
    )
    return numbers * dtype.itemsize


def _linear_panels(x, qdata, absmax, code, block_size, bias):
    """A block of tokens: a panel of rows is de-quantized into a buffer that stays in cache and multiplied by PyTorch."""
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    rows, columns = qdata.shape
    dtype = _PANEL_TYPES[x.dtype]
    flat = x.reshape(-1, columns).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    step = min(_panel_rows(columns, dtype), rows)
    panel = _panel(step * columns, dtype).view(step, columns)
    matrix = native.matrix(qdata, absmax, code, block_size)
    threads, kind, pointer = torch.get_num_threads(), TYPES[dtype], panel.data_ptr()
    if step == rows:
        native.library.dequantize(*matrix, 0, rows, 0, columns, pointer, kind, threads)
        return F.linear(flat, panel, bias).to(x.dtype).view(*x.shape[:-1], rows)
    out = torch.empty((flat.shape[0], rows), dtype=dtype)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        native.library.dequantize(*matrix, start, stop, 0, columns, pointer, kind, threads)
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
    matrix = native.matrix(qdata, absmax, code, block_size)
    threads = torch.get_num_threads()
    fused = tokens <= _FUSED_TOKENS_TRANSPOSED
    if fused or GEMM_TOKENS[torch.float32]:
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype)
        product = native.library.linear_transposed if fused else native.library.linear_transposed_gemm
        done = product(*matrix, x.data_ptr(), TYPES[x.dtype], tokens, out.data_ptr(), threads)
        if done or fused:
            return out
    # Panels of columns: each sum over the rows is one matmul's, in float32.
    dtype = _PANEL_TYPES[x.dtype]
    flat = x.reshape(-1, rows).to(dtype)
    out = torch.empty((tokens, columns), dtype=dtype)
    step = min(_panel_rows(rows, dtype), -(-columns // _COLUMN_STEP) * _COLUMN_STEP)
    panel = _panel(rows * step, dtype)
    pointer, kind = panel.data_ptr(), TYPES[dtype]
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        width = stop - start
        native.library.dequantize(*matrix, 0, rows, start, stop, pointer, kind, threads)
        torch.mm(flat, panel[: rows * width].view(rows, width), out=out[:, start:stop])
    return out.to(x.dtype).view(*x.shape[:-1], columns)
