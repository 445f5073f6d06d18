"""The door to a product: past PyTorch's dispatcher where that may be, through it otherwise.

The dispatcher's way to a Python kernel costs more than a small product, so eager code goes straight to the kernels of its device,
with the same results and gradients. What is traced, transformed or compiled, what lies on another device, and wrong shapes go
through the dispatcher and its checks. Only the input and the bias are looked at here: the four parts of the weight must fit
together, as those of an `OctavoTensor` do. `octavo.ops.linear` checks everything.

Example:
    >>> import torch
    >>> from octavo import codebook, ops
    >>> code = codebook.dynamic()
    >>> qdata, absmax = ops.quantize(torch.randn(16, 256), code, 64)
    >>> linear(torch.randn(3, 256, requires_grad=True), qdata, absmax, code, 64).shape
    torch.Size([3, 16])
"""

import torch

from . import cpu, schema, triton


def linear(x, qdata, absmax, code, block_size, bias=None):
    """`octavo.ops.linear`: x Wᵀ + bias."""
    if not _straight(x, qdata, bias, qdata.shape[1]):
        return torch.ops.octavo.linear(x, qdata, absmax, code, block_size, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, qdata, absmax, code, block_size, bias)
    return _linear(x, qdata, absmax, code, block_size, bias)


def linear_transposed(x, qdata, absmax, code, block_size):
    """`octavo.ops.linear_transposed`: x W."""
    if not _straight(x, qdata, None, qdata.shape[0]):
        return torch.ops.octavo.linear_transposed(x, qdata, absmax, code, block_size)
    if torch.is_grad_enabled() and x.requires_grad:
        return _LinearTransposed.apply(x, qdata, absmax, code, block_size)
    return _transposed(x, qdata, absmax, code, block_size)


def _straight(x: torch.Tensor, qdata: torch.Tensor, bias: torch.Tensor | None, width: int) -> bool:
    """Whether x [..., width] may go straight to the kernels of `qdata`'s device.

    The kernels read raw memory: shapes, types and devices must be right, and nothing may be watching the dispatcher.
    """
    if x.is_cpu:  # a quarter of the time of `x.device.type`
        ready = qdata.is_cpu and cpu.AVAILABLE and (bias is None or bias.is_cpu)
    else:
        ready = x.is_cuda and qdata.is_cuda and x.get_device() == qdata.get_device()
        ready = ready and (bias is None or bias.get_device() == x.get_device())
    return (
        ready
        and type(x) is torch.Tensor
        and x.dtype in schema.COMPUTING_TYPES
        and x.dim() >= 1
        and x.shape[-1] == width
        and (bias is None or (bias.shape == qdata.shape[:1] and bias.dtype == x.dtype))
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
    )


def _linear(x, *rest):
    return cpu.linear_fast(x, *rest) if x.is_cpu else triton.linear(x, *rest)


def _transposed(x, *rest):
    return cpu.linear_transposed_fast(x, *rest) if x.is_cpu else triton.linear_transposed(x, *rest)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qdata, absmax, code, block_size, bias):
        schema.save_linear(ctx, (x, qdata, absmax, code, block_size, bias), None)
        return _linear(x, qdata, absmax, code, block_size, bias)

    @staticmethod
    def backward(ctx, grad):
        # Through the door again: the gradient may be mapped over, or be differentiated in its turn.
        return schema.gradients_of_linear(ctx, grad, linear_transposed)


class _LinearTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qdata, absmax, code, block_size):
        ctx.save_for_backward(qdata, absmax, code)
        ctx.block_size = block_size
        return _transposed(x, qdata, absmax, code, block_size)

    @staticmethod
    def backward(ctx, grad):
        return linear(grad, *ctx.saved_tensors, ctx.block_size), None, None, None, None
