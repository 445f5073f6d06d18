"""Models for other programs: `export_gguf` writes a GGUF file that llama.cpp runs.

Example:
    >>> from octavo.export import export_gguf
    >>> export_gguf("model-8bit", "model.gguf", "q8_0").nbytes  # doctest: +SKIP
    144811008
"""

from .gguf_file import ExportResult, export_gguf

__all__ = ["ExportResult", "export_gguf"]
