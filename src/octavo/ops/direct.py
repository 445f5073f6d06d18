"""Products past PyTorch's dispatcher, whose way to a Python kernel costs more than a small product: eager code takes this one.

Same results and gradients as `octavo.ops.linear` and `linear_transposed`, but no checks: callers ask `possible` first. What
is traced, transformed or compiled goes through the dispatcher.

Example:
    >>> import torch
    >>> from octavo import codebook, ops
    >>> code = codebook.dynamic()
    >>> qdata, absmax = ops.quantize(torch.randn(16, 256), code, 64)
    >>> x = torch.randn(3, 256, requires_grad=True)
    >>> possible(x, qdata, None, 256), linear(x, qdata, absmax, code, 64, None).shape
    (True, torch.Size([3, 16]))
"""

import torch

from . import cpu, schema, triton


def possible(x: torch.Tensor, qdata: torch.Tensor, bias: torch.Tensor | None, width: int) -> bool:
    """Whether x [..., width], of a computing type, may go straight to the kernels of `qdata`'s device.

    The kernels read raw memory: shapes and devices must be right, and nothing may be watching the dispatcher.
    """
    if x.is_cpu:  # a quarter of the time of `x.device.type`
        ready = qdata.is_cpu and cpu.AVAILABLE and (bias is None or bias.is_cpu)
    else:
        ready = x.is_cuda and qdata.is_cuda and x.get_device() == qdata.get_device()
        ready = ready and (bias is None or bias.get_device() == x.get_device())
    return (
        ready
        and type(x) is torch.Tensor
        and x.dim() >= 1
        and x.shape[-1] == width
        and (bias is None or bias.shape == qdata.shape[:1])
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
    )


def linear(x, qdata, absmax, code, block_size, bias):
    """`octavo.ops.linear` for a call that is `possible` with the columns of qdata as its width."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, qdata, absmax, code, block_size, bias)
    return _linear(x, qdata, absmax, code, block_size, bias)


def linear_transposed(x, qdata, absmax, code, block_size):
    """`octavo.ops.linear_transposed` for a call that is `possible` with the rows of qdata as its width."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _LinearTransposed.apply(x, qdata, absmax, code, block_size)
    return _transposed(x, qdata, absmax, code, block_size)


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
        # A backward pass that is itself differentiated takes the way that knows its gradient.
        transposed = torch.ops.octavo.linear_transposed if torch.is_grad_enabled() else _transposed
        return schema.gradients_of_linear(ctx, grad, transposed)


class _LinearTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qdata, absmax, code, block_size):
        ctx.save_for_backward(qdata, absmax, code)
        ctx.block_size = block_size
        return _transposed(x, qdata, absmax, code, block_size)

    @staticmethod
    def backward(ctx, grad):
        packed = (*ctx.saved_tensors, ctx.block_size)
        product = torch.ops.octavo.linear if torch.is_grad_enabled() else _linear
        return product(grad, *packed, None), None, None, None, None
