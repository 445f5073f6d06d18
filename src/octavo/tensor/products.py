"""Products with an `OctavoTensor` and look-ups in it, sent straight to the kernels; no float copy of a weight is made.

Most are caught by function of torch (`F.linear`), before autograd: the kernels bring their own gradients. The same handlers serve
the products that PyTorch's own C++ asks for by aten operation: inside einsum, and in the backward pass of a fall-back.

Example:
    >>> import torch, octavo
    >>> experts = octavo.OctavoTensor.from_float(torch.randn(4, 32, 64))
    >>> torch.bmm(torch.randn(4, 5, 64), experts.transpose(1, 2)).shape
    torch.Size([4, 5, 32])
"""

from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from ..ops.schema import COMPUTE_DTYPES
from .octavo_tensor import OctavoTensor, aten, handles


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
    if x.dtype not in COMPUTE_DTYPES or isinstance(bias, OctavoTensor):
        return NotImplemented
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    packed = (weight.qdata, weight.absmax, weight.code, weight.block_size)
    # Stored rows are what `linear` sums over: the user's transpose and the stored one cancel out.
    if transpose != weight.transposed:
        return ops.direct.linear(x, *packed, bias)
    out = ops.direct.linear_transposed(x, *packed)
    return out if bias is None else out + bias


def is_matrix(weight: Any) -> bool:
    return isinstance(weight, OctavoTensor) and weight.qdata.dim() == 2


def is_stack(weight: Any) -> bool:
    return isinstance(weight, OctavoTensor) and weight.qdata.dim() == 3


@handles(F.linear)
def linear(input, weight, bias=None):
    if not is_matrix(weight):
        return NotImplemented
    return _product(input, weight, True, bias)


@handles(F.embedding)
def embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    # padding_idx, scale_grad_by_freq and sparse concern only the gradient of the weight, which there is none of.
    if not is_matrix(weight) or weight.transposed or max_norm is not None:
        return NotImplemented
    if weight.dtype not in COMPUTE_DTYPES:
        return NotImplemented
    return ops.embedding(input, weight.qdata, weight.absmax, weight.code, weight.block_size, weight.dtype)


@handles(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, aten.mv.default)
def matmul(input, other):
    if is_matrix(other):
        return _product(input, other, False)
    if is_matrix(input) and other.dim() <= 2:
        # W y = (yᵀ Wᵀ)ᵀ
        out = _product(other.mT if other.dim() == 2 else other, input, True)
        return out if out is NotImplemented or other.dim() == 1 else out.mT
    if input.dim() == other.dim() == 3:
        return bmm(input, other)
    return NotImplemented


@handles(torch.Tensor.__rmatmul__)
def rmatmul(weight, other):
    return matmul(other, weight)


@handles(torch.mm, torch.Tensor.mm, aten.mm.default)
def mm(input, mat2):
    return matmul(input, mat2) if input.dim() == mat2.dim() == 2 else NotImplemented


@handles(torch.addmm, torch.Tensor.addmm, aten.addmm.default)
def addmm(input, mat1, mat2, *, beta=1, alpha=1):
    if not is_matrix(mat2) or beta != 1 or alpha != 1 or isinstance(input, OctavoTensor):
        return NotImplemented
    out = _product(mat1, mat2, False, input if input.dim() == 1 else None)
    return out if out is NotImplemented or input.dim() == 1 else out + input.to(out.dtype)


@handles(torch.bmm, torch.Tensor.bmm, aten.bmm.default)
def bmm(input, mat2):
    """Products with a stack of matrices (experts), one after the other: [E, T, K] with [E, K, N] → [E, T, N]. Either of the two
    is the stack."""
    if is_stack(input) == is_stack(mat2) or isinstance(mat2 if is_stack(input) else input, OctavoTensor):
        return NotImplemented
    if input.dim() != 3 or mat2.dim() != 3 or input.shape[0] != mat2.shape[0] or not mat2.shape[0]:
        return NotImplemented
    parts = [matmul(input[index], mat2[index]) for index in range(mat2.shape[0])]
    return NotImplemented if parts[0] is NotImplemented else torch.stack(parts)


@handles(getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
def grouped_mm(mat_a, mat_b, offs=None, **options):
    """Tokens sorted by expert, each group times its expert: [T, K] with [E, K, N] and ends `offs` [E] → [T, N]."""
    if not is_stack(mat_b) or isinstance(mat_a, OctavoTensor):
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


@handles(aten.is_same_size.default)
def is_same_size(first, second):
    """What autograd asks of a gradient."""
    return first.shape == second.shape
