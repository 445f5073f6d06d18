"""De-quantizing: a whole matrix, or the rows that an embedding asks for.

Example:
    >>> import torch
    >>> from octavo import codebook, ops
    >>> qdata, absmax = ops.quantize(torch.randn(16, 256), codebook.dynamic(), 64)
    >>> ops.embedding(torch.tensor([3, 5]), qdata, absmax, codebook.dynamic(), 64).shape
    torch.Size([2, 256])
"""

import torch

from . import native
from .native import TYPES


def dequantize(qdata, absmax, code, block_size, dtype):
    """The whole matrix [N, K] in `dtype`."""
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    rows, columns = qdata.shape
    out = torch.empty((rows, columns), dtype=dtype)
    matrix, threads = native.matrix(qdata, absmax, code, block_size), torch.get_num_threads()
    native.library.dequantize(*matrix, 0, rows, 0, columns, out.data_ptr(), TYPES[dtype], threads)
    return out


def embedding(ids, qdata, absmax, code, block_size, dtype):
    """Rows `ids` [...] of the matrix → [..., K]. Raises IndexError for an id outside it."""
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    columns = qdata.shape[1]
    out = torch.empty((*ids.shape, columns), dtype=dtype)
    matrix, threads = native.matrix(qdata, absmax, code, block_size), torch.get_num_threads()
    asked = (flat.data_ptr(), flat.shape[0])
    bad = native.library.embedding(*matrix, *asked, out.data_ptr(), TYPES[dtype], threads)
    if bad >= 0:
        raise IndexError(
            f"octavo.embedding: id {int(flat[bad])} is outside the table's {qdata.shape[0]} rows"
        )
    return out
