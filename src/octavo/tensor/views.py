"""Views of an `OctavoTensor` that stay in 8 bits: transposes, and cuts along stored rows or whole blocks of them.

They share storage with the weight. A view for which there is no handler here is a float copy, and is counted.

Example:
    >>> import torch, octavo
    >>> weight = octavo.OctavoTensor.from_float(torch.randn(16, 64))
    >>> weight.T[:, 2:6].shape, type(weight.T[:, 2:6]).__name__
    (torch.Size([64, 4]), 'OctavoTensor')
"""

import math
from collections.abc import Callable

import torch

from .. import ops
from .copies import alias
from .gathering import called_by_fsdp
from .octavo_tensor import OctavoTensor, aten, count_fallback, each, handles, like


def _swap_last(weight: OctavoTensor, first: int, second: int) -> bool:
    last = {weight.dim() - 1, weight.dim() - 2}
    return {first % weight.dim(), second % weight.dim()} == last


@handles(aten.t.default, aten.transpose.int)
def transpose(weight, first=0, second=1):
    if weight.dim() < 2 or not _swap_last(weight, first, second):
        return NotImplemented
    return like(weight, weight.qdata, weight.absmax, transposed=not weight.transposed)


@handles(aten.permute.default)
def permute(weight, dims):
    order = [dim % weight.dim() for dim in dims]
    plain = list(range(weight.dim()))
    if order == plain:
        return alias(weight)
    if weight.dim() >= 2 and order == [*plain[:-2], plain[-1], plain[-2]]:
        return like(weight, weight.qdata, weight.absmax, transposed=not weight.transposed)
    return NotImplemented


@handles(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(weight, size):
    size = list(size)
    if size.count(-1) == 1:
        known = -torch.Size(size).numel()
        size[size.index(-1)] = weight.numel() // known if known else 0
    if size == list(weight.shape):
        return alias(weight)
    flat = (
        weight.qdata.shape[-1] % weight.block_size == 0 and weight.code.dim() == 1 and not weight.transposed
    )
    # A flat row in whole blocks is still a quantized row.
    if flat and size == [weight.numel()]:
        return like(weight, weight.qdata.view(-1), weight.absmax.view(-1), codebook="slice")
    # Rows in groups: a stack of matrices that share one codebook (projections that are linear group by group).
    if (
        len(size) == 3
        and weight.dim() == 2
        and not weight.transposed
        and size[-1] == weight.shape[-1]
        and math.prod(size) == weight.numel()
    ):
        return like(
            weight,
            weight.qdata.view(size),
            weight.absmax.view(*size[:-1], -1),
            weight.code.expand(size[0], -1),
            codebook="slice",
        )
    # FSDP2 keeps a flat view of each shard, which it only uses for tensors without its hooks.
    if size == [weight.numel()] and called_by_fsdp():
        return alias(weight)
    # Not a view of the float copy: that of a transposed weight is not contiguous, though `.contiguous()` was asked for.
    count_fallback("aten.view.default")
    return weight.decode().reshape(size)


@handles(aten.as_strided.default)
def as_strided(weight, size, stride, storage_offset=None):
    if list(size) != list(weight.shape) or storage_offset:
        return NotImplemented
    # FSDP2 asks for contiguous strides of what its own hook has put together.
    return alias(weight) if list(stride) == list(weight.stride()) or called_by_fsdp() else NotImplemented


def _stored_dim(weight: OctavoTensor, dim: int) -> int:
    """The stored dimension that the user's `dim` is."""
    dim %= weight.dim()
    if weight.transposed and dim >= weight.dim() - 2:
        return 2 * weight.dim() - 3 - dim
    return dim


def _cut(weight: OctavoTensor, dim: int, function: Callable[[torch.Tensor], torch.Tensor], **changes):
    """Apply a cut along a stored dimension that is not a row's inside."""
    has_code = dim < weight.code.dim() - 1
    code = function(weight.code) if has_code else weight.code
    # Rows of one matrix share its codebook: changing a part of them in place must not change it for the rest.
    codebook = weight.codebook if has_code else "slice"
    return like(
        weight, function(weight.qdata), function(weight.absmax), code, **{"codebook": codebook, **changes}
    )


@handles(aten.select.int)
def select(weight, dim, index):
    stored = _stored_dim(weight, dim)
    if stored == weight.dim() - 1:
        return NotImplemented
    # One row of a transposed matrix is a plain row.
    transposed = weight.transposed and weight.dim() > 2
    return _cut(weight, stored, lambda part: part.select(stored, index), transposed=transposed)


@handles(aten.slice.Tensor)
def slice_(weight, dim=0, start=None, end=None, step=1):
    stored = _stored_dim(weight, dim)
    size = weight.qdata.shape[stored]
    if stored < weight.dim() - 1:
        return _cut(weight, stored, lambda part: aten.slice.Tensor(part, stored, start, end, step))
    low, high, _ = slice(start, end, step).indices(size)
    if (low, high, step) == (0, size, 1):
        return alias(weight)
    # Inside rows only whole blocks can be cut out.
    if step != 1 or low % weight.block_size or (high % weight.block_size and high != size) or high <= low:
        return NotImplemented
    blocks = slice(low // weight.block_size, -(-high // weight.block_size))
    return like(weight, weight.qdata[..., low:high], weight.absmax[..., blocks], codebook="slice")


@handles(aten.split.Tensor)
def split(weight, split_size, dim=0):
    if _stored_dim(weight, dim) == weight.dim() - 1:
        return NotImplemented
    size = weight.shape[dim]
    return [slice_(weight, dim, start, min(start + split_size, size)) for start in range(0, size, split_size)]


@handles(aten.split_with_sizes.default)
def split_with_sizes(weight, split_sizes, dim=0):
    if _stored_dim(weight, dim) == weight.dim() - 1:
        return NotImplemented
    parts, start = [], 0
    for size in split_sizes:
        parts.append(slice_(weight, dim, start, start + size))
        start += size
    return parts


@handles(aten.unbind.int)
def unbind(weight, dim=0):
    if _stored_dim(weight, dim) == weight.dim() - 1:
        return NotImplemented
    return [select(weight, dim, index) for index in range(weight.shape[dim])]


@handles(aten.index.Tensor)
def index(weight, indices):
    """weight[ids]: experts of a stack stay quantized, rows of a matrix are de-quantized alone."""
    if len(indices) != 1 or indices[0] is None or indices[0].dtype not in (torch.int64, torch.int32):
        return NotImplemented
    ids = indices[0]
    if weight.code.dim() == 2 and ids.dim() == 1:
        return each(weight, lambda part: part[ids])
    if weight.dim() == 2 and not weight.transposed and weight.dtype in ops.schema.COMPUTE_DTYPES:
        ids = torch.where(ids < 0, ids + weight.shape[0], ids)
        return ops.embedding(ids, weight.qdata, weight.absmax, weight.code, weight.block_size, weight.dtype)
    return NotImplemented


@handles(aten.index_select.default)
def index_select(weight, dim, ids):
    return index(weight, [ids]) if dim % weight.dim() == 0 else NotImplemented
