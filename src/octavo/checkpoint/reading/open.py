"""`open_source`: find out what a folder, a file or a hub id holds, and open it.

    kind           what it is                                                      read by
    "safetensors"  one file, or shards with an index                               safetensors_source.py
    "bin"          pytorch_model.bin: a pickle of tensors, one file or shards      bin_source.py
    "published"    8-bit block-wise checkpoints (uint8 weight, absmax, code)       published.py
    "packed"       FP8, int8 or MXFP4 of another method                            packed_source.py
    "gguf"         a llama.cpp file                                                gguf_source.py
    "octavo"       what `octavo quantize` and `save_pretrained` write              octavo_source.py

Example:
    >>> from octavo.checkpoint import open_source
    >>> open_source("published").kind              # or "hivemind/gpt-j-6B-8bit"
    'published'
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .bin_source import BinSource
from .gguf_source import GgufSource
from .locate import Hub, Location, locate
from .octavo_source import OctavoSource
from .packed_source import PackedSource
from .packing import find_packed
from .published import PublishedSource, is_published
from .safetensors_source import SafetensorsSource
from .source import Source, read_config, states_of


def open_source(
    src: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    subfolder: str = "",
    **hub_options: Any,
) -> Source:
    """Open a checkpoint for lazy reading.

    Args:
        src: a folder; a .safetensors, .bin or .gguf file; a hub id ("org/name", or "org/name/file.gguf").
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether code in the checkpoint's folder (*.py) may be run by transformers, and comes along with a
            conversion.
        subfolder: the model's folder within `src`.
        hub_options: what huggingface_hub's `snapshot_download` takes: cache_dir, token, force_download, local_files_only.

    Raises:
        CheckpointError: if nothing is found there, files are missing, damaged or dangerous, or the weights
            are packed by a method that Octavo does not read.
    """
    location = locate(src, Hub(revision, subfolder, trust_remote_code, hub_options))
    besides = [location.folder / "config.json", *([location.index] if location.index else [])]
    seen = states_of([*location.files, *(besides if location.format != "gguf" else ())])
    source = GgufSource(location.files[0]) if location.format == "gguf" else open_files(location)
    source.trust_remote_code, source.seen = trust_remote_code, seen
    return source


def open_files(location: Location) -> Source:
    """Open the safetensors or .bin files of a checkpoint as what their tensors show them to be."""
    reader = SafetensorsSource if location.format == "safetensors" else BinSource
    source: Source = reader(location.folder, location.files, location.index)
    if _is_octavo(location.folder):
        return OctavoSource(source)
    if is_published(source.tensors):
        return PublishedSource(source)
    packed = find_packed(source)
    return PackedSource(source, packed) if packed else source


def require_plain(files: Iterable[str | Path]) -> None:
    """Check that files hold plain values, as transformers takes them.

    Raises:
        CheckpointError: if they are packed: by a method that `open_source` reads, or by another.
    """
    paths = [Path(file) for file in files]
    format_ = {".safetensors": "safetensors", ".bin": "bin"}.get(paths[0].suffix) if paths else None
    if format_ is None:
        return
    with open_files(Location(format_, paths[0].parent, paths)) as source:
        if not source.native:
            how = ", ".join(source.methods) if isinstance(source, PackedSource) else "8-bit blocks"
            raise CheckpointError(
                f"{source.folder}: its weights are packed ({how}), and transformers would take them for plain values. Use "
                "octavo.load, or convert the folder with `octavo quantize`: both read them exactly"
            )


def _is_octavo(folder: Path) -> bool:
    if not (folder / "config.json").exists():
        return False
    packed = read_config(folder).get("quantization_config")
    return isinstance(packed, dict) and packed.get("quant_method") == "octavo"
