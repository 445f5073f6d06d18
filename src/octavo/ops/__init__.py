"""Octavo's operations over plain tensors: quantize, dequantize, linear, linear_transposed, embedding, histogram.

`schema` declares them, `reference` defines them in plain PyTorch, `cpu` and `gpu` register faster kernels for their devices.
The functions here are the ones to call; each goes through PyTorch's dispatcher to the kernel of the tensors' device.

Example:
    >>> import torch, octavo.ops as ops
    >>> from octavo import codebook
    >>> w, x = torch.randn(16, 256), torch.randn(3, 256)
    >>> code = codebook.fit(w, 64)
    >>> qdata, absmax = ops.quantize(w, code, 64)
    >>> ops.linear(x, qdata, absmax, code, 64).shape
    torch.Size([3, 16])
"""

import torch

from . import cpu, direct, gpu, reference, schema  # noqa: F401  (importing them registers the operations)
from .schema import blocks_per_row

__all__ = [
    "blocks_per_row",
    "dequantize",
    "embedding",
    "histogram",
    "kernels",
    "linear",
    "linear_transposed",
    "quantize",
    "scale_dtype",
]

# The normal range of float16: below it the spacing stops shrinking and rounding up would no longer be harmless.
HALF_SMALLEST_NORMAL = 2.0**-14
HALF_LARGEST = reference.HALF_LARGEST


def scale_dtype(weight: torch.Tensor, block_size: int) -> torch.dtype:
    """float16 if the scale of every block that is not zero lies in float16's normal range, else float32.

    Args:
        weight: float [N, K], finite.
    """
    # The least scale that is not zero, and the largest.
    if weight.device.type == "cpu" and cpu.AVAILABLE and weight.numel():
        smallest, largest = cpu.scale_range(weight, block_size)
    else:
        smallest, largest = torch.inf, 0.0
        for start, stop in reference.row_panels(*weight.shape):
            absmax = reference.block_absmax(weight[start:stop].to(torch.float32), block_size, torch.float32)
            positive = absmax[absmax > 0]
            if positive.numel():
                low, high = torch.aminmax(positive)
                smallest, largest = min(smallest, low.item()), max(largest, high.item())
    fits = largest == 0.0 or (smallest >= HALF_SMALLEST_NORMAL and largest <= HALF_LARGEST)
    return torch.float16 if fits else torch.float32


def quantize(
    weight: torch.Tensor, code: torch.Tensor, block_size: int, absmax_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to 8 bits.

    Args:
        weight: float [N, K], finite.
        code: float32 [256], ascending, within [-1, 1], holding an exact 0.
        block_size: weights of one row that share a scale; the last block of a row may be shorter.
        absmax_dtype: float16 or float32; by default float16 where the scales fit it (`scale_dtype`). A float16 scale is
            rounded up before the codes are chosen.

    Returns:
        qdata uint8 [N, K] and absmax [N, ceil(K / block_size)].

    Raises:
        ValueError: on a wrong shape or type, on NaN or infinity in the weight, and on a scale too large for float16.
    """
    if absmax_dtype is None:
        absmax_dtype = scale_dtype(weight, block_size)
    qdata, absmax = torch.ops.octavo.quantize(weight, code, block_size, absmax_dtype)
    if absmax_dtype == torch.float16 and not absmax.is_meta and torch.isinf(absmax).any():
        raise ValueError(
            f"octavo.quantize: a block's scale is beyond {HALF_LARGEST:g}, float16's largest number: keep the scales "
            "in float32"
        )
    return qdata, absmax


def dequantize(
    qdata: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The matrix that qdata, absmax and code stand for: [N, K] in `dtype` (float32, float16 or bfloat16)."""
    return torch.ops.octavo.dequantize(qdata, absmax, code, block_size, dtype)


def linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x Wᵀ + bias for a quantized W: [..., K] → [..., N] in x's type, accumulated in float32.

    Differentiable in x and bias; the backward pass saves only the quantized tensors.

    Raises:
        ValueError: on a wrong shape, type or device, saying what was expected and found.
    """
    return direct.dispatched_linear(x, qdata, absmax, code, block_size, bias)


def linear_transposed(
    x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block_size: int
) -> torch.Tensor:
    """x W for a quantized W [N, K]: [..., N] → [..., K] in x's type. The backward pass of `linear`."""
    return direct.dispatched_linear_transposed(x, qdata, absmax, code, block_size)


def embedding(
    ids: torch.Tensor,
    qdata: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of a quantized table: ids int [...] → [..., K] in `dtype`; only the rows asked for are de-quantized."""
    return torch.ops.octavo.embedding(ids, qdata, absmax, code, block_size, dtype)


def histogram(
    weight: torch.Tensor, block_size: int, bins: int, absmax_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Histogram of weight / scale over [-1, 1], each weight counted with its squared scale: int64 [bins].

    What `octavo.codebook.fit` works on; `octavo.ops.reference.histogram` defines it exactly.
    """
    return torch.ops.octavo.histogram(weight, block_size, bins, absmax_dtype)


def kernels() -> dict[str, dict[str, object]]:
    """Which kernels run on which kind of device, and why: kind → {"active": ..., "reason": ...}, for `octavo doctor`."""
    return {"CPU": cpu.status(), "GPU": gpu.status()}
