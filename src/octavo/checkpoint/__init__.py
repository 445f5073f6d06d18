"""Checkpoints on disk: read them lazily, convert them tensor by tensor.

`open_source` looks into any supported checkpoint; `convert` writes an Octavo checkpoint from it, never
holding more than about one tensor.

Example:
    >>> from octavo import OctavoConfig
    >>> from octavo.checkpoint import convert, open_source
    >>> result = convert(open_source("path/to/model"), "model-8bit", OctavoConfig())  # doctest: +SKIP
"""

from .errors import CheckpointError
from .open import open_source
from .result import ConvertResult
from .source import Source, TensorInfo
from .stream import convert

__all__ = ["CheckpointError", "ConvertResult", "Source", "TensorInfo", "convert", "open_source"]
