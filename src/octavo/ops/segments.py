"""Codebooks of sixteen straight segments, recognised from their values alone; docs/FORMAT.md has the rules.

Example:
    >>> import torch
    >>> from octavo.ops.segments import segments
    >>> segments(torch.arange(-128, 128) / 128).slope[:4], segments(torch.randn(256))
    (array([16, 16, 16, 16]), None)
"""

from typing import NamedTuple

import numpy as np
import torch

# Entries of a segment, and segments of a codebook.
RUN = 16
# The steepest slope that kernels hold in a byte.
STEEPEST_BYTE = 127


class Segments(NamedTuple):
    """A codebook as sixteen lines: code[16 h + l] = (base[h] + slope[h] * l) * unit, exactly.

    base, slope: int [16], slope >= 0, every base + slope * l within [-16384, 16384]. unit: a power of two.
    """

    base: np.ndarray
    slope: np.ndarray
    unit: float

    @property
    def fits_bytes(self) -> bool:
        """Whether a base is a multiple of 2⁻⁷ in [-1, 127/128] and a slope at most 127 units: the kernels' fast form."""
        step = round(1 / self.unit) >> 7
        return bool(
            step >= 1
            and (self.base % step == 0).all()
            and (self.base // step >= -128).all()
            and (self.base // step <= 127).all()
            and (self.slope <= STEEPEST_BYTE).all()
        )


def segments(code: torch.Tensor) -> Segments | None:
    """The sixteen lines that a codebook consists of, found from its values alone; None if it does not.

    The unit is the largest power of two, from 2⁻¹¹ down to 2⁻¹⁴, of which all entries are multiples.

    Args:
        code: float32 [256].
    """
    values = code.detach().cpu().double().numpy()
    for exponent in range(11, 15):
        entries = values * (1 << exponent)
        if np.array_equal(entries, np.rint(entries)) and np.abs(entries).max() <= 1 << exponent:
            break
    else:
        return None
    runs = entries.astype(np.int64).reshape(RUN, RUN)
    steps = np.diff(runs, axis=1)
    if (steps != steps[:, :1]).any() or (steps < 0).any():
        return None
    return Segments(runs[:, 0], steps[:, 0], 2.0**-exponent)
