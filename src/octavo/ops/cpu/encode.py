"""From float to 8 bits: scales, nearest codes, and the histogram that a codebook is fitted to.

Example:
    >>> import torch
    >>> from octavo import ops
    >>> ops.histogram(torch.randn(16, 256), 64, 257).shape
    torch.Size([257])
"""

import torch

from . import native
from .native import TYPES


def _weight(weight):
    """A weight the native functions read: contiguous, and float32 where it is of no type they know."""
    return (weight if weight.dtype in TYPES else weight.to(torch.float32)).contiguous()


def _raise_not_finite(operation, weight):
    bad = int((~torch.isfinite(weight)).sum())
    raise ValueError(f"octavo.{operation}: the weight holds {bad} NaN or infinite values")


def quantize(weight, code, block_size, absmax_dtype):
    """qdata uint8 [N, K] and absmax [N, ceil(K / B)], the bytes of `reference.quantize`."""
    weight, code = _weight(weight), code.contiguous()
    rows, columns = weight.shape
    qdata = torch.empty((rows, columns), dtype=torch.uint8)
    absmax = torch.empty((rows, -(-columns // block_size)), dtype=absmax_dtype)
    finite = native.library.quantize(
        weight.data_ptr(),
        TYPES[weight.dtype],
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
    found = native.library.scale_range(
        weight.data_ptr(), TYPES[weight.dtype], rows, columns, block_size, torch.get_num_threads()
    )
    if found is None:
        _raise_not_finite("scale_range", weight)
    return found


def histogram(weight, block_size, bins, absmax_dtype):
    """int64 [bins], the numbers of `reference.histogram`."""
    weight = _weight(weight)
    rows, columns = weight.shape
    counts = torch.empty(bins, dtype=torch.int64)
    half, threads = absmax_dtype is torch.float16, torch.get_num_threads()
    given = (weight.data_ptr(), TYPES[weight.dtype], rows, columns, block_size)
    finite = native.library.histogram(*given, bins, half, counts.data_ptr(), threads)
    if not finite:
        _raise_not_finite("histogram", weight)
    return counts


def squared_error(weight, qdata, absmax, code, block_size) -> tuple[float, float]:
    """Sums of (weight - quantized weight)² and of weight² over a matrix [N, K]: in float32 along a row, in float64 over rows."""
    weight = _weight(weight)
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    stored = native.matrix(qdata, absmax, code, block_size)
    return native.library.squared_error(
        weight.data_ptr(), TYPES[weight.dtype], *stored, torch.get_num_threads()
    )
