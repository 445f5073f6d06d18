"""Several tokens times a quantized matrix, in Triton: tiles are decoded next to the tensor cores.

A program computes BLOCK_M tokens by BLOCK_N rows over one of SPLIT_K splits of the columns. Each weight is
decoded once for every BLOCK_M tokens, rounded to x's type as the reference rounds it, and multiplied by
`tl.dot` with float32 accumulation. With SPLIT_K > 1 the partial products go to a float32 workspace, and a second kernel
adds them in a fixed order: the result never depends on which program finished first. Any N, any K, any block
size.

Example:
    >>> gemm(x, qdata, absmax, code, 64, None, out)   # x [M, K], out [M, N]  # doctest: +SKIP
"""

import functools

import torch
import triton
import triton.language as tl

from ..kernel import Call, Instance, Kernel
from ..triton_tables import checked_columns, decode_tile, load_table, unsupported_reason

# Tokens at most -> (BLOCK_N, BLOCK_K, warps, stages). Measured on an H100, 16384 x 4096, microseconds, gathered: 68 77 76 95 (for
# 64 tokens 64 x 128: 81; for 128, 64 x 64: 110); not gathered 505 and more.
TILES = {16: (64, 128, 4, 3), 32: (64, 128, 4, 3), 64: (64, 64, 4, 3), 128: (128, 64, 8, 3)}
GATHER = True
# Enough programs to give each multiprocessor of a large GPU two.
WANTED_PROGRAMS = 264
LARGEST_SPLIT_K = 8


# Compiled once for all numbers of tokens, not anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["tokens"])
def gemm_kernel(
    x_ptr,
    qdata_ptr,
    absmax_ptr,
    code_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    columns,
    blocks,
    split_columns,
    BLOCK_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SEGMENTS: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    valid_m, valid_n = m < tokens, n < rows
    table = load_table(code_ptr, GATHER, SEGMENTS)
    # Rows and tokens past the end read the last one; nothing of them is stored.
    row = tl.minimum(n, rows - 1).to(tl.int64)[:, None]
    token = tl.minimum(m, tokens - 1).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part * split_columns
    end = tl.minimum(first + split_columns, columns)
    for start in range(first, end, BLOCK_K):
        # [BLOCK_N, BLOCK_K], along the rows as they lie in memory; the product takes the transpose.
        weight = decode_tile(
            qdata_ptr + row * columns,
            absmax_ptr + row * blocks,
            code_ptr,
            table,
            start,
            columns,
            blocks,
            BLOCK_SIZE,
            GATHER,
            SEGMENTS,
            EVEN,
            BLOCK_N,
            BLOCK_K,
        )
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            x = tl.load(x_ptr + token * columns + k[None, :])
        else:
            x = tl.load(x_ptr + token * columns + k[None, :], mask=(k < columns)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(weight.to(x.dtype)), total, input_precision="ieee")
    if HAS_BIAS and SPLIT_K == 1:
        total += tl.load(bias_ptr + n, mask=valid_n, other=0.0).to(tl.float32)[None, :]
    at = (part.to(tl.int64) * tokens + m.to(tl.int64)[:, None]) * rows + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=valid_m[:, None] & valid_n[None, :])


@triton.jit
def add_partial_kernel(
    partial_ptr,
    bias_ptr,
    out_ptr,
    count,
    rows,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    total = tl.load(partial_ptr + i, mask=valid, other=0.0)
    for part in range(1, SPLIT_K):
        total += tl.load(partial_ptr + count * part + i, mask=valid, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % rows, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=valid)


def tile_for(tokens: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) for a number of tokens."""
    block_m = next((m for m in TILES if m >= tokens), 128)
    return (block_m, *TILES[block_m])


def split_k_for(programs: int, columns: int, block_k: int) -> int:
    """Splits of the columns: as few as give the GPU enough programs, each of at least four steps."""
    split_k = 1
    while (
        programs * split_k < WANTED_PROGRAMS
        and split_k < LARGEST_SPLIT_K
        and columns // (2 * split_k) >= 4 * block_k
    ):
        split_k *= 2
    return split_k


def gemm(
    x, qdata, absmax, code, block_size, bias, out, *, gather=GATHER, segments=False, tile=None, split_k=None
) -> None:
    """x [M, K] Wᵀ + bias into out [M, N]; all contiguous.

    Args:
        tile: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); by default `tile_for`.
        split_k: splits of the columns; by default `split_k_for`. Above 1 it takes a workspace of 4 split_k M N bytes.
    """
    tokens, columns = x.shape
    rows = qdata.shape[0]
    block_m, block_n, block_k, warps, stages = tile or tile_for(tokens)
    grid_n, grid_m = triton.cdiv(rows, block_n), triton.cdiv(tokens, block_m)
    split_k = split_k or split_k_for(grid_n * grid_m, columns, block_k)
    # Whole steps, so that a split's last step is the only partial one.
    split_columns = triton.cdiv(triton.cdiv(columns, split_k), block_k) * block_k
    target = (
        out if split_k == 1 else torch.empty((split_k, tokens, rows), dtype=torch.float32, device=x.device)
    )
    has_bias = bias is not None
    bias = bias if has_bias else x
    gemm_kernel[(grid_n, grid_m, split_k)](
        x,
        qdata,
        absmax,
        code,
        bias,
        target,
        tokens,
        rows,
        columns,
        absmax.shape[1],
        split_columns,
        BLOCK_SIZE=block_size,
        HAS_BIAS=has_bias,
        GATHER=gather,
        SEGMENTS=segments,
        EVEN=columns % block_k == 0,
        SPLIT_K=split_k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    if split_k > 1:
        count = tokens * rows
        add_partial_kernel[(triton.cdiv(count, 1024),)](
            target, bias, out, count, rows, HAS_BIAS=has_bias, SPLIT_K=split_k, BLOCK=1024
        )


# The most tokens for which it is tried, and the same for a matrix with fewer rows than SMALL per multiprocessor. H100, bfloat16,
# microseconds for 4096 x 4096, 16384 x 4096, 1024 x 4096; 128 tokens: 30.4 96.8 18.3, panels 32.0 133 13.9;
# 512 tokens: 95.5 301 30.3, panels 44.7 171 16.9.
UP_TO_TOKENS = 128
SMALL = 16
SMALL_UP_TO_TOKENS = 64


def _place(call: Call) -> int | None:
    # Triton multiplies float32, and anything before 8.0, without tensor cores: then cuBLAS is better.
    if call.dtype == torch.float32 or call.capability < (8, 0):
        return None
    small = call.rows < SMALL * call.multiprocessors
    return 60 if call.tokens <= (SMALL_UP_TO_TOKENS if small else UP_TO_TOKENS) else None


def _instance(call: Call) -> Instance:
    tokens = next((t for t in (1, 2, 4, 8, 16, 32, 64, 128) if t >= call.tokens), 256)
    run = functools.partial(gemm, segments=call.segments)
    return Instance(run, checked_columns(call.columns), tokens, segments=call.segments)


KERNEL = Kernel(
    name="triton_gemm",
    operation="linear",
    summary="several tokens on tensor cores, any row length and block size",
    run=gemm,
    unsupported_reason=unsupported_reason,
    place=_place,
    instance=_instance,
    segmented=lambda call: True,
)
