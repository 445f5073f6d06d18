"""The plain-PyTorch implementation of every operation: the numeric definition, and the fallback of every device.

Kernels for a device must agree with these functions: `quantize` and `histogram` byte for byte, the others to rounding.
Layout and shapes are those of `octavo.ops.schema`.

Example:
    >>> import torch
    >>> from octavo import codebook
    >>> from octavo.ops import reference
    >>> qdata, absmax = reference.quantize(torch.randn(4, 64), codebook.dynamic(), 64, torch.float32)
    >>> reference.dequantize(qdata, absmax, codebook.dynamic(), 64, torch.float32).shape
    torch.Size([4, 64])
"""

import torch
import torch.nn.functional as F

from .schema import blocks_per_row, implementation

# Weights de-quantized at a time: 4 M weights are 16 MB in float32, so a large matrix never exists in float.
PANEL_WEIGHTS = 1 << 22
# In a histogram, what a weight of a block with the median scale counts, and how far above the median a scale counts: a single
# enormous weight would else be all that a codebook is fitted to. Powers of two keep the products exact; at most 2**30 a weight,
# a sum of 2**32 weights still fits 63 bits.
HISTOGRAM_UNIT = float(1 << 14)
HISTOGRAM_CAP = 256.0
HALF_LARGEST = 65504.0


def row_panels(rows: int, columns: int):
    """Row ranges of at most PANEL_WEIGHTS weights each."""
    step = max(1, PANEL_WEIGHTS // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def round_up_to_half(x: torch.Tensor) -> torch.Tensor:
    """The smallest float16 that is at least x; x: float32, non-negative, at most 65504. Returns float16."""
    half = x.to(torch.float16)
    # The next number up is the next bit pattern; torch.nextafter knows float16 on few devices.
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.to(torch.float32) < x, above, half)


def block_absmax(weight: torch.Tensor, block_size: int, absmax_dtype: torch.dtype) -> torch.Tensor:
    """Scale of each block: the largest magnitude in it, rounded up to `absmax_dtype`.

    Args:
        weight: float32 [N, K].

    Returns:
        [N, ceil(K / block_size)] of `absmax_dtype`.

    Raises:
        ValueError: if a scale is too large for float16.
    """
    rows, columns = weight.shape
    blocks = blocks_per_row(columns, block_size)
    magnitude = F.pad(weight.abs(), (0, blocks * block_size - columns))
    # amax has no identity: an empty matrix has no scales to reduce.
    if magnitude.numel() == 0:
        return weight.new_zeros((rows, blocks), dtype=absmax_dtype)
    absmax = magnitude.view(rows, blocks, block_size).amax(-1)
    if absmax_dtype != torch.float16:
        return absmax
    if absmax.max() > HALF_LARGEST:
        raise ValueError(
            f"octavo: a block's scale of {absmax.max().item():g} does not fit float16, whose largest number is "
            f"{HALF_LARGEST:g}: keep the scales in float32"
        )
    return round_up_to_half(absmax)


def normalize(weight: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    """weight / scale of its block, in float32 by IEEE division; 0 where the scale is 0.

    Args:
        weight: float32 [N, K]; absmax: [N, ceil(K / block_size)].
    """
    scale = expand_scales(absmax, block_size, weight.shape[1])
    return torch.where(scale > 0, weight / scale, 0.0)


def expand_scales(absmax: torch.Tensor, block_size: int, columns: int) -> torch.Tensor:
    """Scales repeated for each weight: [N, ceil(K / B)] → float32 [N, K]."""
    return absmax.to(torch.float32).repeat_interleave(block_size, dim=1)[:, :columns]


def _require_finite(operation: str, weight: torch.Tensor) -> None:
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"octavo.{operation}: the weight holds {bad} NaN or infinite values")


@implementation("quantize", "CompositeExplicitAutograd")
def quantize(weight, code, block_size, absmax_dtype):
    """Quantize a matrix: scales rounded up first, then for each weight the index of the nearest code.

    A weight halfway between two codes takes the lower one: the index is the number of decision boundaries (midpoints) strictly
    below weight / scale.
    """
    rows, columns = weight.shape
    qdata = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(
        (rows, blocks_per_row(columns, block_size)), dtype=absmax_dtype, device=weight.device
    )
    boundaries = (code[:-1] + code[1:]) * 0.5
    for start, stop in row_panels(rows, columns):
        panel = weight[start:stop].to(torch.float32)
        _require_finite("quantize", panel)
        absmax[start:stop] = block_absmax(panel, block_size, absmax_dtype)
        values = normalize(panel, absmax[start:stop], block_size)
        qdata[start:stop] = torch.searchsorted(boundaries, values.contiguous(), right=False).to(torch.uint8)
    return qdata, absmax


