"""Rows of a quantized matrix in floating point: `cuda/decode_rows.cu` and its launch.

Example:
    >>> from octavo.ops.gpu.kernels import cuda_decode
    >>> cuda_decode.decode(qdata, absmax, code, 64, None, 0, out)  # doctest: +SKIP
"""

import functools

import torch

from ..cuda_launch import (
    CHECKED_COLUMNS,
    THREADS,
    WARPS,
    prepared,
    segments_pay,
    type_parameters,
    unsupported_reason,
)
from ..kernel import Call, Instance, Kernel

DEPTH = 4


@functools.lru_cache(4096)
def compiled(count, device, dtype, scales, depth, extra, segments=False):
    """The instance for this many rows and these types, and the blocks to launch."""
    parameters = (*type_parameters(dtype, scales, segments), ("DEPTH", depth), *extra)
    return prepared("decode_rows", -(-count // WARPS), device, parameters)


def decode(
    qdata,
    absmax,
    code,
    block_size,
    ids,
    first_column,
    out,
    *,
    depth=DEPTH,
    grid=None,
    extra=(),
    segments=False,
) -> None:
    """Rows of the matrix in floating point into out [count, width], from `first_column` on.

    Args:
        ids: int32 or int64 [count], the rows wanted, or None for all. A row that does not exist becomes NaN.
        first_column: a multiple of 16; so is out's width.
        out: contiguous, of the type wanted.
        segments: the codebook consists of segments and is computed, not looked up.
    """
    rows, columns = qdata.shape
    count, width = out.shape
    kernel, blocks = compiled(count, out.get_device(), out.dtype, absmax.dtype, depth, tuple(extra), segments)
    kernel.launch(
        grid or blocks,
        THREADS,
        qdata,
        absmax,
        code,
        ids,
        out,
        int(ids is not None and ids.dtype == torch.int64),
        count,
        rows,
        columns,
        first_column,
        width,
        block_size.bit_length() - 1,
        absmax.shape[1],
    )


def _instance(call: Call) -> Instance:
    run = functools.partial(decode, segments=call.segments)
    return Instance(run, CHECKED_COLUMNS, segments=call.segments)


KERNEL = Kernel(
    name="cuda_decode",
    operation="decode",
    summary="rows in floating point, for row lengths that are multiples of 16",
    run=decode,
    unsupported_reason=unsupported_reason,
    place=lambda call: 10,
    instance=_instance,
    segmented=segments_pay,
)
