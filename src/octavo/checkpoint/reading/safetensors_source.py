"""Read safetensors checkpoints, one file or shards, through memory maps.

A file is a little-endian uint64 n, n bytes of JSON header, and the data. The header says for each tensor its type, its shape
and `data_offsets` [begin, end) from the start of the data, which they cover without holes. The header is parsed here rather
than by the library, so that a damaged file is explained, and so that pages can be given back.

Example:
    >>> from octavo.checkpoint.reading.safetensors_source import read_header
    >>> header, start = read_header(Path("model/model.safetensors"))
    >>> header["lm_head.weight"].shape
    (4096, 256)
"""

import json
import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .index import check_against_index
from .regular import require_regular
from .source import Source, TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own limit on a header.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: its type, shape, and [begin, end) in bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The tensors that a safetensors file declares, checked against the file's size, and where its data
    starts.

    Raises:
        CheckpointError: if the file is truncated, not safetensors, or its header contradicts itself or the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            raise CheckpointError(
                f"{path}: expected a safetensors file, found a header of {length} bytes in a file of {size}; "
                "it is damaged or in another format: download it again"
            )
        start = 8 + length
        if start > size:
            raise CheckpointError(
                f"{path} is truncated: its header alone takes {start} bytes, the file has {size}; download it again"
            )
        raw = file.read(length)
    try:
        table = json.loads(raw, object_pairs_hook=_no_duplicates)
        if not isinstance(table, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}); download it again") from None
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"{path}: expected strings by name as metadata, found {metadata!r:.60}; download it again"
        )
    entries = {name: _entry(path, name, row) for name, row in table.items()}
    _check_layout(path, entries, size - start)
    return entries, start


def check_adapter_file(folder: Path) -> None:
    """Check the header of a PEFT adapter's weights, if they are there as safetensors.

    Raises:
        CheckpointError: if they are damaged, or no file.
    """
    weights = folder / "adapter_model.safetensors"
    require_regular(weights)
    if weights.exists():
        read_header(weights)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _entry(path: Path, name: str, row: Any) -> Entry:
    try:
        dtype_name, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end))
        whole = whole and isinstance(dtype_name, str)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{path}: tensor {name}: expected dtype, shape and data_offsets in the header, found {row!r:.200}"
        )
    if dtype_name not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has type {dtype_name!r}; Octavo reads {', '.join(DTYPES)}"
        )
    dtype = DTYPES[dtype_name]
    expected = prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name}: shape {list(shape)} of {dtype_name} takes {expected} bytes, "
            f"its offsets [{begin}, {end}) span {end - begin}; the header is wrong: download the file again"
        )
    return Entry(dtype, shape, begin, end)


def _check_layout(path: Path, entries: dict[str, Entry], data_size: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > data_size:
            needed = max(e.end for e in entries.values())
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {entry.end} of the data, the file holds {data_size} "
                f"({needed - data_size} bytes are missing); download it again"
            )
        if entry.begin != position:
            raise CheckpointError(
                f"{path}: tensor {name} begins at byte {entry.begin} of the data, expected {position}; "
                "tensors overlap or leave holes: download the file again"
            )
        position = entry.end
    if position != data_size:
        raise CheckpointError(
            f"{path}: the header accounts for {position} bytes of data, the file holds {data_size}; "
            "it is damaged: download it again"
        )


class SafetensorsSource(Source):
    """A safetensors checkpoint: one file, or shards.

    Args:
        folder: where config.json and the tokenizer are looked for.
        files: the .safetensors files.
        index: the index of shards, to be checked against them.

    Raises:
        CheckpointError: if a file is damaged, or the index names tensors that are not there.
    """

    kind = "safetensors"

    def __init__(self, folder: Path, files: list[Path], index: Path | None = None):
        super().__init__(folder, files)
        self._entries: dict[str, tuple[Path, Entry, int]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for path in files:
            header, start = read_header(path)
            for name, entry in sorted(header.items(), key=lambda item: item[1].begin):
                if name in self._entries:
                    raise CheckpointError(
                        f"tensor {name} is in {self._entries[name][0].name} and in {path.name} of {folder}; "
                        "the folder mixes checkpoints"
                    )
                self._entries[name] = (path, entry, start + entry.begin)
                self.tensors[name] = TensorInfo(
                    name, entry.shape, entry.dtype, entry.end - entry.begin, path.name
                )
        if index is not None:
            check_against_index(index, {name: info.file for name, info in self.tensors.items()})

    def read(self, name: str) -> torch.Tensor:
        path, entry, offset = self._entries[name]
        count = entry.end - entry.begin
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if path not in self._maps:
            with path.open("rb") as file:
                # Copy-on-write: torch warns about read-only memory, and a stray write must not reach the file.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._maps[path], dtype=torch.uint8, count=count, offset=offset)
        if offset % entry.dtype.itemsize:
            # Old writers did not align; a view of another type needs it.
            flat = flat.clone()
        return flat.view(entry.dtype).view(entry.shape)

    def release(self, name: str) -> None:
        path, entry, offset = self._entries[name]
        mapped = self._maps.get(path)
        if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = offset - offset % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, begin, offset + (entry.end - entry.begin) - begin)

    def close(self) -> None:
        # Only forgotten: a tensor that is still in use keeps its map alive.
        self._maps.clear()
