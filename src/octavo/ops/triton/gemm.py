"""Several tokens times a quantized matrix, in Triton: tiles are decoded next to the tensor cores.

A program computes BLOCK_M tokens by BLOCK_N rows over one of SPLIT shares of the columns. Each weight is
decoded once for every BLOCK_M tokens, rounded to x's type as the reference rounds it, and multiplied by
`tl.dot` with float32 accumulation. With SPLIT > 1 the shares go to a float32 workspace, and a second kernel
adds them in a fixed order: the result never depends on which program finished first. Any N, any K, any block
size.

Example:
    >>> gemm(x, qdata, absmax, code, 64, None, out)   # x [M, K], out [M, N]  # doctest: +SKIP
"""

import torch
import triton
import triton.language as tl

from .tables import decode_tile, load_table

# Tokens at most -> (BLOCK_N, BLOCK_K, warps, stages). Measured on an H100, 16384 x 4096, microseconds, gathered: 68 77 76 95 (for
# 64 tokens 64 x 128: 81; for 128, 64 x 64: 110); not gathered 505 and more.
TILES = {16: (64, 128, 4, 3), 32: (64, 128, 4, 3), 64: (64, 64, 4, 3), 128: (128, 64, 8, 3)}
GATHER = True
# Enough programs to give each multiprocessor of a large GPU two.
WANTED_PROGRAMS = 264
LARGEST_SPLIT = 8


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
    share,
    BLOCK_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    valid_m, valid_n = m < tokens, n < rows
    table = load_table(code_ptr, GATHER)
    # Rows and tokens past the end read the last one; nothing of them is stored.
    row = tl.minimum(n, rows - 1).to(tl.int64)[:, None]
    token = tl.minimum(m, tokens - 1).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part * share
    end = tl.minimum(first + share, columns)
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
    if HAS_BIAS and SPLIT == 1:
        total += tl.load(bias_ptr + n, mask=valid_n, other=0.0).to(tl.float32)[None, :]
    at = (part.to(tl.int64) * tokens + m.to(tl.int64)[:, None]) * rows + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=valid_m[:, None] & valid_n[None, :])


@triton.jit
def add_shares_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    count,
    rows,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    total = tl.load(parts_ptr + i, mask=valid, other=0.0)
    for part in range(1, SPLIT):
        total += tl.load(parts_ptr + count * part + i, mask=valid, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % rows, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=valid)


def tile_for(tokens: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) for a number of tokens."""
    block_m = next((m for m in TILES if m >= tokens), 128)
    return (block_m, *TILES[block_m])


def split_for(programs: int, columns: int, block_k: int) -> int:
    """Shares of the columns: as few as give the GPU enough programs, each of at least four steps."""
    split = 1
    while (
        programs * split < WANTED_PROGRAMS and split < LARGEST_SPLIT and columns // (2 * split) >= 4 * block_k
    ):
        split *= 2
    return split


def gemm(x, qdata, absmax, code, block_size, bias, out, *, gather=GATHER, tile=None, split=None) -> None:
    """x [M, K] Wᵀ + bias into out [M, N]; all contiguous.

    Args:
        tile: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); by default `tile_for`.
        split: shares of the columns; by default `split_for`. Above 1 it takes a workspace of 4 split M N bytes.
    """
    tokens, columns = x.shape
    rows = qdata.shape[0]
    block_m, block_n, block_k, warps, stages = tile or tile_for(tokens)
    grid_n, grid_m = triton.cdiv(rows, block_n), triton.cdiv(tokens, block_m)
    split = split or split_for(grid_n * grid_m, columns, block_k)
    # Whole steps, so that a share's last step is the only partial one.
    share = triton.cdiv(triton.cdiv(columns, split), block_k) * block_k
    target = out if split == 1 else torch.empty((split, tokens, rows), dtype=torch.float32, device=x.device)
    has_bias = bias is not None
    bias = bias if has_bias else x
    gemm_kernel[(grid_n, grid_m, split)](
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
        share,
        BLOCK_SIZE=block_size,
        HAS_BIAS=has_bias,
        GATHER=gather,
        EVEN=columns % block_k == 0,
        SPLIT=split,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    if split > 1:
        count = tokens * rows
        add_shares_kernel[(triton.cdiv(count, 1024),)](
            target, bias, out, count, rows, HAS_BIAS=has_bias, SPLIT=split, BLOCK=1024
        )
