"""Codes chosen by what a layer gives on real text, not by the weights alone: `octavo quantize --calibrate TEXT`.

    text        windows of tokens from text files
    observe     runs the model on them and sums up the inputs of each matrix
    feedback    chooses a matrix's codes by the error of its output on such inputs

The files are of the same format, read by the same kernels. docs/CALIBRATION.md says what it does and what it brings.

Example:
    >>> from octavo.calibration import Calibration
    >>> from octavo.checkpoint import convert
    >>> result = convert("model", "calibrated", calibration=Calibration(["book.txt"], tokens=2048))
"""

from .calibrate import Calibration

__all__ = ["Calibration"]
