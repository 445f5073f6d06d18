"""The door to a product: past PyTorch's dispatcher where that may be, through it otherwise.

The dispatcher's way to a Python kernel costs more than a small product, so eager code goes straight to the kernels of its device,
with the same results and gradients. What is traced or compiled, what lies on another device, and wrong shapes go
through the dispatcher and its checks. Only the input and the bias are looked at here: the four parts of the weight must fit
together, as those of an `OctavoTensor` do. `octavo.ops.linear` checks everything.

torch.func's transforms (vmap, grad, jacrev, jvp) and forward-mode gradients need rules that the dispatcher's registration of
gradients has no place for: `dispatched_linear` and `dispatched_linear_transposed` bring them.

Example:
    >>> import torch
    >>> from octavo import codebook, ops
    >>> code = codebook.dynamic()
    >>> qdata, absmax = ops.quantize(torch.randn(16, 256), code, 64)
    >>> linear(torch.randn(3, 256, requires_grad=True), qdata, absmax, code, 64).shape
    torch.Size([3, 16])
"""

import torch
from torch.autograd import forward_ad

from . import cpu, gpu, schema


def linear(x, qdata, absmax, code, block_size, bias=None):
    """`octavo.ops.linear`: x Wᵀ + bias."""
    if not _straight(x, qdata, bias, qdata.shape[1]):
        return dispatched_linear(x, qdata, absmax, code, block_size, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, qdata, absmax, code, block_size, bias)
    return _linear(x, qdata, absmax, code, block_size, bias)


def linear_transposed(x, qdata, absmax, code, block_size):
    """`octavo.ops.linear_transposed`: x W."""
    if not _straight(x, qdata, None, qdata.shape[0]):
        return dispatched_linear_transposed(x, qdata, absmax, code, block_size)
    if torch.is_grad_enabled() and x.requires_grad:
        return _LinearTransposed.apply(x, qdata, absmax, code, block_size)
    return _transposed(x, qdata, absmax, code, block_size)


def dispatched_linear(*arguments):
    """`octavo.ops.linear`, by the dispatcher."""
    if _transformed():
        return _TransformedLinear.apply(*arguments)
    return torch.ops.octavo.linear(*arguments)


def dispatched_linear_transposed(*arguments):
    """`octavo.ops.linear_transposed`, by the dispatcher."""
    if _transformed():
        return _TransformedLinearTransposed.apply(*arguments)
    return torch.ops.octavo.linear_transposed(*arguments)


def _transformed() -> bool:
    """Whether torch.func transforms what runs, or gradients are taken forward."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
    )


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
        and x.dtype in schema.COMPUTE_DTYPES
        and x.dim() >= 1
        and x.shape[-1] == width
        and (bias is None or (bias.shape == qdata.shape[:1] and bias.dtype == x.dtype))
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
    )


def _linear(x, *rest):
    return cpu.linear_fast(x, *rest) if x.is_cpu else gpu.linear(x, *rest)


def _transposed(x, *rest):
    return cpu.linear_transposed_fast(x, *rest) if x.is_cpu else gpu.linear_transposed(x, *rest)


def no_view(out: torch.Tensor) -> torch.Tensor:
    """`out` as a tensor of its own: what an autograd function returns as a view may not be changed in place."""
    return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qdata, absmax, code, block_size, bias):
        schema.save_linear(ctx, (x, qdata, absmax, code, block_size, bias), None)
        return no_view(_linear(x, qdata, absmax, code, block_size, bias))

    @staticmethod
    def backward(ctx, grad):
        # Through the door again: the gradient may be mapped over, or be differentiated in its turn.
        product = dispatched_linear_transposed if _is_batched(grad) else linear_transposed
        return schema.gradients_of_linear(ctx, grad, product)


class _LinearTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qdata, absmax, code, block_size):
        schema.save_linear_transposed(ctx, (x, qdata, absmax, code, block_size), None)
        return no_view(_transposed(x, qdata, absmax, code, block_size))

    @staticmethod
    def backward(ctx, grad):
        product = dispatched_linear if _is_batched(grad) else linear
        return product(grad, *ctx.saved_tensors, ctx.block_size), None, None, None, None


def _is_batched(grad: torch.Tensor) -> bool:
    """Whether `torch.autograd.grad(is_grads_batched=True)` asks, whose tensors have no memory and whose vmap no level."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


class _TransformedLinear(torch.autograd.Function):
    """`_Linear` with the rules for torch.func. (This form costs each call more than a small product, so the other one stays.)"""

    @staticmethod
    def forward(x, qdata, absmax, code, block_size, bias=None):
        return no_view(torch.ops.octavo.linear(x, qdata, absmax, code, block_size, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        schema.save_linear(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:4])

    @staticmethod
    def backward(ctx, grad):
        # By the dispatcher: what was saved may belong to a transform that is over.
        return schema.gradients_of_linear(ctx, grad, dispatched_linear_transposed)

    @staticmethod
    def jvp(ctx, x, qdata, absmax, code, block_size, bias):
        tangent = 0 if bias is None else bias
        return tangent if x is None else linear(x, *ctx.saved_tensors, ctx.block_size) + tangent

    @staticmethod
    def vmap(info, in_dims, x, qdata, absmax, code, block_size, bias):
        bias_dim = in_dims[5]
        out = _mapped(
            dispatched_linear,
            info,
            in_dims[:5],
            x,
            qdata,
            absmax,
            code,
            block_size,
            bias if bias_dim is None else None,
        )
        if bias_dim is not None:
            bias = bias.movedim(bias_dim, 0)
            out = out + bias.view(bias.shape[0], *[1] * (out.dim() - 2), bias.shape[1])
        return out, 0


class _TransformedLinearTransposed(torch.autograd.Function):
    @staticmethod
    def forward(x, qdata, absmax, code, block_size):
        return no_view(torch.ops.octavo.linear_transposed(x, qdata, absmax, code, block_size))

    @staticmethod
    def setup_context(ctx, inputs, output):
        schema.save_linear_transposed(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:4])

    @staticmethod
    def backward(ctx, grad):
        return dispatched_linear(grad, *ctx.saved_tensors, ctx.block_size), None, None, None, None

    @staticmethod
    def jvp(ctx, x, qdata, absmax, code, block_size):
        return linear_transposed(x, *ctx.saved_tensors, ctx.block_size)

    @staticmethod
    def vmap(info, in_dims, x, qdata, absmax, code, block_size):
        return _mapped(dispatched_linear_transposed, info, in_dims, x, qdata, absmax, code, block_size), 0


def _mapped(product, info, in_dims, x, qdata, absmax, code, block_size, *bias):
    """A product mapped over a dimension, which becomes the first: of the input alone, one more dimension of tokens; where
    weights differ, one product after the other."""
    parts = (x, qdata, absmax, code)
    if in_dims[1:4] == (None, None, None):
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return product(x, qdata, absmax, code, block_size, *bias)
    parts = [
        part.expand(info.batch_size, *part.shape) if dim is None else part.movedim(dim, 0)
        for part, dim in zip(parts, in_dims, strict=False)
    ]
    return torch.stack([product(*each, block_size, *bias) for each in zip(*parts, strict=True)])
