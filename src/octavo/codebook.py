"""The 256-entry codebooks: `dynamic`, the published one, and `fit`, the one that is fitted to a tensor.

A codebook is float32 [256], ascending, within [-1, 1], and holds an exact 0. A weight is stored as the index of the
entry nearest to weight / scale of its block.

A fitted codebook is sixteen straight segments of sixteen entries on a grid of integers,

    code[16 h + l] = (base[h] + slope[h] l) unit,

so that a weight can be computed where a table of 256 entries is slow to look up: AVX2, AVX-512 without VBMI, NEON, GPUs.
`segments` recognises such a table from its values alone. docs/FORMAT.md has the rules.

Example:
    >>> import torch
    >>> from octavo import codebook
    >>> code = codebook.fit(torch.randn(512, 512), block_size=64)
    >>> code.shape, bool((code == 0).any())
    (torch.Size([256]), True)
    >>> codebook.segments(code).unit in (2**-13, 2**-12, 2**-11)
    True
"""

import numpy as np
import torch

from . import ops
from .ops.segments import RUN, STEEPEST_BYTE, segments

__all__ = ["dynamic", "fit", "fit_histogram", "segments"]

SIZE = 256
# Odd, so that one bin stands for exactly 0; 32 bins to a code, whose width then changes the error by less than 0.1 %.
HISTOGRAM_BINS = 8193
# Steps of Lloyd's rule with free entries, and then with lines through runs of sixteen. On all-MiniLM-L6-v2's matrices, blocks
# of 64, twice as many of either change the final error by less than 0.05 %.
LLOYD_STEPS = 30
LINE_STEPS = 40
# Rounds of moves on the grid of integers; most fits stop by themselves before.
GRID_ROUNDS = 60

# Grids of the segments: 1 / unit, and the multiple of the unit that bases are kept to. The first three let a kernel hold base and
# slope in a byte each (base / step in [-128, 127], slope <= 127): the fastest. They differ in how steep a segment may be.
BYTE_GRIDS = ((1 << 13, 64), (1 << 12, 32), (1 << 11, 16))
# For tensors that those serve badly, such as ones with a weight far above all others of its block.
WIDE_GRID = (1 << 14, 1)
# How much more squared error a byte grid may cost before the wide one is taken.
BYTE_GRID_MAY_COST = 1.1


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
        means = (edges[:-1] + edges[1:]) / 2.0
        positive.append((10.0 ** (exponent - exponents + 1)) * means)
    values = torch.cat(positive)
    code = torch.cat([values, -values, torch.tensor([0.0, 1.0])])
    return code.sort().values


