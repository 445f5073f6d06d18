"""One token times a quantized matrix, in Triton: where the CUDA kernels do not fit or NVRTC is missing.

A program computes BLOCK_N rows; it walks along them BLOCK_K columns at a time, keeping a partial sum for
every element of the tile, and adds these up at the end. Any N, any K, any block size; float32 accumulation.

Example:
    >>> gemv(x, qdata, absmax, code, 64, None, out)   # x [1, K], out [1, N]  # doctest: +SKIP
"""

import functools

import triton
import triton.language as tl

from ..kernel import Call, Instance, Kernel
from ..triton_tables import checked_columns, decode_tile, load_table, unsupported_reason

# Measured on an H100, 16384 x 4096, microseconds: gathered 4 x 512: 46.0, 8 x 512: 45.8, 16 x 256: 47.2; not gathered 59 to 78.
BLOCK_N = 8
BLOCK_K = 512
GATHER = True
NUM_WARPS = 4


@triton.jit
def gemv_kernel(
    x_ptr,
    qdata_ptr,
    absmax_ptr,
    code_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    blocks,
    BLOCK_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SEGMENTS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_n = n < rows
    table = load_table(code_ptr, GATHER, SEGMENTS)
    # Rows past the end read the last one; nothing of them is stored.
    row = tl.minimum(n, rows - 1).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, columns, BLOCK_K):
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
            x = tl.load(x_ptr + k)
        else:
            x = tl.load(x_ptr + k, mask=k < columns, other=0.0)
        total += weight * x.to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias_ptr + n, mask=valid_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty), mask=valid_n)


def gemv(
    x,
    qdata,
    absmax,
    code,
    block_size,
    bias,
    out,
    *,
    gather=GATHER,
    segments=False,
    block_n=BLOCK_N,
    block_k=BLOCK_K,
    num_warps=NUM_WARPS,
) -> None:
    """x [1, K] Wᵀ + bias into out [1, N]; all contiguous."""
    rows, columns = qdata.shape
    gemv_kernel[(triton.cdiv(rows, block_n),)](
        x,
        qdata,
        absmax,
        code,
        # A pointer is wanted even where there is no bias; it is not read then.
        x if bias is None else bias,
        out,
        rows,
        columns,
        absmax.shape[1],
        BLOCK_SIZE=block_size,
        HAS_BIAS=bias is not None,
        GATHER=gather,
        SEGMENTS=segments,
        EVEN=columns % block_k == 0,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )


def _unsupported_reason(call: Call) -> str | None:
    return unsupported_reason(call) or ("triton_gemv takes one token" if call.tokens > 1 else None)


def _instance(call: Call) -> Instance:
    run = functools.partial(gemv, segments=call.segments)
    return Instance(run, checked_columns(call.columns), segments=call.segments)


KERNEL = Kernel(
    name="triton_gemv",
    operation="linear",
    summary="one token, any row length and block size",
    run=gemv,
    unsupported_reason=_unsupported_reason,
    place=lambda call: 50 if call.tokens == 1 else None,
    instance=_instance,
    segmented=lambda call: True,
)
