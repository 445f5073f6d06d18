"""Hot operations on an `OctavoTensor`, caught by function and sent straight to the kernels.

Nothing here holds a float copy of a weight. A handler that finds arguments it has no path for returns NotImplemented; the
operation then goes on to `octavo.tensor_dispatch`.

Example:
    >>> import torch, octavo
    >>> experts = octavo.OctavoTensor.from_float(torch.randn(4, 32, 64))
    >>> torch.bmm(torch.randn(4, 5, 64), experts.transpose(1, 2)).shape
    torch.Size([4, 5, 32])
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .ops.schema import COMPUTING_TYPES
from .tensor import FROZEN, OctavoTensor

FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def call(func, args, kwargs):
    """`__torch_function__` of OctavoTensor: the handler for `func` if there is one, else PyTorch's own way."""
    handler = FUNCTIONS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def handles(*functions) -> Callable[[Callable], Callable]:
    """Register a handler for functions of torch (those that this version of torch has)."""

    def register(handler: Callable) -> Callable:
        FUNCTIONS.update((function, handler) for function in functions if function is not None)
        return handler

    return register


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's type where autocast is on: our operations are outside its lists."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(device))
    return x


def _product(x: torch.Tensor, weight: OctavoTensor, transpose: bool, bias: torch.Tensor | None = None):
    """x Wᵀ (`transpose`) or x W for one matrix, plus bias; W as the user sees it."""
    x = _autocast(x)
    if type(x) is OctavoTensor or x.dtype not in COMPUTING_TYPES:
        return NotImplemented
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    packed = (weight.qdata, weight.absmax, weight.code, weight.block_size)
    # Stored rows are what `linear` sums over: the user's transpose and the stored one cancel out.
    if transpose != weight.transposed:
        return ops.linear(x, *packed, bias)
    out = ops.linear_transposed(x, *packed)
    return out if bias is None else out + bias


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, OctavoTensor) and weight.qdata.dim() == 2


@handles(F.linear)
def linear(x, weight, bias=None):
    if not _is_matrix(weight):
        return NotImplemented
    return _product(x, weight, True, bias)


@handles(F.embedding)
def embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    if (
        not _is_matrix(weight)
        or weight.transposed
        or max_norm is not None
        or weight.dtype not in COMPUTING_TYPES
    ):
        return NotImplemented
    return ops.embedding(input, weight.qdata, weight.absmax, weight.code, weight.block_size, weight.dtype)


@handles(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
def matmul(x, other):
    if _is_matrix(other):
        return _product(x, other, False)
    if _is_matrix(x) and other.dim() <= 2:
        # W y = (yᵀ Wᵀ)ᵀ
        out = _product(other.mT if other.dim() == 2 else other, x, True)
        return out if out is NotImplemented or other.dim() == 1 else out.mT
    if isinstance(other, OctavoTensor) and other.qdata.dim() == 3 and x.dim() == 3:
        return bmm(x, other)
    return NotImplemented


@handles(torch.Tensor.__rmatmul__)
def rmatmul(weight, x):
    return matmul(x, weight)


@handles(torch.addmm, torch.Tensor.addmm)
def addmm(bias, x, other, *, beta=1, alpha=1):
    if not _is_matrix(other) or beta != 1 or alpha != 1 or isinstance(bias, OctavoTensor):
        return NotImplemented
    out = _product(x, other, False, bias if bias.dim() == 1 else None)
    return out if out is NotImplemented or bias.dim() == 1 else out + bias


@handles(torch.bmm, torch.Tensor.bmm)
def bmm(x, other):
    """Products with a stack of matrices (experts), one after the other: [E, T, K] with [E, K, N] → [E, T, N]."""
    if not (isinstance(other, OctavoTensor) and other.qdata.dim() == 3) or isinstance(x, OctavoTensor):
        return NotImplemented
    if x.dim() != 3 or x.shape[0] != other.shape[0] or not other.shape[0]:
        return NotImplemented
    parts = [_product(x[index], other[index], False) for index in range(other.shape[0])]
    return NotImplemented if parts[0] is NotImplemented else torch.stack(parts)


@handles(torch.baddbmm, torch.Tensor.baddbmm)
def baddbmm(bias, x, other, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1:
        return NotImplemented
    out = bmm(x, other)
    return out if out is NotImplemented else out + bias


@handles(getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
def grouped_mm(x, weight, offs=None, **options):
    """Tokens sorted by expert, each group times its expert: [T, K] with [E, K, N] and ends `offs` [E] → [T, N]."""
    if not (isinstance(weight, OctavoTensor) and weight.qdata.dim() == 3) or isinstance(x, OctavoTensor):
        return NotImplemented
    if x.dim() != 2 or offs is None or any(value is not None for value in options.values()):
        return NotImplemented
    out, start = [], 0
    for expert, stop in enumerate(offs.tolist()):
        if stop > start:
            out.append(_product(x[start:stop], weight[expert], False))
        start = stop
    if start < x.shape[0]:
        # Rows after the last group belong to no expert; torch leaves them undefined, we give zeros.
        out.append(x.new_zeros(x.shape[0] - start, weight.shape[-1]))
    if any(part is NotImplemented for part in out):
        return NotImplemented
    return torch.cat(out) if out else x.new_zeros(0, weight.shape[-1])


@handles(torch.Tensor.requires_grad.__set__)
def set_requires_grad(weight, value):
    if value:
        raise RuntimeError(FROZEN)


@handles(torch.Tensor.data.__set__)
def set_data(weight, value):
    """`weight.data = value` writes into the weight's own storage: `.data` has handed out aliases of it."""
    if not isinstance(weight, OctavoTensor):
        return NotImplemented
    if not isinstance(value, OctavoTensor):
        weight.rewrite_(value)
    elif value.qdata is not weight.qdata and value.qdata.data_ptr() != weight.qdata.data_ptr():
        weight.copy_(value)
