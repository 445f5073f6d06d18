"""What an `OctavoTensor` needs to live in PyTorch: one handler for each low-level (aten) operation that keeps it in 8 bits.

Aliases share storage; `.to()` moves bytes or changes the computing type and never requantizes; slices run along rows. An
in-place change de-quantizes, applies, quantizes again and writes into the same storage. Every operation without a handler
de-quantizes first and is counted by name (`octavo.fallbacks()`).

Example:
    >>> import torch, octavo
    >>> weight = octavo.OctavoTensor.from_float(torch.randn(16, 64))
    >>> weight.to(torch.bfloat16)[:4].shape, (weight * 2).dtype
    (torch.Size([4, 64]), torch.float32)
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from . import ops, tensor_functions
from .tensor import OctavoTensor, count_fallback

aten = torch.ops.aten
HANDLERS: dict[Any, Callable[..., Any]] = {}


def dispatch(func, args, kwargs):
    """`__torch_dispatch__` of OctavoTensor."""
    handler = HANDLERS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return fall_back(func, args, kwargs)


def handles(*overloads) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        HANDLERS.update(dict.fromkeys(overloads, handler))
        return handler

    return register


POINTWISE_IN_PLACE = {
    aten.add_.Tensor,
    aten.add_.Scalar,
    aten.sub_.Tensor,
    aten.sub_.Scalar,
    aten.mul_.Tensor,
    aten.mul_.Scalar,
    aten.div_.Tensor,
    aten.div_.Scalar,
}


def _wider(own: torch.dtype, at_least: torch.dtype | None) -> torch.dtype:
    return own if at_least is None else torch.promote_types(own, at_least)


def fall_back(func, args, kwargs):
    """De-quantize every OctavoTensor among the arguments and run `func`; write back what it changed in place."""
    count_fallback(str(func))
    changed: list[tuple[OctavoTensor, torch.Tensor]] = []
    # A change computed in 16 bits would round every weight once more.
    dtype = torch.float32 if func in POINTWISE_IN_PLACE else None
    if func._schema.is_mutable:
        args, kwargs = list(args), dict(kwargs)
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            place, key = (kwargs, argument.name) if argument.name in kwargs else (args, position)
            value = place[key] if key in kwargs or position < len(args) else None
            if isinstance(value, OctavoTensor):
                dense = value.dequantize(_wider(value.dtype, dtype))
                changed.append((value, dense))
                place[key] = dense
            elif isinstance(value, (list, tuple)) and any(isinstance(item, OctavoTensor) for item in value):
                dense_items = [
                    item.dequantize() if isinstance(item, OctavoTensor) else item for item in value
                ]
                pairs = zip(value, dense_items, strict=True)
                changed.extend((item, dense) for item, dense in pairs if isinstance(item, OctavoTensor))
                place[key] = dense_items
    args, kwargs = tree_map_only(OctavoTensor, OctavoTensor.dequantize, (tuple(args), dict(kwargs)))
    result = func(*args, **kwargs)
    for weight, dense in changed:
        weight.rewrite_(dense)
        if result is dense:
            result = weight
    return result


def like(weight: OctavoTensor, qdata, absmax, code=None, **changes) -> OctavoTensor:
    """A tensor with other parts and the same properties, save for those named in `changes`."""
    properties = {
        "block_size": weight.block_size,
        "dtype": weight.dtype,
        "transposed": weight.transposed,
        "codebook": weight.codebook,
    }
    return OctavoTensor(qdata, absmax, weight.code if code is None else code, **{**properties, **changes})


def each(weight: OctavoTensor, function: Callable[[torch.Tensor], torch.Tensor], **changes) -> OctavoTensor:
    """`function` applied to each stored tensor."""
    return like(weight, function(weight.qdata), function(weight.absmax), function(weight.code), **changes)


@handles(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def alias(weight):
    return like(weight, weight.qdata, weight.absmax)


@handles(aten.clone.default)
def clone(weight, *, memory_format=None):
    return each(weight, torch.clone)


@handles(aten._to_copy.default)
def to_copy(
    weight, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None
):
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    # A device moves the bytes; a type only changes what is computed in. Scales and codes keep theirs.
    return each(
        weight,
        lambda part: part.to(device=device, non_blocking=non_blocking, copy=True),
        dtype=dtype or weight.dtype,
    )


@handles(aten._pin_memory.default)
def pin_memory(weight, device=None):
    return each(weight, torch.Tensor.pin_memory)


@handles(aten.is_pinned.default)
def is_pinned(weight, device=None):
    return weight.qdata.is_pinned()


@handles(aten.copy_.default)
def copy_(target, source, non_blocking=False):
    if not isinstance(target, OctavoTensor):
        return NotImplemented
    if (
        isinstance(source, OctavoTensor)
        and source.qdata.shape == target.qdata.shape
        and source.absmax.shape == target.absmax.shape
        and source.block_size == target.block_size
        and source.transposed == target.transposed
        and source.absmax.dtype == target.absmax.dtype
        and source.code.shape == target.code.shape
    ):
        # Another tensor's bytes are only this one's weights under the same codebook; a slice may not change the codebook of the
        # rows outside it.
        same_code = source.code is target.code or torch.equal(source.code.to(target.device), target.code)
        if same_code or target.codebook != "slice":
            target.qdata.copy_(source.qdata, non_blocking)
            target.absmax.copy_(source.absmax, non_blocking)
            if not same_code:
                target.code.copy_(source.code, non_blocking)
            return target
    dense = source.dequantize(target.dtype) if isinstance(source, OctavoTensor) else source
    return target.rewrite_(torch.broadcast_to(dense, target.shape))


def _scaled(weight: Any, factor: Any, divide: bool):
    """In place, a factor that the scales take exactly: a power of two (RWKV halves its weights layer by layer)."""
    if isinstance(factor, torch.Tensor):
        if factor.dim() or factor.is_meta or isinstance(factor, OctavoTensor):
            return NotImplemented
        factor = factor.item()
    if not isinstance(weight, OctavoTensor) or not isinstance(factor, (int, float)) or factor <= 0:
        return NotImplemented
    if math.frexp(factor)[0] != 0.5 or weight.absmax.is_meta:
        return NotImplemented
    scaled = weight.absmax / factor if divide else weight.absmax * factor
    back = scaled * factor if divide else scaled / factor
    # Outside the type's range the scales would lose bits, or become infinite.
    if not torch.equal(back, weight.absmax):
        return NotImplemented
    weight.absmax.copy_(scaled)
    return weight


@handles(aten.mul_.Tensor, aten.mul_.Scalar)
def mul_(weight, other):
    return _scaled(weight, other, divide=False)


@handles(aten.div_.Tensor, aten.div_.Scalar)
def div_(weight, other):
    return _scaled(weight, other, divide=True)


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
    # FSDP2 keeps a flat view of each shard, which it only uses for tensors without its hooks.
    if size == [weight.numel()] and _called_by_fsdp():
        return alias(weight)
    # Not a view of the float copy: that of a transposed weight is not contiguous, though `.contiguous()` was asked for.
    count_fallback("aten.view.default")
    return weight.dequantize().reshape(size)


@handles(aten.as_strided.default)
def as_strided(weight, size, stride, storage_offset=None):
    if list(size) != list(weight.shape) or storage_offset:
        return NotImplemented
    # FSDP2 asks for contiguous strides of what its own hook has put together.
    return alias(weight) if list(stride) == list(weight.stride()) or _called_by_fsdp() else NotImplemented


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
    if weight.dim() == 2 and not weight.transposed and weight.dtype in ops.schema.COMPUTING_TYPES:
        ids = torch.where(ids < 0, ids + weight.shape[0], ids)
        return ops.embedding(ids, weight.qdata, weight.absmax, weight.code, weight.block_size, weight.dtype)
    return NotImplemented


@handles(aten.index_select.default)
def index_select(weight, dim, ids):
    return index(weight, [ids]) if dim % weight.dim() == 0 else NotImplemented


def _called_by_fsdp() -> bool:
    """Whether FSDP2 asks. It wants room for its shard as the parameter's own kind of tensor; everybody else who says
    `weight.new_zeros(...)` wants floats (a cache, a state) that must not be rounded to 8 bits."""
    frame = sys._getframe(1)
    for _ in range(24):
        frame = frame.f_back
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.fsdp"):
            return True
    return False


def _room(weight: OctavoTensor, size, make: str, device):
    """Zeroed or empty quantized rows for FSDP2; NotImplemented for anyone else, or for another row length."""
    shape = list(size)
    # The first dimension is what FSDP2 shards; of a transposed matrix it is the inside of rows.
    if (
        shape[1:] != list(weight.shape[1:])
        or (weight.transposed and weight.dim() < 3)
        or not _called_by_fsdp()
    ):
        return NotImplemented
    create = getattr(torch, make)
    device = device or weight.device
    rows, lead = shape[0], weight.code.dim() - 1
    qdata = create((rows, *weight.qdata.shape[1:]), dtype=torch.uint8, device=device)
    absmax = create((rows, *weight.absmax.shape[1:]), dtype=weight.absmax.dtype, device=device)
    code = weight.code
    if lead:
        code = create((rows, *code.shape[1:]), dtype=code.dtype, device=device)
    return like(weight, qdata, absmax, code.to(device))


def _plain(weight: OctavoTensor, size, make: str, dtype, device, fill=None):
    arguments = (list(size),) if fill is None else (list(size), fill)
    return getattr(torch, make)(*arguments, dtype=dtype or weight.dtype, device=device or weight.device)


@handles(aten.new_zeros.default)
def new_zeros(weight, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    room = _room(weight, size, "zeros", device)
    return _plain(weight, size, "zeros", dtype, device) if room is NotImplemented else room


@handles(aten.new_empty.default)
def new_empty(weight, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    room = _room(weight, size, "empty", device)
    return _plain(weight, size, "empty", dtype, device) if room is NotImplemented else room


@handles(aten.empty_like.default)
def empty_like(weight, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    room = _room(weight, weight.shape, "empty", device)
    return _plain(weight, weight.shape, "empty", dtype, device) if room is NotImplemented else room


@handles(aten.zeros_like.default)
def zeros_like(weight, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return _plain(weight, weight.shape, "zeros", dtype, device)


@handles(aten.ones_like.default)
def ones_like(weight, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return _plain(weight, weight.shape, "ones", dtype, device)


@handles(aten.new_ones.default)
def new_ones(weight, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return _plain(weight, size, "ones", dtype, device)


@handles(aten.new_full.default)
def new_full(weight, size, fill_value, *, dtype=None, layout=None, device=None, pin_memory=None):
    return _plain(weight, size, "full", dtype, device, fill_value)


@handles(aten.mm.default)
def mm(first, second):
    """Products that PyTorch's own C++ asks for: inside einsum, and in the backward pass of a fall-back."""
    return tensor_functions.matmul(first, second)


@handles(aten.addmm.default)
def addmm(bias, first, second, *, beta=1, alpha=1):
    return tensor_functions.addmm(bias, first, second, beta=beta, alpha=alpha)


@handles(aten.bmm.default)
def bmm(first, second):
    return tensor_functions.bmm(first, second)


@handles(aten.mv.default)
def mv(matrix, vector):
    return tensor_functions.matmul(matrix, vector)


@handles(aten.is_same_size.default)
def is_same_size(first, second):
    return first.shape == second.shape
