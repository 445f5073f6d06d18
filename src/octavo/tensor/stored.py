"""The stored parts of a weight of any rank: a row, a matrix, a stack of matrices. Plain tensors, no subclass.

    qdata   uint8              [..., N, K]
    absmax  float16 | float32  [..., N, ceil(K / B)]
    code    float32            [256], or [..., 256] for a stack

Example:
    >>> import torch
    >>> from octavo import codebook, ops
    >>> code = codebook.dynamic()
    >>> qdata, absmax = ops.quantize(torch.randn(16, 64), code, 64)
    >>> dequantize(qdata[3], absmax[3], code, 64, torch.float32).shape
    torch.Size([64])
"""

from collections.abc import Iterator, Sequence

import torch

from .. import ops


def dequantize(qdata, absmax, code, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The values, of qdata's shape, in `dtype`: float32, float16 or bfloat16."""
    columns, blocks = qdata.shape[-1], absmax.shape[-1]
    if code.dim() == 1:
        flat = ops.dequantize(qdata.reshape(-1, columns), absmax.reshape(-1, blocks), code, block_size, dtype)
        return flat.view(qdata.shape)
    parts = [
        dequantize(qdata[index], absmax[index], code[index], block_size, dtype)
        for index in range(qdata.shape[0])
    ]
    return torch.stack(parts) if parts else torch.empty(qdata.shape, dtype=dtype, device=qdata.device)


def matrices(values, qdata, absmax, code) -> Iterator[tuple[torch.Tensor, ...]]:
    """The matrices one by one, with the `values` for them, as tuples of views (values, qdata, absmax, code)."""
    if qdata.dim() == 1:
        values, qdata, absmax = values[None], qdata[None], absmax[None]
    if qdata.dim() == 2:
        yield values, qdata, absmax, code
        return
    for index in range(qdata.shape[0]):
        yield from matrices(
            values[index], qdata[index], absmax[index], code if code.dim() == 1 else code[index]
        )


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
