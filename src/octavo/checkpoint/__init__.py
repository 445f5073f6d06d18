"""Checkpoints on disk: read them lazily, convert them tensor by tensor.

`open_source` looks into any supported checkpoint; `convert` writes an Octavo checkpoint from it, never
holding more than about one tensor. `reading/` has a class for each format, `writing/` one writer for converting and merging;
`inspection` is what `octavo inspect` reports.

Example:
    >>> from octavo import OctavoConfig
    >>> from octavo.checkpoint import convert, open_source
    >>> result = convert(open_source("model"), "converted", OctavoConfig())
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import CheckpointError
    from .reading.open import open_source
    from .reading.source import Source, TensorInfo
    from .writing.convert import convert
    from .writing.result import ConvertResult

_HOMES = {
    "CheckpointError": "errors",
    "ConvertResult": "writing.result",
    "Source": "reading.source",
    "TensorInfo": "reading.source",
    "convert": "writing.convert",
    "open_source": "reading.open",
}
__all__ = ["CheckpointError", "ConvertResult", "Source", "TensorInfo", "convert", "open_source"]


def __getattr__(name: str):
    # A command looks for a checkpoint's files (`locate`) before it imports torch.
    if name in _HOMES:
        return getattr(_import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