def fit(tensor: torch.Tensor, block_size: int, absmax_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The codebook of sixteen segments with little squared error for a tensor quantized in blocks of `block_size`.

    A histogram of weight / scale, each weight counted with its squared scale, makes the histogram's squared error the
    tensor's own (blocks far above the others count less: `octavo.ops.reference.histogram`). `fit_histogram` does the rest.

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
    """A codebook of sixteen segments with little squared error for a histogram of [-1, 1].

    From the companding rule (quantiles of density^(1/3); Panter and Dite, 1951), Lloyd's iterations (Lloyd, 1982) move every
    entry to the mean of the weights nearest to it; then each run of sixteen moves to the weighted least-squares line through
    its sixteen means; last, lines are moved step by step on a grid of integers, as long as the error gets less.

    Args:
        counts: int64 [bins], odd; bin b stands for the value 2 b / (bins - 1) - 1.

    Returns:
        float32 [256].
    """
    histogram = _Histogram(counts)
    if not histogram.mass.any():
        # Nothing to fit (an all-zero tensor): any valid codebook of segments will do.
        return _even().astype(np.float32)
    code, zero = lloyd(histogram, LLOYD_STEPS)
    base, slope = _lines(histogram, code, zero)
    *byte_grids, wide = (_Lines(histogram, base, slope, zero, grid) for grid in (*BYTE_GRIDS, WIDE_GRID))
    for lines in (*byte_grids, wide):
        lines.descend()
    best = min(byte_grids, key=lambda lines: lines.error)
    # In `error`, a codebook of zeros has 0.
    if best.error + histogram.square > BYTE_GRID_MAY_COST * (wide.error + histogram.square):
        best = wide
    return best.code().astype(np.float32)


class _Histogram:
    """A histogram with the cumulative sums that make a step of a fit a difference at 255 boundaries, not a pass over the bins."""

    def __init__(self, counts: np.ndarray):
        self.bins = len(counts)
        self.values = np.linspace(-1.0, 1.0, self.bins)
        self.mass = counts.astype(np.float64)
        self.total = np.concatenate([[0.0], np.cumsum(self.mass)])
        self.moment = np.concatenate([[0.0], np.cumsum(self.mass * self.values)])
        self.square = float(np.sum(self.mass * self.values**2))

    def below(self, boundary: np.ndarray) -> np.ndarray:
        """Number of bins whose value is at most `boundary`: a value halfway between two entries belongs to the lower."""
        bins = np.floor((boundary + 1.0) * ((self.bins - 1) / 2)) + 1
        return np.clip(bins, 0, self.bins).astype(np.int64)

    def cells(self, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mass nearest to each entry of ascending codebooks [..., n], and the sum of its values."""
        edges = self.below((code[..., :-1] + code[..., 1:]) / 2)
        ends = np.zeros((*edges.shape[:-1], 1), dtype=np.int64)
        edges = np.concatenate([ends, edges, ends + self.bins], axis=-1)
        return np.diff(self.total[edges], axis=-1), np.diff(self.moment[edges], axis=-1)

    def error(self, code: np.ndarray) -> np.ndarray:
        """Squared error of codebooks [..., n], less that of all values being 0: Σ mass (code² - 2 code value)."""
        mass, moment = self.cells(code)
        return ((mass * code - 2 * moment) * code).sum(-1)


def lloyd(histogram: _Histogram, steps: int) -> tuple[np.ndarray, int]:
    """Lloyd's iterations with free entries, but for one that is 0 and starts a run of sixteen.

    Returns:
        float64 [256], ascending, and the index of the entry that is 0.
    """
    bins, values, mass = histogram.bins, histogram.values, histogram.mass
    middle = bins // 2
    negative, positive = mass[:middle].any(), mass[middle + 1 :].any()
    # Smoothed: the cube root of a bin that happens to be empty would otherwise count as a gap.
    kernel = np.hanning(33)
    density = np.cbrt(np.convolve(mass, kernel / kernel.sum(), mode="same"))
    below, above = density[:middle].sum(), density[middle + 1 :].sum()
    runs = int(np.clip(round(RUN * below / max(below + above, 1e-300)), int(negative), RUN - int(positive)))
    # All weights negative: zero is the first entry of the last run all the same.
    zero = RUN * min(runs, RUN - 1)
    code = np.concatenate(
        [
            _quantiles(density[: middle + 1], values[: middle + 1], zero),
            [0.0],
            _quantiles(density[middle:], values[middle:], SIZE - zero - 1),
        ]
    )
    for _ in range(steps):
        weight, sums = histogram.cells(code)
        # An entry with no weights stays where it is.
        moved = np.where(weight > 0, sums / np.where(weight > 0, weight, 1.0), code)
        moved[zero] = 0.0
        moved.sort()
        if np.array_equal(moved, code):
            break
        code = moved
    return code, zero


def _quantiles(density: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """`count` values at equal steps of the cumulative density."""
    # A little slope keeps the interpolation's abscissa increasing where the density is zero.
    steps = np.cumsum(density + max(density.max(), 1e-300) * 1e-9)
    return np.interp((np.arange(count) + 0.5) / max(count, 1) * steps[-1], steps, values)


def _even() -> np.ndarray:
    return (np.arange(SIZE) - SIZE // 2) / (SIZE // 2)


def _lines(histogram: _Histogram, code: np.ndarray, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's iterations with a line for each run of sixteen: real bases and slopes [16]."""
    offset = np.arange(float(RUN))
    first = zero // RUN
    base = slope = np.zeros(RUN)
    for _ in range(LINE_STEPS):
        weight, sums = histogram.cells(code)
        mean = np.where(weight > 0, sums / np.where(weight > 0, weight, 1.0), code).reshape(RUN, RUN)
        # An entry with no weights still holds the line, a little.
        weight = np.maximum(weight, weight.sum() * 1e-9).reshape(RUN, RUN)
        total = weight.sum(1)
        offsets, means = (weight * offset).sum(1) / total, (weight * mean).sum(1) / total
        away = offset - offsets[:, None]
        slope = (weight * away * (mean - means[:, None])).sum(1) / (weight * away**2).sum(1)
        slope[first] = (weight * offset * mean)[first].sum() / (weight * offset**2)[first].sum()
        slope = np.maximum(slope, 0.0)
        base = means - slope * offsets
        base[first] = 0.0
        moved = np.sort((base[:, None] + slope[:, None] * offset).ravel())
        if np.array_equal(moved, code):
            break
        code = moved
    return base, slope


class _Lines:
    """Sixteen lines on a grid of integers, and moves on it that lessen the error on a histogram."""

    # Changes of (base in steps of the grid, slope) that are tried for every line in each round. On the wide grid, a line is
    # also turned about its middle and its end.
    MOVES = tuple((b, s) for b in (-1, 0, 1) for s in (-2, -1, 0, 1, 2) if b or s)
    WIDE_MOVES = MOVES + tuple((b, s) for s in (-1, 1) for b in (-7 * s, -8 * s, -15 * s)) + ((-8, 0), (8, 0))

    def __init__(
        self, histogram: _Histogram, base: np.ndarray, slope: np.ndarray, zero: int, grid: tuple[int, int]
    ):
        """The lines nearest to real `base`, `slope` [16] on a grid (1 / unit, step of the bases)."""
        self.histogram = histogram
        self.scale, self.step = grid
        self.first = zero // RUN
        self.steepest = STEEPEST_BYTE if self.step > 1 else self.scale
        self.moves = np.array(self.MOVES if self.step > 1 else self.WIDE_MOVES)
        self.slope = np.clip(np.rint(slope * self.scale), 0, self.steepest).astype(np.int64)
        # Rounding moves a line's middle least.
        middle = (base + slope * (RUN - 1) / 2) * self.scale
        rounded = np.rint((middle - self.slope * (RUN - 1) / 2) / self.step)
        self.base = np.clip(rounded, -(self.scale // self.step), self.scale // self.step - 1).astype(np.int64)
        self.base *= self.step
        self.base[self.first] = 0
        self._ascend()
        self.error = float(histogram.error(self.code()))

    def code(self) -> np.ndarray:
        """float64 [256]."""
        return (self.base[:, None] + self.slope[:, None] * np.arange(RUN)).ravel() / self.scale

    def _ascend(self) -> None:
        """Make runs follow each other, outwards from the one at zero, and stay within [-1, 1]."""
        last = RUN - 1
        for h in range(self.first, RUN):
            if h > self.first:
                floor = self.base[h - 1] + last * self.slope[h - 1]
                self.base[h] = max(self.base[h], -(-floor // self.step) * self.step)
            room = self.scale - (self.step if h < last else 0) * (last - h)
            self.base[h] = min(self.base[h], room // self.step * self.step)
            self.slope[h] = min(self.slope[h], max(0, room - self.base[h]) // last)
        for h in range(self.first - 1, -1, -1):
            above = self.base[h + 1]
            self.base[h] = max(min(self.base[h], above), -self.scale)
            self.slope[h] = min(self.slope[h], (above - self.base[h]) // last)

    def descend(self) -> None:
        """Move lines as long as that lessens the error: in each round the best moves of lines that are no neighbours."""
        for _ in range(GRID_ROUNDS):
            gains = self._gains()
            best = gains.argmin(1)
            gain = gains[np.arange(RUN), best]
            taken = np.zeros(RUN + 2, dtype=bool)
            for h in np.argsort(gain, kind="stable"):
                if not gain[h] < -1e-12 * self.histogram.square:
                    break
                if taken[h] or taken[h + 2]:
                    continue
                taken[h + 1] = True
                self.base[h] += self.moves[best[h], 0] * self.step
                self.slope[h] += self.moves[best[h], 1]
            if not taken.any():
                break
        self.error = float(self.histogram.error(self.code()))

    def _gains(self) -> np.ndarray:
        """What every move of every line adds to the error [16, moves]; infinity where it is not allowed.

        A move changes the cells of its own sixteen entries and of one neighbour on each side.
        """
        base = self.base[:, None] + self.moves[:, 0] * self.step
        slope = self.slope[:, None] + self.moves[:, 1]
        entries = base[..., None] + slope[..., None] * np.arange(RUN)  # [16, moves, 16]
        code = self.code() * self.scale
        # Entries beyond the ends, so far away that nothing is nearest to them.
        padded = np.concatenate([[-9 * self.scale, -5 * self.scale], code, [5 * self.scale, 9 * self.scale]])
        left, right = padded[1:-2:RUN][:RUN], padded[RUN + 2 :: RUN][:RUN]
        allowed = (entries[..., 0] >= left[:, None]) & (entries[..., -1] <= right[:, None]) & (slope >= 0)
        allowed &= (
            (slope <= self.steepest) & (entries[..., 0] >= -self.scale) & (entries[..., -1] <= self.scale)
        )
        allowed &= (base < self.scale) | (self.step == 1)
        allowed[self.first] &= self.moves[:, 0] == 0
        outer = padded[0:-3:RUN][:RUN], padded[RUN + 3 :: RUN][:RUN]
        before = self._error_within(_between(left, code.reshape(RUN, 1, RUN), right), *outer)
        gains = self._error_within(_between(left, entries, right), *outer) - before
        return np.where(allowed, gains, np.inf)

    def _error_within(self, entries: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Error of the cells of `entries` [16, moves, 18] whose outer neighbours are `left`, `right` [16]."""
        whole = _between(left, entries, right)
        edges = self.histogram.below((whole[..., :-1] + whole[..., 1:]) / (2 * self.scale))
        mass, moment = (
            np.diff(sums[edges], axis=-1) for sums in (self.histogram.total, self.histogram.moment)
        )
        code = entries / self.scale
        return ((mass * code - 2 * moment) * code).sum(-1)


def _between(left: np.ndarray, entries: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`entries` [16, moves, n] with the neighbours `left`, `right` [16] around them: [16, moves, n + 2]."""
    shape = (*entries.shape[:2], 1)
    around = (np.broadcast_to(side[:, None, None], shape) for side in (left, right))
    return np.concatenate([next(around), entries, next(around)], axis=2)