@implementation("dequantize", "CompositeExplicitAutograd")
def dequantize(qdata, absmax, code, block_size, dtype):
    rows, columns = qdata.shape
    out = torch.empty((rows, columns), dtype=dtype, device=qdata.device)
    for start, stop in row_panels(rows, columns):
        out[start:stop] = _panel(qdata[start:stop], absmax[start:stop], code, block_size, dtype)
    return out


def _panel(qdata, absmax, code, block_size, dtype):
    """De-quantize one panel of rows."""
    values = code[qdata.to(torch.int32)] * expand_scales(absmax, block_size, qdata.shape[1])
    return values.to(dtype)


@implementation("linear", "CompositeExplicitAutograd")
def linear(x, qdata, absmax, code, block_size, bias=None):
    """x [..., K] times the transpose of the weight, plus bias → [..., N] in x's type."""
    rows, columns = qdata.shape
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    for start, stop in row_panels(rows, columns):
        panel = _panel(qdata[start:stop], absmax[start:stop], code, block_size, x.dtype)
        part = None if bias is None else bias[start:stop].to(x.dtype)
        out[..., start:stop] = F.linear(x, panel, part)
    return out


@implementation("linear_transposed", "CompositeExplicitAutograd")
def linear_transposed(x, qdata, absmax, code, block_size):
    """x [..., N] times the weight → [..., K] in x's type, summed over panels in float32."""
    rows, columns = qdata.shape
    panels = row_panels(rows, columns)
    if len(panels) == 1:
        return x @ _panel(qdata, absmax, code, block_size, x.dtype)
    out = torch.zeros((*x.shape[:-1], columns), dtype=torch.float32, device=x.device)
    for start, stop in panels:
        # In float32: a 16-bit product would round each panel's part of the sum.
        panel = _panel(qdata[start:stop], absmax[start:stop], code, block_size, torch.float32)
        out += x[..., start:stop].to(torch.float32) @ panel
    return out.to(x.dtype)


@implementation("embedding", "CompositeExplicitAutograd")
def embedding(ids, qdata, absmax, code, block_size, dtype):
    """Rows `ids` [...] of the weight → [..., K]; only those rows are de-quantized."""
    flat = ids.reshape(-1)
    rows = _panel(qdata.index_select(0, flat), absmax.index_select(0, flat), code, block_size, dtype)
    return rows.view(*ids.shape, qdata.shape[1])


@implementation("histogram", "CompositeExplicitAutograd")
def histogram(weight, block_size, bins, absmax_dtype):
    """How often each normalized value occurs, each weight counted with its squared scale.

    With m the median (the lower of two) of the scales that are not zero, a weight w in a block of scale s adds
    `round(min(s / m, 256)**2 * 2**14)` to bin `floor((w / s + 1) * (bins - 1) / 2 + 0.5)`. Bin b stands for the value
    `2 b / (bins - 1) - 1`: the middle bin is exactly 0, the outer ones exactly -1 and 1. The counts are integers, so
    that the sum does not depend on its order, nor on threads or devices. All arithmetic before it is float32.

    Returns:
        int64 [bins].
    """
    counts = torch.zeros(bins, dtype=torch.int64, device=weight.device)
    rows, columns = weight.shape
    panels = row_panels(rows, columns)
    scales = []
    for start, stop in panels:
        panel = weight[start:stop].to(torch.float32)
        _require_finite("histogram", panel)
        scales.append(block_absmax(panel, block_size, absmax_dtype))
    median = median_scale(torch.cat(scales)) if scales else torch.zeros(())
    if not median > 0:
        return counts
    for (start, stop), absmax in zip(panels, scales, strict=True):
        ratio = (absmax.to(torch.float32) / median).clamp(max=HISTOGRAM_CAP)
        mass = torch.round(ratio * ratio * HISTOGRAM_UNIT)
        values = normalize(weight[start:stop].to(torch.float32), absmax, block_size)
        bin_index = torch.floor((values + 1.0) * ((bins - 1) * 0.5) + 0.5).to(torch.int64)
        counts.index_add_(
            0, bin_index.flatten(), expand_scales(mass, block_size, columns).to(torch.int64).flatten()
        )
    return counts


def median_scale(absmax: torch.Tensor) -> torch.Tensor:
    """float32 []: the median of the scales that are not zero, the lower one of two; 0 if there are none."""
    positive = absmax[absmax > 0].to(torch.float32)
    return positive.median() if positive.numel() else positive.new_zeros(())
