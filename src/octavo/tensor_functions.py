"""Hot operations on an `OctavoTensor`, caught by function and sent straight to the kernels.

Nothing here holds a float copy of a weight, save for assignments inside rows. A handler that finds arguments it has no
path for returns NotImplemented; the operation then goes on to `octavo.tensor_dispatch`. Handlers name their parameters
as PyTorch does, because users may pass them by name.

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
from .tensor import FROZEN, OctavoTensor, count_fallback

FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def call(func, args, kwargs):
    """`__torch_function__` of OctavoTensor: the handler for `func` if there is one, else PyTorch's own way."""
    handler = FUNCTIONS.get(func)
    # `out=` is rare and wants its own checks: PyTorch's way has them.
    if handler is not None and "out" not in kwargs:
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
    """x in autocast's type where autocast is on: our operations are outside its lists. It leaves float64 alone."""
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta":  # autocast knows no such device
        return x
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _product(x: torch.Tensor, weight: OctavoTensor, transpose: bool, bias: torch.Tensor | None = None):
    """x Wᵀ (`transpose`) or x W for one matrix, plus bias; W as the user sees it."""
    if isinstance(x, OctavoTensor):
        return NotImplemented
    x = _autocast(x)
    if x.dtype not in COMPUTING_TYPES or isinstance(bias, OctavoTensor):
        return NotImplemented
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    qdata = weight.qdata
    packed = (qdata, weight.absmax, weight.code, weight.block_size)
    # Stored rows are what `linear` sums over: the user's transpose and the stored one cancel out.
    if transpose != weight.transposed:
        if ops.direct.possible(x, qdata, bias, qdata.shape[1]):
            return ops.direct.linear(x, *packed, bias)
        return ops.linear(x, *packed, bias)
    if ops.direct.possible(x, qdata, None, qdata.shape[0]):
        out = ops.direct.linear_transposed(x, *packed)
    else:
        out = ops.linear_transposed(x, *packed)
    return out if bias is None else out + bias


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, OctavoTensor) and weight.qdata.dim() == 2


def _is_stack(weight: Any) -> bool:
    return isinstance(weight, OctavoTensor) and weight.qdata.dim() == 3


@handles(F.linear)
def linear(input, weight, bias=None):
    if not _is_matrix(weight):
        return NotImplemented
    return _product(input, weight, True, bias)


@handles(F.embedding)
def embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    # padding_idx, scale_grad_by_freq and sparse concern only the gradient of the weight, which there is none of.
    if not _is_matrix(weight) or weight.transposed or max_norm is not None:
        return NotImplemented
    if weight.dtype not in COMPUTING_TYPES:
        return NotImplemented
    return ops.embedding(input, weight.qdata, weight.absmax, weight.code, weight.block_size, weight.dtype)


