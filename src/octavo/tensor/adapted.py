"""A stack of 8-bit matrices plus a low-rank change, multiplied without ever being summed: LoRA on experts.

PEFT adapts the experts of a mixture (`target_parameters`) by `torch.baddbmm(W, B, A, alpha=scaling)`, of which a model then picks
experts or multiplies groups. Summed, that is a float copy of all experts in each layer, kept for the backward pass. `Adapted` is
what `baddbmm` returns instead: products with it are `x W + scaling · (x B) A`. Anything else is done with the sum, and counted
as a fall-back.

    weight    OctavoTensor [E, N, K] or [N, K], transposes included
    left      float        [E, N, r] or [N, r]
    right     float        [E, r, K] or [r, K]

Example:
    >>> import torch, octavo
    >>> experts = octavo.OctavoTensor.from_float(torch.randn(4, 32, 64))
    >>> adapted = torch.baddbmm(experts, torch.randn(4, 32, 2), torch.randn(4, 2, 64), alpha=0.5)
    >>> type(adapted).__name__, torch.nn.functional.linear(torch.randn(5, 64), adapted[3]).shape
    ('Adapted', torch.Size([5, 32]))
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from . import products
from .octavo_tensor import OctavoTensor, count_fallback, handles

# Handlers of functions that are given an `Adapted`.
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
handles_adapted = functools.partial(handles, functions=FUNCTIONS)
# What does not look at values.
METADATA = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
}


class Adapted(torch.Tensor):
    """`weight + scaling · left @ right`, in parts (see the module)."""

    weight: OctavoTensor
    left: torch.Tensor
    right: torch.Tensor
    scaling: float

    @staticmethod
    def __new__(cls, weight, left, right, scaling):
        return torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False
        )

    def __init__(self, weight: OctavoTensor, left: torch.Tensor, right: torch.Tensor, scaling: float):
        self.weight, self.left, self.right, self.scaling = weight, left, right, scaling
        self.versions = (left._version, right._version)

    def summed(self) -> torch.Tensor:
        """The float sum, with its gradients."""
        count_fallback("aten.baddbmm.default")
        self.check()
        return self.weight.dequantize() + self.scaling * (self.left @ self.right)

    def check(self) -> None:
        """Raise RuntimeError if an adapter was changed in place since: the sum would then have had its old values."""
        if (self.left._version, self.right._version) != self.versions:
            raise RuntimeError(
                "an adapter was modified by an inplace operation after its sum with an 8-bit weight was taken"
            )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch names it otherwise
        return f"Adapted({self.weight!r}, rank={self.left.shape[-1]}, scaling={self.scaling})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = FUNCTIONS.get(func)
        if handler is not None and "out" not in kwargs:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(Adapted, Adapted.summed, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Below autograd the adapters' gradients would be lost without a word.
        raise NotImplementedError(
            f"{func} on an adapted 8-bit weight was not called through torch's functions"
        )


def adapted(weight: OctavoTensor, left: Any, right: Any, scaling: float) -> Any:
    """`weight + scaling · left @ right` in parts; NotImplemented if these are no parts, or where a graph is traced."""
    if torch.compiler.is_compiling() or not isinstance(scaling, (int, float)):
        return NotImplemented
    plain = (torch.Tensor, torch.nn.Parameter)
    if type(left) not in plain or type(right) not in plain or left.dtype != weight.dtype:
        return NotImplemented
    shape = (*left.shape[:-1], right.shape[-1])
    if weight.dim() != 3 or left.dim() != 3 or right.dim() != 3 or shape != tuple(weight.shape):
        return NotImplemented
    return Adapted(weight, left, right, float(scaling))


@handles(torch.baddbmm, torch.Tensor.baddbmm)
def baddbmm(input, batch1, batch2, *, beta=1, alpha=1):
    if products.is_stack(input) and beta == 1:
        return adapted(input, batch1, batch2, alpha)
    if beta != 1 or alpha != 1 or isinstance(input, OctavoTensor):
        return NotImplemented
    out = products.bmm(batch1, batch2)
    return out if out is NotImplemented else out + input.to(out.dtype)


@handles_adapted(torch.Tensor.__getitem__)
def pick(stack, index):
    """One expert, or several by their numbers."""
    if not isinstance(stack, Adapted) or stack.dim() != 3 or isinstance(index, (tuple, list, slice, bool)):
        return NotImplemented
    if isinstance(index, torch.Tensor) and (index.dtype not in (torch.int32, torch.int64) or index.dim() > 1):
        return NotImplemented
    if index is None or index is Ellipsis:
        return NotImplemented
    weight = stack.weight[index]
    if not isinstance(weight, OctavoTensor):
        return NotImplemented
    stack.check()
    return Adapted(weight, stack.left[index], stack.right[index], stack.scaling)


@handles_adapted(torch.Tensor.transpose, torch.transpose)
def transpose(stack, dim0, dim1):
    if {dim0 % stack.dim(), dim1 % stack.dim()} != {stack.dim() - 1, stack.dim() - 2}:
        return NotImplemented
    return _flipped(stack)


@handles_adapted(torch.Tensor.mT.__get__, torch.Tensor.T.__get__, torch.Tensor.t, torch.t)  # type: ignore[attr-defined]
def flip(stack):
    return _flipped(stack)


def _flipped(stack: Adapted) -> Any:
    stack.check()
    weight: Any = stack.weight.mT
    return Adapted(weight, stack.right.mT, stack.left.mT, stack.scaling)


@handles_adapted(F.linear)
def linear(input, weight, bias=None):
    if not isinstance(weight, Adapted) or weight.dim() != 2:
        return NotImplemented
    weight.check()
    change = F.linear(F.linear(input, weight.right), weight.left)
    return F.linear(input, weight.weight, bias) + weight.scaling * change


@handles_adapted(
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
)
def matmul(input, other):
    if isinstance(input, Adapted) == isinstance(other, Adapted):
        return NotImplemented
    stack = other if isinstance(other, Adapted) else input
    # A matrix takes any number of leading dimensions on its left; stacks are multiplied one by one.
    if not (input.dim() == other.dim() or (stack is other and stack.dim() == 2)):
        return NotImplemented
    stack.check()
    if stack is other:
        return input @ stack.weight + stack.scaling * ((input @ stack.left) @ stack.right)
    return stack.weight @ other + stack.scaling * (stack.left @ (stack.right @ other))


@handles_adapted(getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
def grouped_mm(mat_a, mat_b, offs=None, **options):
    """Tokens sorted by expert, each group times its expert (see `products`)."""
    if not isinstance(mat_b, Adapted) or isinstance(mat_a, Adapted) or mat_b.dim() != 3 or offs is None:
        return NotImplemented
    if mat_a.dim() != 2 or any(value is not None for value in options.values()):
        return NotImplemented
    out = products.grouped_mm(mat_a, mat_b.weight, offs=offs)
    if out is NotImplemented:
        return out
    mat_b.check()
    changes, start = [], 0
    for expert, stop in enumerate(offs.tolist()):
        if stop > start:
            changes.append((mat_a[start:stop] @ mat_b.left[expert]) @ mat_b.right[expert])
        start = max(start, stop)
    changes.append(out.new_zeros(mat_a.shape[0] - start, out.shape[1]))
    return out + mat_b.scaling * torch.cat(changes)
