"""Models for other programs: `export_gguf` writes a GGUF file that llama.cpp runs.

Example:
    >>> from octavo.export import export_gguf
    >>> export_gguf("model-8bit", "demo.gguf", "q8_0").nbytes
    7447360
"""

from .gguf_file import ExportResult, export_gguf

__all__ = ["ExportResult", "export_gguf"]
