"""What an `OctavoTensor` needs to live in PyTorch: one handler for each low-level (aten) operation that keeps it in 8 bits.

Aliases share storage; `.to()` moves bytes or changes the computing type and never requantizes. Views are in
`octavo.tensor_views`, new tensors made after the model of a weight in `octavo.tensor_creation`. An in-place change
de-quantizes, applies, quantizes again and writes into the same storage. Every operation without a handler
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

from . import tensor_functions
from .tensor import OctavoTensor, count_fallback

aten = torch.ops.aten
HANDLERS: dict[Any, Callable[..., Any]] = {}


def dispatch(func, args, kwargs):
    """`__torch_dispatch__` of OctavoTensor."""
    if func.is_view and torch.is_inference_mode_enabled():
        # PyTorch gives a view its base's version counter, which tensors made in this mode cannot have.
        with torch.inference_mode(False), torch.no_grad():
            return _dispatch(func, args, kwargs)
    return _dispatch(func, args, kwargs)


def _dispatch(func, args, kwargs):
    handler = HANDLERS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    # In that mode operations arrive as well that PyTorch itself takes apart otherwise, and of which nothing may be left then:
    # `weight.to(its own type)`.
    result = func.decompose(*args, **kwargs)
    return fall_back(func, args, kwargs) if result is NotImplemented else result


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


def called_by_fsdp() -> bool:
    """Whether FSDP2 asks. It wants room for its shard as the parameter's own kind of tensor; everybody else who says
    `weight.new_zeros(...)` wants floats (a cache, a state) that must not be rounded to 8 bits."""
    frame = sys._getframe(1).f_back
    for _ in range(24):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.fsdp"):
            return True
        frame = frame.f_back
    return False


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
    dense = torch.broadcast_to(dense, target.shape)
    # Its own values leave it alone: DistributedDataParallel gives every parameter what the first process has.
    known = dense.dtype.is_floating_point and not target.qdata.is_meta and dense.device == target.device
    if known and torch.equal(dense, target.dequantize(dense.dtype)):
        return target
    return target.rewrite_(dense)


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


# Last, because they register their handlers in the table above.
from . import tensor_creation, tensor_views  # noqa: E402, F401
