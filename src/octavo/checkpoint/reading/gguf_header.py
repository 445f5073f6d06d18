"""The header of a GGUF file: its metadata and where each tensor lies.

    "GGUF"  uint32 version  uint64 tensors  uint64 keys                     (little-endian)
    keys    string name, uint32 type, value
    tensors string name, uint32 n, uint64 dims[n] (fastest first), uint32 type, uint64 offset
    data    at the next multiple of general.alignment (32)

The gguf package reads this too, but makes an object of each token of the vocabulary, which takes seconds; and it trusts
the file. Here arrays of strings are stepped over, and every length is checked against the file's size.

Example:
    >>> from octavo.checkpoint.reading.gguf_header import read_gguf_header
    >>> read_gguf_header(Path("model.gguf")).metadata["general.architecture"]
    'llama'
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# type → struct code of the values of fixed size
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
DEFAULT_ALIGNMENT = 32
# More than any model has; a damaged count must not make us allocate.
MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: shape as torch has it, type, and where its bytes lie in the file."""

    name: str
    shape: tuple[int, ...]
    type: Any
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (arrays of strings left out) and tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: if the file is no GGUF, damaged, truncated, or of a version or tensor type that is not known.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != MAGIC:
            raise CheckpointError(f"{path}: expected a GGUF file, found one that begins with {magic!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Parser(path, data).parse()
            except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
                raise CheckpointError(
                    f"{path}: its header is damaged or truncated (the file has {size} bytes); download it again"
                ) from error


class _Parser:
    """A position in the file, moved on by what is read."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.position = len(MAGIC)

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        width = struct.calcsize("<" + code)
        if count > (len(self.data) - self.position) // width:
            raise IndexError(f"{count} values beyond the end of the file")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        self.position += width * count
        return values

    def string(self) -> str:
        (length,) = self.scalars("Q")
        end = self.position + length
        if end > len(self.data):
            raise IndexError("a string beyond the end of the file")
        text = self.data[self.position : end].decode("utf-8")
        self.position = end
        return text

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalars(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.scalars("I")[0], self.scalars("Q")[0]
            if element in SCALARS:
                return list(self.scalars(SCALARS[element], count))
            if element == STRING:
                for _ in range(count):
                    (length,) = self.scalars("Q")
                    self.position += length
                return None
        raise IndexError(f"unknown type {kind} of a value")

    def parse(self) -> GgufHeader:
        (version,) = self.scalars("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path}: GGUF version {version}; expected one of {VERSIONS}")
        count, keys = self.scalars("Q", 2)
        metadata = {}
        for _ in range(keys):
            key = self.string()
            value = self.value(self.scalars("I")[0])
            if value is not None:
                metadata[key] = value
        rows = [self.row() for _ in range(count)]
        alignment = max(1, int(metadata.get("general.alignment", DEFAULT_ALIGNMENT)))
        start = -(-self.position // alignment) * alignment
        return GgufHeader(metadata, [self.tensor(start, *row) for row in rows])

    def row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (dimensions,) = self.scalars("I")
        if dimensions > MOST_DIMENSIONS:
            raise IndexError(f"{dimensions} dimensions")
        shape = tuple(reversed(self.scalars("Q", dimensions)))
        return name, shape, self.scalars("I")[0], self.scalars("Q")[0]

    def tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in GGMLQuantizationType._value2member_map_:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {kind}, which the gguf package does not know; `pip install -U gguf`"
            )
        named = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[named]
        if not shape or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name}: rows of shape {list(shape)} are not whole blocks of {block} "
                f"({named.name}); the file is damaged"
            )
        nbytes = prod(shape) // block * block_bytes
        end = start + offset + nbytes
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name} ends at byte {end}, the file has {len(self.data)}; download it again"
            )
        return GgufTensor(name, shape, named, start + offset, nbytes)
