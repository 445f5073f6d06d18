"""Quantizing in Triton: scales, indices and the codebooks' histogram, byte for byte the reference's.

Exactness rests on three things: divisions are IEEE divisions (`tl.div_rn`), products are not fused into
additions (`enable_fp_fusion=False`), and the histogram adds integers, whose sum knows no order.

Example:
    >>> qdata, absmax = quantize(weight, code, 64, torch.float16)   # doctest: +SKIP
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from ... import reference
from ...schema import blocks_per_row
from ..kernel import Instance, Kernel
from ..triton_tables import unsupported_reason

# Weights a program handles at least; rows of blocks are taken together until they are this many.
# Not yet measured on any GPU.
PROGRAM_WEIGHTS = 1024
# Copies of the histogram that programs share out among them: fewer wait for each other at one counter.
# Not yet measured on any GPU.
HISTOGRAM_COPIES = 32


@triton.jit
def _load_blocks(
    weight_ptr, first, count, blocks, columns, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr
):
    """BLOCKS blocks of the matrix from number `first` on: float32 [BLOCKS, PADDED] (0 outside), where they lie."""
    b = first + tl.arange(0, BLOCKS)
    row, block = b // blocks, b % blocks
    i = tl.arange(0, PADDED)
    column = block[:, None] * SIZE + i[None, :]
    inside = (b < count)[:, None] & (column < columns) & (i < SIZE)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return weight, at, inside, b


@triton.jit
def scales_kernel(
    weight_ptr,
    absmax_ptr,
    bad_ptr,
    count,
    blocks,
    columns,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    weight, _, inside, b = _load_blocks(weight_ptr, first, count, blocks, columns, SIZE, PADDED, BLOCKS)
    magnitude = tl.abs(weight)
    # NaN fails every comparison, so it counts as bad too.
    bad = inside & ((magnitude < float("inf")) == 0)
    largest = tl.max(tl.where(bad, 0.0, magnitude), axis=1)
    if HALF:
        half = largest.to(tl.float16)
        # The next float16 above: scales are not negative, so their bits ascend with them.
        above = (half.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
        tl.store(absmax_ptr + b, tl.where(half.to(tl.float32) < largest, above, half), mask=b < count)
    else:
        tl.store(absmax_ptr + b, largest, mask=b < count)
    tl.store(bad_ptr + tl.program_id(0), tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0))


@triton.jit
def quantize_kernel(
    weight_ptr,
    absmax_ptr,
    boundaries_ptr,
    qdata_ptr,
    count,
    blocks,
    columns,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    weight, at, inside, b = _load_blocks(weight_ptr, first, count, blocks, columns, SIZE, PADDED, BLOCKS)
    scale = tl.load(absmax_ptr + b, mask=b < count, other=0.0).to(tl.float32)[:, None]
    value = tl.where(
        scale > 0, tl.div_rn(weight, tl.where(scale > 0, scale, 1.0) + tl.zeros_like(weight)), 0.0
    )
    # How many of the 255 ascending midpoints are below the value: eight halvings.
    index = tl.zeros([BLOCKS, PADDED], dtype=tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        boundary = tl.load(boundaries_ptr + index + (step - 1))
        index = tl.where(boundary < value, index + step, index)
    tl.store(qdata_ptr + at, index.to(tl.uint8), mask=inside)


@triton.jit
def histogram_kernel(
    weight_ptr,
    absmax_ptr,
    median_ptr,
    counts_ptr,
    count,
    blocks,
    columns,
    bins,
    half_bins,
    unit,
    cap,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    COPIES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    weight, _, inside, b = _load_blocks(weight_ptr, first, count, blocks, columns, SIZE, PADDED, BLOCKS)
    scale = tl.load(absmax_ptr + b, mask=b < count, other=0.0).to(tl.float32)
    median = tl.load(median_ptr)
    ratio = tl.minimum(tl.div_rn(scale, tl.zeros_like(scale) + median), cap)
    mass = ratio * ratio * unit
    # To the nearest integer, halves to even: adding 2^23 leaves no room for a fraction, and beyond is none.
    mass = tl.where(mass < 8388608.0, (mass + 8388608.0) - 8388608.0, mass).to(tl.int64)
    scale = scale[:, None]
    value = tl.where(
        scale > 0, tl.div_rn(weight, tl.where(scale > 0, scale, 1.0) + tl.zeros_like(weight)), 0.0
    )
    bin_index = tl.floor((value + 1.0) * half_bins + 0.5).to(tl.int32)
    mass = mass[:, None] + tl.zeros([BLOCKS, PADDED], dtype=tl.int64)
    copy = tl.program_id(0) % COPIES
    tl.atomic_add(counts_ptr + copy * bins + bin_index, mass, mask=inside, sem="relaxed")


def _grid(weight, block_size):
    """Shared arguments of the kernels: number of blocks, blocks per row, columns; padding and blocks per program."""
    rows, columns = weight.shape
    blocks = blocks_per_row(columns, block_size)
    # A row shorter than its block does not need the block's whole width.
    size = min(block_size, max(columns, 1))
    padded = triton.next_power_of_2(size)
    together = max(1, PROGRAM_WEIGHTS // padded)
    return rows * blocks, blocks, columns, {"SIZE": block_size, "PADDED": padded, "BLOCKS": together}


def _scales(operation, weight, block_size, absmax_dtype):
    """Scales of each block, rounded up: absmax [N, blocks]. Waits for the device, to report what is not finite."""
    count, blocks, columns, shape = _grid(weight, block_size)
    absmax = torch.empty((weight.shape[0], blocks), dtype=absmax_dtype, device=weight.device)
    programs = triton.cdiv(count, shape["BLOCKS"])
    bad = torch.empty(programs, dtype=torch.int32, device=weight.device)
    half = absmax_dtype == torch.float16
    exact = torch.empty_like(absmax, dtype=torch.float32) if half else absmax
    scales_kernel[(programs,)](weight, exact, bad, count, blocks, columns, **shape, HALF=False)
    found = int(bad.sum())
    if found:
        raise ValueError(f"octavo.{operation}: the weight holds {found} NaN or infinite values")
    if half:
        largest = float(exact.max())
        if largest > reference.HALF_LARGEST:
            raise ValueError(
                f"octavo: a block's scale of {largest:g} does not fit float16, whose largest number is "
                f"{reference.HALF_LARGEST:g}: keep the scales in float32"
            )
        scales_kernel[(programs,)](weight, absmax, bad, count, blocks, columns, **shape, HALF=True)
    return absmax


def _as_kernels_read(weight):
    weight = weight.contiguous()
    return (
        weight if weight.dtype in (torch.float32, torch.float16, torch.bfloat16) else weight.to(torch.float32)
    )


def quantize(weight, code, block_size, absmax_dtype):
    """`octavo.ops.quantize`: weight float [N, K] → qdata uint8 [N, K], absmax. Waits for the device once."""
    if weight.numel() == 0:
        return reference.quantize(weight, code, block_size, absmax_dtype)
    weight = _as_kernels_read(weight)
    absmax = _scales("quantize", weight, block_size, absmax_dtype)
    qdata = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    boundaries = (code[:-1] + code[1:]) * 0.5
    count, blocks, columns, shape = _grid(weight, block_size)
    quantize_kernel[(triton.cdiv(count, shape["BLOCKS"]),)](
        weight, absmax, boundaries, qdata, count, blocks, columns, **shape, enable_fp_fusion=False
    )
    return qdata, absmax


def histogram(weight, block_size, bins, absmax_dtype):
    """`octavo.ops.histogram`: int64 [bins], as `reference.histogram` defines it. Waits for the device once."""
    if weight.numel() == 0:
        return reference.histogram(weight, block_size, bins, absmax_dtype)
    weight = _as_kernels_read(weight)
    absmax = _scales("histogram", weight, block_size, absmax_dtype)
    median = reference.median_scale(absmax)
    counts = torch.zeros((HISTOGRAM_COPIES, bins), dtype=torch.int64, device=weight.device)
    # A matrix of zeros has no scale to compare with; its counts are zeros whatever we divide by.
    divisor = torch.where(median > 0, median, torch.ones_like(median))
    count, blocks, columns, shape = _grid(weight, block_size)
    histogram_kernel[(triton.cdiv(count, shape["BLOCKS"]),)](
        weight,
        absmax,
        divisor,
        counts,
        count,
        blocks,
        columns,
        bins,
        (bins - 1) * 0.5,
        reference.HISTOGRAM_UNIT,
        reference.HISTOGRAM_CAP,
        **shape,
        COPIES=HISTOGRAM_COPIES,
        enable_fp_fusion=False,
    )
    return counts.sum(0)


ENCODER = SimpleNamespace(quantize=quantize, histogram=histogram)

KERNEL = Kernel(
    name="triton_encode",
    operation="encode",
    summary="quantizes a weight and counts a codebook's histogram",
    run=ENCODER,
    unsupported_reason=unsupported_reason,
    place=lambda call: 10,
    instance=lambda call: Instance(ENCODER, columns=1037),
)
