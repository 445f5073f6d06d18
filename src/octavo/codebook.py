"""The 256-entry codebooks: `dynamic`, the published one, and `fit`, the one with the least error for a tensor.

A codebook is float32 [256], ascending, within [-1, 1], and holds an exact 0. A weight is stored as the index of the
entry nearest to weight / scale of its block.

Example:
    >>> import torch
    >>> from octavo import codebook
    >>> code = codebook.fit(torch.randn(512, 512), block_size=64)
    >>> code.shape, bool((code == 0).any())
    (torch.Size([256]), True)
"""

import numpy as np
import torch

from . import ops

SIZE = 256
# Odd, so that one bin stands for exactly 0; 32 bins to a code, whose width then changes the error by less than 0.1 %.
HISTOGRAM_BINS = 8193
# Lloyd's rule converges slowly but starts close: on all-MiniLM-L6-v2's matrices the error after 60 steps is within
# 0.1 % of that after 1000, and 200 take under 10 ms a tensor.
LLOYD_STEPS = 200


def dynamic() -> torch.Tensor:
    """The dynamic 8-bit map of block-wise quantization (Dettmers et al., 2021, arXiv:2110.02861, section 2.1).

    A sign bit, then a run of zero bits that counts a decimal exponent down from 0 to -6, a one bit, and the bits that are
    left as a linear fraction in (0.1, 1); besides, 0 and 1. The published 8-bit checkpoints hold this table.

    Returns:
        float32 [256], ascending.
    """
    exponents = 7
    positive = []
    for exponent in range(exponents):
        fractions = 2**exponent
        edges = torch.linspace(0.1, 1, fractions + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        positive.append((10.0 ** (exponent - exponents + 1)) * middles)
    values = torch.cat(positive)
    code = torch.cat([values, -values, torch.tensor([0.0, 1.0])])
    return code.sort().values


def fit(tensor: torch.Tensor, block_size: int, absmax_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The codebook with the least squared error for a tensor quantized in blocks of `block_size`.

    A histogram of weight / scale, each weight counted with its squared scale, makes the histogram's squared error the
    tensor's own. From the companding rule (quantiles of density^(1/3); Panter and Dite, 1951), Lloyd's
    iterations (Lloyd, 1982) move every entry to the mean of the weights nearest to it. One entry stays at 0.

    Args:
        tensor: float [N, K], finite, on any device.
        block_size: weights of a row that share a scale.
        absmax_dtype: the type of the scales, float16 or float32; by default as `octavo.ops.quantize` chooses.

    Returns:
        float32 [256] on the tensor's device, ascending, within [-1, 1], with an exact 0.

    Raises:
        ValueError: if the tensor holds NaN or infinity, or is not a matrix.
    """
    if absmax_dtype is None:
        absmax_dtype = ops.scale_dtype(tensor, block_size)
    counts = ops.histogram(tensor, block_size, HISTOGRAM_BINS, absmax_dtype)
    return torch.from_numpy(fit_histogram(counts.cpu().numpy())).to(tensor.device)


def fit_histogram(counts: np.ndarray) -> np.ndarray:
    """The codebook with the least squared error for a histogram of [-1, 1].

    Args:
        counts: int64 [bins], odd; bin b stands for the value 2 b / (bins - 1) - 1.

    Returns:
        float32 [256].
    """
    bins = len(counts)
    values = np.linspace(-1.0, 1.0, bins)
    mass = counts.astype(np.float64)
    if mass.sum() == 0:
        # Nothing to fit (an all-zero tensor): any valid codebook will do.
        return dynamic().numpy()
    code = _compand(mass, values)
    zero = int(np.argmin(np.abs(code)))
    code[zero] = 0.0
    # Cumulative sums make each step a difference at the 255 boundaries instead of a pass over the bins.
    total = np.concatenate([[0.0], np.cumsum(mass)])
    moment = np.concatenate([[0.0], np.cumsum(mass * values)])
    for _ in range(LLOYD_STEPS):
        middles = (code[:-1] + code[1:]) / 2
        # First bin whose value is above the midpoint: a value at a midpoint belongs to the lower entry.
        edges = np.concatenate([[0], np.searchsorted(values, middles, side="right"), [bins]])
        weight = total[edges[1:]] - total[edges[:-1]]
        sums = moment[edges[1:]] - moment[edges[:-1]]
        # An entry with no weights stays where it is.
        moved = np.where(weight > 0, sums / np.where(weight > 0, weight, 1.0), code)
        moved[zero] = 0.0
        if np.array_equal(moved, code):
            break
        code = moved
    return np.sort(np.clip(code, -1.0, 1.0)).astype(np.float32)


def _compand(mass: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Start of the fit: entries at equal steps of the cumulative cube root of the density."""
    # Smoothed: the cube root of a bin that happens to be empty would otherwise count as a gap.
    kernel = np.hanning(33)
    smooth = np.convolve(mass, kernel / kernel.sum(), mode="same")
    density = np.cbrt(smooth)
    steps = np.cumsum(density)
    targets = (np.arange(SIZE) + 0.5) / SIZE * steps[-1]
    # A little slope keeps the interpolation's abscissa increasing where the density is zero.
    steps = steps + np.linspace(0, steps[-1] * 1e-9, len(steps))
    return np.interp(targets, steps, values)
