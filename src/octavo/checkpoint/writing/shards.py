"""Write safetensors files tensor after tensor, without holding one in memory.

The library wants all tensors of a file at once. Here room for the header is left at the front (its length is known from names
and shapes up to a few digits, and a header may end in spaces), the data follows as it comes, the header is written last.

Example:
    >>> import torch
    >>> from octavo.checkpoint.writing.shards import ShardFile, header_room
    >>> pieces = [("a", torch.float32, (2, 2))]
    >>> shard = ShardFile(Path("a.safetensors"), header_room(pieces))
    >>> shard.write(shard.reserve(*pieces[0]), torch.ones(2, 2))                  # bytes
    16
    >>> shard.finish()
"""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..reading.safetensors_source import DTYPE_NAMES, MAX_HEADER
from ..units import Piece, Unit, piece_nbytes
from .durable import sync

# Data starts on a multiple of this, so that a mapped file's tensors are aligned for vector loads.
ALIGNMENT = 64
# Longer than any offset in a file; only its number of digits matters.
LONGEST_OFFSET = 10**14
METADATA = {"format": "pt"}
# One call of the system writes at most 2 GiB; smaller pieces also let an interrupt through.
WRITE_AT_ONCE = 64 << 20


def header_room(pieces: Iterable[Piece]) -> int:
    """Bytes to leave for the header of a file with these tensors, so that the data starts aligned."""
    rows = {name: (dtype, shape, LONGEST_OFFSET, LONGEST_OFFSET) for name, dtype, shape in pieces}
    length = len(_header(rows))
    return -(-(8 + length) // ALIGNMENT) * ALIGNMENT - 8


def _header(rows: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]) -> bytes:
    table: dict[str, object] = {"__metadata__": METADATA}
    for name, (dtype, shape, begin, end) in rows.items():
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(table, separators=(",", ":")).encode()


class ShardFile:
    """A safetensors file being written.

    Args:
        path: the file; created, or opened to go on.
        room: bytes left for the header, `header_room` of its tensors.
        rows: what an interrupted run has finished in it: name → (type, shape, begin, end); the rest is cut off.
    """

    def __init__(
        self,
        path: Path,
        room: int,
        rows: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] | None = None,
    ):
        self.path = path
        self.room = room
        self.rows = dict(rows or {})
        self.position = max((end for *_, end in self.rows.values()), default=0)
        path.touch()
        # What a journal says of this file is worth nothing if its name is lost.
        sync(path.absolute().parent)
        # Unbuffered: what is written is at once the system's, and an error is that of this write.
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(8 + room + self.position)

    def reserve(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        """Declare the next tensor. Returns where its data goes."""
        begin = self.position
        self.position += piece_nbytes((name, dtype, shape))
        self.rows[name] = (dtype, tuple(shape), begin, self.position)
        return begin

    def write(self, position: int, tensor: torch.Tensor) -> int:
        """Write a tensor's bytes at `position` of the data. Returns the position after it.

        Raises:
            OSError: if the disk is full.
        """
        flat = tensor.detach().contiguous().reshape(-1)
        array: Any = flat.view(torch.uint8).numpy()
        data = memoryview(array)
        offset = 8 + self.room + position
        while data:
            written = self._write_at(offset, data[:WRITE_AT_ONCE])
            data, offset = data[written:], offset + written
        return offset - 8 - self.room

    def _write_at(self, offset: int, data: memoryview | bytes) -> int:
        self._file.seek(offset)
        return self._file.write(data)

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the header, sync and close: the file is whole."""
        header = _header(self.rows)
        if len(header) > self.room or self.room > MAX_HEADER:
            raise AssertionError(f"{self.path}: header of {len(header)} bytes, room for {self.room}")
        self._file.truncate(8 + self.room + self.position)
        self._write_at(0, struct.pack("<Q", self.room) + header.ljust(self.room))
        self.sync()
        self.close()

    def close(self) -> None:
        self._file.close()


def plan_shards(units: list[Unit], max_bytes: int) -> list[list[Unit]]:
    """Units by file: in order, each file as full as `max_bytes` allows with float32 scales.

    A unit larger than that gets a file of its own.
    """
    shards: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        # The header belongs to the file; 512 bytes cover one tensor's row and its share of the padding.
        size = unit.most_bytes + sum(3 * (512 + len(output.stored)) for output in unit.outputs)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """Names of the files of a checkpoint of `count` shards, as transformers names them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
