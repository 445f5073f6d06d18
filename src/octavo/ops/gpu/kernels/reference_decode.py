"""Rows of a quantized matrix in floating point, in plain PyTorch: where neither CUDA nor Triton can."""

from ... import reference
from ..kernel import Kernel


def decode(qdata, absmax, code, block_size, ids, first_column, out) -> None:
    """Rows of the matrix into out [count, width], from `first_column` on."""
    if ids is not None:
        qdata, absmax = qdata.index_select(0, ids), absmax.index_select(0, ids)
    dense = reference.dequantize(qdata, absmax, code, block_size, out.dtype)
    out.copy_(dense[:, first_column : first_column + out.shape[1]])


KERNEL = Kernel(
    name="reference_decode",
    operation="decode",
    summary="rows in floating point in plain PyTorch, where nothing else runs",
    run=decode,
    unsupported_reason=lambda call: None,
    place=lambda call: 100,
)
