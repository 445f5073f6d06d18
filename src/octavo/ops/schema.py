"""The contract of Octavo's operations: schemas, checks, shape (fake) versions and autograd formulas.

Every operation is declared here once, over plain tensors. A device only registers an implementation:

    @schema.implementation("linear", "CPU")
    def linear(x, qdata, absmax, code, block_size, bias): ...

The checks below run before every registered implementation, so that a kernel working on raw pointers may rely on
shapes, types and devices. Layout, for a matrix of N outputs and K inputs in blocks of B:

    qdata   uint8              [N, K]            index into the codebook
    absmax  float16 | float32  [N, ceil(K / B)]  scale of each run of B weights of one row
    code    float32            [256]             codebook, ascending

    weight[n, k] = code[qdata[n, k]] * absmax[n, k // B]     (float32, then rounded to the type asked for)

Example:
    >>> import torch, octavo.ops as ops
    >>> from octavo import codebook
    >>> w = torch.randn(8, 128)
    >>> qdata, absmax = ops.quantize(w, codebook.dynamic(), 64)
    >>> torch.ops.octavo.linear(torch.randn(2, 128), qdata, absmax, codebook.dynamic(), 64, None).shape
    torch.Size([2, 8])
"""

from collections.abc import Callable

import torch

NAMESPACE = "octavo"
COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}
# What CUDA sources know the types by.
DTYPE_CODES = {dtype: code for code, dtype in enumerate(COMPUTE_DTYPES)}
SCALE_TYPES = (torch.float16, torch.float32)

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
LIBRARY.define(
    "quantize(Tensor weight, Tensor code, int block_size, ScalarType absmax_dtype) -> (Tensor qdata, Tensor absmax)"
)
LIBRARY.define(
    "dequantize(Tensor qdata, Tensor absmax, Tensor code, int block_size, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "linear(Tensor x, Tensor qdata, Tensor absmax, Tensor code, int block_size, Tensor? bias=None) -> Tensor"
)
LIBRARY.define(
    "linear_transposed(Tensor x, Tensor qdata, Tensor absmax, Tensor code, int block_size) -> Tensor"
)
LIBRARY.define(
    "embedding(Tensor ids, Tensor qdata, Tensor absmax, Tensor code, int block_size, ScalarType dtype) -> Tensor"
)
LIBRARY.define("histogram(Tensor weight, int block_size, int bins, ScalarType absmax_dtype) -> Tensor")


