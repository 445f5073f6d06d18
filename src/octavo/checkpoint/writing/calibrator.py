"""What a conversion asks of who chooses codes by the output's error: `octavo.calibration.Calibration` is one.

Example:
    >>> from octavo.calibration import Calibration
    >>> calibrator: Calibrator = Calibration(["book.txt"])
    >>> calibrator.tokens
    16384
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from ...config import OctavoConfig
from ...quantizer import Packed
from ..reading.source import Source


class Calibrator(Protocol):
    """Chooses codes of quantized matrices anew.

    Attributes:
        progress: set by the conversion; called with windows of text done, and in all.
    """

    progress: Callable[[int, int], None]

    def check(self, source: Source) -> None:
        """Raise ValueError if a checkpoint is of a kind that cannot be calibrated."""

    def to_dict(self) -> dict[str, Any]:
        """As the converted model's config.json records it."""
        ...

    def open(self, source: Source, config: OctavoConfig, names: Iterable[str]) -> None:
        """Get ready for the matrices `names`, which will be asked for in this order."""

    def quantize(self, name: str, matrix: torch.Tensor, plain: Packed) -> Packed:
        """The codes of a float matrix [N, K]; `plain`, as quantized without a text, where there are no better ones."""
        ...
