"""Rows of a quantized matrix in floating point, in Triton: what `dequantize`, `embedding` and the panels use.

Any row length, any block size. The CUDA kernel `decode_rows` does the same faster for row lengths that are
multiples of 16.

Example:
    >>> decode(qdata, absmax, code, 64, None, 0, out)   # doctest: +SKIP
"""

import functools

import triton
import triton.language as tl

from ..kernel import Call, Instance, Kernel
from ..triton_tables import checked_columns, load_table, look_up, unsupported_reason

# Not yet measured on any GPU.
BLOCK_K = 1024
GATHER = True
NUM_WARPS = 4


@triton.jit
def decode_kernel(
    qdata_ptr,
    absmax_ptr,
    code_ptr,
    ids_ptr,
    out_ptr,
    rows,
    columns,
    blocks,
    first_column,
    width,
    BLOCK_SIZE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    GATHER: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = r
    if HAS_IDS:
        row = tl.load(ids_ptr + r).to(tl.int64)
    exists = (row >= 0) & (row < rows)
    row = tl.where(exists, row, 0)
    table = load_table(code_ptr, GATHER, SEGMENTS)
    c = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = first_column + c
    q = tl.load(qdata_ptr + row * columns + k, mask=c < width, other=0)
    scale = tl.load(absmax_ptr + row * blocks + k // BLOCK_SIZE, mask=c < width, other=0.0).to(tl.float32)
    weight = look_up(q, table, code_ptr, GATHER, SEGMENTS) * scale
    weight = tl.where(exists, weight, float("nan"))
    tl.store(out_ptr + r * width + c, weight.to(out_ptr.dtype.element_ty), mask=c < width)


def decode(qdata, absmax, code, block_size, ids, first_column, out, *, gather=GATHER, segments=False) -> None:
    """Rows of the matrix into out [count, width], from `first_column` on.

    Args:
        ids: int32 or int64 [count], the rows wanted, or None for all. A row that does not exist becomes NaN:
            reporting it would mean waiting for the device.
        out: contiguous, of the type wanted.
    """
    count, width = out.shape
    rows, columns = qdata.shape
    decode_kernel[(count, triton.cdiv(width, BLOCK_K))](
        qdata,
        absmax,
        code,
        qdata if ids is None else ids,
        out,
        rows,
        columns,
        absmax.shape[1],
        first_column,
        width,
        BLOCK_SIZE=block_size,
        HAS_IDS=ids is not None,
        GATHER=gather,
        SEGMENTS=segments,
        BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS,
    )


def _instance(call: Call) -> Instance:
    run = functools.partial(decode, segments=call.segments)
    return Instance(run, checked_columns(call.columns), segments=call.segments)


KERNEL = Kernel(
    name="triton_decode",
    operation="decode",
    summary="rows in floating point, any row length and block size",
    run=decode,
    unsupported_reason=unsupported_reason,
    place=lambda call: 20,
    instance=_instance,
    segmented=lambda call: True,
)
