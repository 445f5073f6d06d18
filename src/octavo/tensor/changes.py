"""Changes of an `OctavoTensor` in place: `copy_`, exact scaling, `weight.data = value`, `weight[index] = value`.

Any other change in place de-quantizes, applies, quantizes again and writes into the same storage, so that aliases see it
(`octavo_tensor.fall_back`).

Example:
    >>> import torch, octavo
    >>> weight = octavo.OctavoTensor.from_float(torch.ones(16, 64))
    >>> weight *= 0.5
    >>> weight[2:3] = 7.0
    >>> weight.dequantize()[1:3, 0]
    tensor([0.5000, 7.0000])
"""

import math
from typing import Any

import torch

from ..ops.gpu import kinds
from .octavo_tensor import FROZEN, OctavoTensor, aten, count_fallback, handles


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
                kinds.forget()
            return target
    dense = source.decode(target.dtype) if isinstance(source, OctavoTensor) else source
    dense = torch.broadcast_to(dense, target.shape)
    # Its own values leave it alone: DistributedDataParallel gives every parameter what the first process has.
    known = dense.dtype.is_floating_point and not target.qdata.is_meta and dense.device == target.device
    if known and torch.equal(dense, target.decode(dense.dtype)):
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


@handles(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]  # a property, which mypy takes for its value
def set_requires_grad(weight, value):
    if value:
        raise RuntimeError(FROZEN)


@handles(torch.Tensor.data.__set__, with_history=True)  # type: ignore[attr-defined]  # likewise
def set_data(weight, value):
    """`weight.data = value`.

    Plain values are quantized into the weight's own storage: `.data` has handed out aliases of it. The same storage again,
    as `weight.data += delta` ends, changes nothing. Another 8-bit weight is taken over as it is, with its device and
    compute dtype; so are plain values of another shape (a vocabulary that grows), once they are quantized.
    """
    if not isinstance(weight, OctavoTensor):
        return NotImplemented
    if not isinstance(value, OctavoTensor):
        if value.shape == weight.shape:
            weight.rewrite_(value)
            return
        value = weight.quantized_alike(value)
    if not _same_storage(weight, value):
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(weight, value)
        weight.take_parts(value)


def _same_storage(one: OctavoTensor, other: OctavoTensor) -> bool:
    return one.qdata is other.qdata or (
        one.device == other.device
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.transposed == other.transposed
        and one.qdata.data_ptr() == other.qdata.data_ptr() != 0
    )


@handles(torch.Tensor.__setitem__, with_history=True)
def set_item(weight, index, value):
    """`weight[index] = value`. Whole rows go through slices that share storage; anything else rewrites the weight."""
    if not isinstance(weight, OctavoTensor) or _whole_rows(weight, index):
        return NotImplemented
    # PyTorch would write into the float copy that a slice inside rows is, and the change would be lost.
    count_fallback("Tensor.__setitem__")
    dense = weight.dequantize(torch.float32)
    dense[index] = value.dequantize() if isinstance(value, OctavoTensor) else value
    if dense.requires_grad:
        weight.copy_(dense)
    else:
        weight.rewrite_(dense)


@handles(torch.Tensor.apply_)
def apply_(weight, callable):
    """PyTorch would write to the memory of floats, of which there is none."""
    return weight.rewrite_(weight.decode().apply_(callable))


def _whole_rows(weight: OctavoTensor, index: Any) -> bool:
    """Whether `index` is made of integers and slices over dimensions that are not the inside of a stored row."""
    if index is Ellipsis:
        return True
    parts = index if isinstance(index, tuple) else (index,)
    inside = weight.dim() - 2 if weight.transposed else weight.dim() - 1
    return len(parts) <= weight.dim() and all(
        (isinstance(part, slice) or (isinstance(part, int) and not isinstance(part, bool)))
        and (dim != inside or part == slice(None))
        for dim, part in enumerate(parts)
    )
