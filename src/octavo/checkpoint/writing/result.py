"""What a conversion did: sizes, bits per weight, error.

Example:
    >>> from octavo.checkpoint import convert
    >>> result = convert("model", "converted")
    >>> f"{result.bits_per_weight:.2f} bits, error {result.error:.1e}"
    '8.30 bits, error 2.7e-05'
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from .unit_writer import Row


@dataclass
class ConvertResult:
    """The outcome of `octavo.checkpoint.convert`.

    Attributes:
        out: the folder written.
        rows: one per parameter.
        source_bytes: bytes of the source's tensors.
        bytes: bytes of the files with weights that were written.
        seconds: how long this run took.
        resumed: number of units an earlier, interrupted run had done.
        unexpected: names in the checkpoint the model has no place for; not converted.
        dropped: names that are no parameters, left out knowingly.
        adapter: folder of a low-rank adapter found beside the weights, in PEFT's format.
    """

    out: Path
    rows: list[Row]
    source_bytes: int
    bytes: int
    seconds: float
    resumed: int = 0
    unexpected: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    adapter: Path | None = None

    @property
    def quantized(self) -> list[Row]:
        return [row for row in self.rows if row.kind != "float"]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and codebooks included."""
        weights = sum(math.prod(row.shape) for row in self.quantized)
        return 8 * sum(row.after for row in self.quantized) / weights if weights else 0.0

    @property
    def error(self) -> float:
        """Pooled relative squared error of the quantized weights against the source: Σ(w - ŵ)² / Σw²."""
        power = sum(row.power for row in self.quantized)
        return sum(row.error for row in self.quantized) / power if power else 0.0