@handles(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def matmul(input, other):
    if _is_matrix(other):
        return _product(input, other, False)
    if _is_matrix(input) and other.dim() <= 2:
        # W y = (yᵀ Wᵀ)ᵀ
        out = _product(other.mT if other.dim() == 2 else other, input, True)
        return out if out is NotImplemented or other.dim() == 1 else out.mT
    if input.dim() == other.dim() == 3:
        return bmm(input, other)
    return NotImplemented


@handles(torch.Tensor.__rmatmul__)
def rmatmul(weight, other):
    return matmul(other, weight)


@handles(torch.mm, torch.Tensor.mm)
def mm(input, mat2):
    return matmul(input, mat2) if input.dim() == mat2.dim() == 2 else NotImplemented


@handles(torch.addmm, torch.Tensor.addmm)
def addmm(input, mat1, mat2, *, beta=1, alpha=1):
    if not _is_matrix(mat2) or beta != 1 or alpha != 1 or isinstance(input, OctavoTensor):
        return NotImplemented
    out = _product(mat1, mat2, False, input if input.dim() == 1 else None)
    return out if out is NotImplemented or input.dim() == 1 else out + input.to(out.dtype)


@handles(torch.bmm, torch.Tensor.bmm)
def bmm(input, mat2):
    """Products with a stack of matrices (experts), one after the other: [E, T, K] with [E, K, N] → [E, T, N]. Either of the two
    is the stack."""
    if _is_stack(input) == _is_stack(mat2) or isinstance(mat2 if _is_stack(input) else input, OctavoTensor):
        return NotImplemented
    if input.dim() != 3 or mat2.dim() != 3 or input.shape[0] != mat2.shape[0] or not mat2.shape[0]:
        return NotImplemented
    parts = [matmul(input[index], mat2[index]) for index in range(mat2.shape[0])]
    return NotImplemented if parts[0] is NotImplemented else torch.stack(parts)


@handles(torch.baddbmm, torch.Tensor.baddbmm)
def baddbmm(input, batch1, batch2, *, beta=1, alpha=1):
    if _is_stack(input) and beta == 1:
        # PEFT adapts experts so.
        from .tensor_adapted import adapted

        return adapted(input, batch1, batch2, alpha)
    if beta != 1 or alpha != 1 or isinstance(input, OctavoTensor):
        return NotImplemented
    out = bmm(batch1, batch2)
    return out if out is NotImplemented else out + input.to(out.dtype)


@handles(getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
def grouped_mm(mat_a, mat_b, offs=None, **options):
    """Tokens sorted by expert, each group times its expert: [T, K] with [E, K, N] and ends `offs` [E] → [T, N]."""
    if not _is_stack(mat_b) or isinstance(mat_a, OctavoTensor):
        return NotImplemented
    if mat_a.dim() != 2 or offs is None or any(value is not None for value in options.values()):
        return NotImplemented
    out, start = [], 0
    for expert, stop in enumerate(offs.tolist()):
        if stop > start:
            out.append(_product(mat_a[start:stop], mat_b[expert], False))
        start = stop
    if any(part is NotImplemented for part in out):
        return NotImplemented
    if start < mat_a.shape[0] or not out:
        # Rows after the last group belong to no expert; torch leaves them undefined, we give zeros.
        like = out[0] if out else _autocast(mat_a)
        out.append(like.new_zeros(mat_a.shape[0] - start, mat_b.shape[-1]))
    return torch.cat(out)


@handles(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]  # a property, which mypy takes for its value
def set_requires_grad(weight, value):
    if value:
        raise RuntimeError(FROZEN)


@handles(torch.Tensor.data.__set__)  # type: ignore[attr-defined]  # likewise
def set_data(weight, value):
    """`weight.data = value`.

    Plain values are quantized into the weight's own storage: `.data` has handed out aliases of it. The same storage again,
    as `weight.data += delta` ends, changes nothing. Another 8-bit weight is taken over as it is, with its device and
    computing type; so are plain values of another shape (a vocabulary that grows), once they are quantized.
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


@handles(torch.Tensor.__setitem__)
def set_item(weight, index, value):
    """`weight[index] = value`. Whole rows go through slices that share storage; anything else rewrites the weight."""
    if not isinstance(weight, OctavoTensor) or _whole_rows(weight, index):
        return NotImplemented
    # PyTorch would write into the float copy that a slice inside rows is, and the change would be lost.
    count_fallback("Tensor.__setitem__")
    dense = weight.dequantize(torch.float32)
    dense[index] = value.dequantize() if isinstance(value, OctavoTensor) else value
    weight.rewrite_(dense)


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


def _on_floats(function: Callable) -> Callable:
    def run(weight, *args, **kwargs):
        if not isinstance(weight, OctavoTensor):
            return NotImplemented
        count_fallback(f"Tensor.{function.__name__}")
        return function(weight.dequantize(), *args, **kwargs)

    return run


# PyTorch refuses these to every tensor subclass; on the float values they mean what they say.
for _function in (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__):
    FUNCTIONS[_function] = _on_floats(_function)
