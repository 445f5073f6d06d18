"""The operations of `octavo.ops` on GPUs.

Importing this registers them for PyTorch's "CUDA" devices; Triton, NVRTC and the kernels are loaded when they
are first called. One job per file: `kernels/` holds the kernels, each with its record (`kernel`), `choose` picks one for a call,
`verify` checks each before its first use, `cuda_launch` (with `cuda/*.cu` and `nvrtc`) and `triton_tables` are what kernels
share. docs/GPU.md explains them.

`linear`, `embedding` and `dequantize` never wait for the device and launch the same work whatever the data,
so they can be captured in CUDA graphs; run once before capturing, because the first call compiles and checks.
`quantize` and `histogram` wait once, to report NaN.

Under TRITON_INTERPRET=1 the functions take CPU tensors and run Triton's kernels in its interpreter.

Example:
    >>> import torch, octavo.ops as ops
    >>> ops.linear(x.cuda(), qdata.cuda(), absmax.cuda(), code.cuda(), 64).device   # doctest: +SKIP
    device(type='cuda', index=0)
"""

import functools
from collections.abc import Callable

import torch

from ..schema import implementation
from . import choose, device, kinds, nvrtc, verify
from .kernels import panels

__all__ = ["dequantize", "embedding", "histogram", "linear", "linear_transposed", "quantize", "status"]


def _on_its_device(function: Callable) -> Callable:
    """Run a function with the device of its first argument as the current one, which is where launches go."""

    @functools.wraps(function)
    def run(first, *rest):
        if first.is_cuda and first.get_device() != nvrtc.current_device():
            with torch.cuda.device(first.device):
                return function(first, *rest)
        return function(first, *rest)

    return run


def _is_segments(code: torch.Tensor) -> bool:
    # One that has to be copied for every call would have to be read back for every call.
    return code.is_contiguous() and kinds.is_segments(code)


@implementation("linear", "CUDA")
@_on_its_device
def linear(x, qdata, absmax, code, block_size, bias=None):
    """`octavo.ops.linear`: x [..., K] Wᵀ + bias → [..., N] in x's type. No checks, no gradient."""
    rows, columns = qdata.shape
    dtype = x.dtype
    out = torch.empty((*x.shape[:-1], rows), dtype=dtype, device=x.device)
    segments = _is_segments(code)
    key = choose.bound_key(x, qdata, absmax, code, block_size, bias, segments)
    launch = choose.bound_linear(key) if key else None
    if launch is not None:
        launch(
            x.data_ptr(),
            qdata.data_ptr(),
            absmax.data_ptr(),
            code.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        return out
    if out.numel() == 0 or not columns:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    x = x.reshape(-1, columns).contiguous()
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    kernel = choose.linear_kernel(dtype, x.shape[0], qdata, absmax, block_size, segments)
    kernel.run(x, qdata, absmax, code, block_size, bias, out.view(-1, rows))
    if key and qdata.is_cuda and not torch.cuda.is_current_stream_capturing():
        choose.bind_linear(key, kernel, x.shape[0], qdata, absmax)
    return out


@implementation("linear_transposed", "CUDA")
@_on_its_device
def linear_transposed(x, qdata, absmax, code, block_size):
    """`octavo.ops.linear_transposed`: x [..., N] W → [..., K] in x's type. No checks, no gradient."""
    rows, columns = qdata.shape
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if rows == 0:
        return out.zero_()
    x = x.reshape(-1, rows).contiguous()
    segments = _is_segments(code)
    qdata, absmax, code = qdata.contiguous(), absmax.contiguous(), code.contiguous()
    panels.linear_transposed(x, qdata, absmax, code, block_size, out.view(-1, columns), segments=segments)
    return out


@implementation("dequantize", "CUDA")
@_on_its_device
def dequantize(qdata, absmax, code, block_size, dtype):
    """`octavo.ops.dequantize`: → [N, K] in `dtype`."""
    out = torch.empty(qdata.shape, dtype=dtype, device=qdata.device)
    segments = _is_segments(code)
    choose.decode(
        qdata.contiguous(), absmax.contiguous(), code.contiguous(), block_size, None, 0, out, segments
    )
    return out


@implementation("embedding", "CUDA")
@_on_its_device
def embedding(ids, qdata, absmax, code, block_size, dtype):
    """`octavo.ops.embedding`: ids [...] → [..., K].

    An id that is no row gives NaN: an error would mean waiting for the device.
    """
    out = torch.empty((*ids.shape, qdata.shape[1]), dtype=dtype, device=qdata.device)
    flat = ids.reshape(-1).contiguous()
    rows = out.view(-1, qdata.shape[1]) if out.numel() else out
    segments = _is_segments(code)
    choose.decode(
        qdata.contiguous(), absmax.contiguous(), code.contiguous(), block_size, flat, 0, rows, segments
    )
    return out


@implementation("quantize", "CUDA")
@_on_its_device
def quantize(weight, code, block_size, absmax_dtype):
    """`octavo.ops.quantize`: float [N, K] → qdata, absmax, byte for byte the reference's."""
    return choose.encoder(weight, block_size, absmax_dtype).quantize(
        weight, code.contiguous(), block_size, absmax_dtype
    )


@implementation("histogram", "CUDA")
@_on_its_device
def histogram(weight, block_size, bins, absmax_dtype):
    """`octavo.ops.histogram`: int64 [bins], exactly the reference's."""
    return choose.encoder(weight, block_size, absmax_dtype).histogram(weight, block_size, bins, absmax_dtype)


def status(index: int | None = None) -> dict[str, object]:
    """Which kernels run on a GPU, and why, for `octavo doctor`.

    Compiles and checks the common ones, which takes some seconds.

    Returns:
        active: the kernel for each range of tokens; reason; kernels: what was checked → (trusted, finding).
    """
    if not torch.cuda.is_available():
        return {"active": "none", "reason": "this torch finds no GPU", "kernels": {}}
    where = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    dtype = torch.bfloat16 if device.capability_of(where) >= (8, 0) else torch.float16
    qdata, absmax, code = verify.sample(1024, 64, torch.float16, where, segments=True)
    # As a file that Octavo writes has it; where that is not computed from segments, the table's kernels are what is checked.
    ranges = choose.ranges(
        lambda tokens: choose.linear_kernel(dtype, tokens, qdata, absmax, 64, True),
        (1, 2, 4, 8, 16, 32, 33, 64, 65, 128, 129, 256, 512, 513),
    )
    dequantize(qdata, absmax, code, 64, dtype)
    listed = [f"{name} for {first} to {last} tokens" for name, first, last in ranges[:-1]]
    listed.append(f"{ranges[-1][0]} from {ranges[-1][1]} on")
    found = verify.verdicts()
    failed = sum(not good for good, _ in found.values())
    properties = torch.cuda.get_device_properties(where)
    reason = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}: "
        f"{len(found) - failed} kernels agree with the reference"
    )
    if failed:
        reason += f", {failed} do not and are not used"
    return {"active": ", ".join(listed), "reason": reason, "kernels": found}