def blocks_per_row(columns: int, block_size: int) -> int:
    """Number of scales of a row of `columns` weights: ceil(columns / block_size)."""
    return -(-columns // block_size)


def _require(ok: bool, operation: str, what: str, expected: object, found: object) -> None:
    if not ok:
        raise ValueError(f"octavo.{operation}: {what}: expected {expected}, found {found}")


def _check_block_size(operation: str, block_size: int) -> None:
    _require(block_size >= 1, operation, "block_size", "a positive integer", block_size)


def _check_code(operation: str, code: torch.Tensor) -> None:
    _require(code.dtype == torch.float32, operation, "type of code", torch.float32, code.dtype)
    _require(tuple(code.shape) == (256,), operation, "shape of code", (256,), tuple(code.shape))


def check_packed(
    operation: str, qdata: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block_size: int
) -> None:
    """Check that three tensors are one quantized matrix. Raises ValueError naming what differs."""
    _check_block_size(operation, block_size)
    _require(qdata.dtype == torch.uint8, operation, "type of qdata", torch.uint8, qdata.dtype)
    _require(qdata.dim() == 2, operation, "dimensions of qdata", 2, qdata.dim())
    _require(absmax.dtype in SCALE_TYPES, operation, "type of absmax", "float16 or float32", absmax.dtype)
    rows, columns = qdata.shape
    shape = (rows, blocks_per_row(columns, block_size))
    _require(
        tuple(absmax.shape) == shape,
        operation,
        f"shape of absmax for qdata {tuple(qdata.shape)} in blocks of {block_size}",
        shape,
        tuple(absmax.shape),
    )
    _check_code(operation, code)
    _require(
        qdata.device == absmax.device == code.device,
        operation,
        "devices of qdata, absmax, code",
        f"all on {qdata.device}",
        (str(qdata.device), str(absmax.device), str(code.device)),
    )


def _check_input(operation: str, x: torch.Tensor, width: int, qdata: torch.Tensor) -> None:
    _check_dtype(operation, "type of the input", x.dtype)
    fits = x.dim() >= 1 and x.shape[-1] == width
    _require(fits, operation, "last dimension of the input", width, tuple(x.shape))
    _require(x.device == qdata.device, operation, "device of the input", qdata.device, x.device)


def _check_weight(operation: str, weight: torch.Tensor, block_size: int, absmax_dtype: torch.dtype) -> None:
    """A weight to be quantized, and how."""
    _check_block_size(operation, block_size)
    _require(weight.dim() == 2, operation, "dimensions of the weight", 2, weight.dim())
    _require(weight.is_floating_point(), operation, "type of the weight", "floating point", weight.dtype)
    _require(absmax_dtype in SCALE_TYPES, operation, "type of the scales", "float16 or float32", absmax_dtype)


def _check_dtype(operation: str, what: str, dtype: torch.dtype) -> None:
    _require(dtype in COMPUTE_DTYPES, operation, what, "float32, float16 or bfloat16", dtype)


def check_quantize(weight, code, block_size, absmax_dtype) -> None:
    _check_weight("quantize", weight, block_size, absmax_dtype)
    _check_code("quantize", code)
    _require(weight.device == code.device, "quantize", "device of code", weight.device, code.device)


def check_dequantize(qdata, absmax, code, block_size, dtype) -> None:
    check_packed("dequantize", qdata, absmax, code, block_size)
    _check_dtype("dequantize", "type asked for", dtype)


def check_linear(x, qdata, absmax, code, block_size, bias=None) -> None:
    check_packed("linear", qdata, absmax, code, block_size)
    _check_input("linear", x, qdata.shape[1], qdata)
    if bias is not None:
        expected, found = (qdata.shape[0],), tuple(bias.shape)
        _require(found == expected, "linear", "shape of bias", expected, found)
        _require(bias.device == x.device, "linear", "device of bias", x.device, bias.device)


def check_linear_transposed(x, qdata, absmax, code, block_size) -> None:
    check_packed("linear_transposed", qdata, absmax, code, block_size)
    _check_input("linear_transposed", x, qdata.shape[0], qdata)


def check_embedding(ids, qdata, absmax, code, block_size, dtype) -> None:
    check_packed("embedding", qdata, absmax, code, block_size)
    _require(ids.dtype in (torch.int64, torch.int32), "embedding", "type of ids", "int64 or int32", ids.dtype)
    _require(ids.device == qdata.device, "embedding", "device of ids", qdata.device, ids.device)
    _check_dtype("embedding", "type asked for", dtype)


def check_histogram(weight, block_size, bins, absmax_dtype) -> None:
    _check_weight("histogram", weight, block_size, absmax_dtype)
    _require(bins >= 3 and bins % 2 == 1, "histogram", "bins", "an odd number of at least 3", bins)


CHECKS: dict[str, Callable[..., None]] = {
    "quantize": check_quantize,
    "dequantize": check_dequantize,
    "linear": check_linear,
    "linear_transposed": check_linear_transposed,
    "embedding": check_embedding,
    "histogram": check_histogram,
}


def implementation(operation: str, dispatch_key: str) -> Callable[[Callable], Callable]:
    """Register a function as the implementation of `operation` for a device, behind the operation's checks.

    Args:
        operation: one of `CHECKS`.
        dispatch_key: "CPU", "CUDA", or "CompositeExplicitAutograd" for the fallback of all devices.

    Returns:
        A decorator that returns the function unchanged, so that it can be called and tested directly.
    """
    check = CHECKS[operation]

    def register(function: Callable) -> Callable:
        def checked(*args):
            check(*args)
            return function(*args)

        LIBRARY.impl(operation, checked, dispatch_key)
        return function

    return register


def _shapes_of(operation: str) -> Callable[[Callable], None]:
    """Register a function as the shape (fake) version of `operation`, behind its checks."""

    def register(function: Callable) -> None:
        def checked(*args):
            CHECKS[operation](*args)
            return function(*args)

        torch.library.register_fake(f"{NAMESPACE}::{operation}", checked, lib=LIBRARY)

    return register


@_shapes_of("quantize")
def _(weight, code, block_size, absmax_dtype):
    rows, columns = weight.shape
    qdata = weight.new_empty((rows, columns), dtype=torch.uint8)
    return qdata, weight.new_empty((rows, blocks_per_row(columns, block_size)), dtype=absmax_dtype)


@_shapes_of("dequantize")
def _(qdata, absmax, code, block_size, dtype):
    return qdata.new_empty(qdata.shape, dtype=dtype)


@_shapes_of("linear")
def _(x, qdata, absmax, code, block_size, bias=None):
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


@_shapes_of("linear_transposed")
def _(x, qdata, absmax, code, block_size):
    return x.new_empty((*x.shape[:-1], qdata.shape[1]))


@_shapes_of("embedding")
def _(ids, qdata, absmax, code, block_size, dtype):
    return qdata.new_empty((*ids.shape, qdata.shape[1]), dtype=dtype)


@_shapes_of("histogram")
def _(weight, block_size, bins, absmax_dtype):
    return weight.new_empty((bins,), dtype=torch.int64)


def save_linear(ctx, inputs, output):
    _, qdata, absmax, code, block_size, bias = inputs
    ctx.block_size = block_size
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qdata, absmax, code)


def gradients_of_linear(ctx, grad, transposed):
    """Gradients of x (grad W, from the quantized weight, panel by panel) and of bias (grad summed over tokens), of what
    `save_linear` noted.

    Args:
        transposed: `linear_transposed` by the way to be taken.
    """
    qdata, absmax, code = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = transposed(grad, qdata, absmax, code, ctx.block_size)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias


def _backward_linear(ctx, grad):
    return gradients_of_linear(ctx, grad, torch.ops.octavo.linear_transposed)


def save_linear_transposed(ctx, inputs, output):
    _, qdata, absmax, code, ctx.block_size = inputs
    ctx.save_for_backward(qdata, absmax, code)


def _backward_linear_transposed(ctx, grad):
    qdata, absmax, code = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.octavo.linear(grad, qdata, absmax, code, ctx.block_size, None)
    return grad_x, None, None, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::linear", _backward_linear, setup_context=save_linear, lib=LIBRARY
)
torch.library.register_autograd(
    f"{NAMESPACE}::linear_transposed",
    _backward_linear_transposed,
    setup_context=save_linear_transposed,
    lib=LIBRARY,
)
