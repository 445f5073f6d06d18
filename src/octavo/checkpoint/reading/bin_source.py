"""Read PyTorch checkpoints (`pytorch_model.bin`): pickles of tensors, one file or shards.

A pickle can run any code when it is opened. These files are only ever read with `weights_only=True`, which
knows tensors and plain containers and refuses everything else. Files in the zip format (PyTorch 1.6 and
later) are memory-mapped, older ones are read into memory.

Example:
    >>> from octavo.checkpoint.reading.bin_source import load_tensors
    >>> load_tensors(Path("published/pytorch_model.bin"))["lm_head.weight"].shape
    torch.Size([300, 64])
"""

import ctypes
import mmap
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch

from ...wording import one_line
from ..errors import CheckpointError
from .index import check_against_index
from .source import Source, TensorInfo

# A training framework's wrapper around the state dict.
WRAPPERS = ("state_dict", "model", "module")


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file by name, memory-mapped where its format allows. Runs no code of the file.

    Raises:
        CheckpointError: if the pickle asks for anything but tensors, is damaged, or holds no tensors.
    """
    mapped = _is_zip(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_explain(path, error)) from None
    except Exception as error:  # a damaged pickle fails in any way: assertions, types, indices, ...
        raise CheckpointError(
            f"{path}: expected a PyTorch checkpoint, found a damaged or truncated file of {path.stat().st_size} bytes "
            f"({one_line(error)}); download it again"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected tensors by name, found {type(loaded).__name__}")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: expected tensors by name, found a dictionary without any")
    return tensors


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from None


def _explain(path: Path, error: pickle.UnpicklingError) -> str:
    text = str(error)
    # The name of what it would have called, out of several paragraphs of advice on how to allow it.
    asked = re.search(r"(?:Unsupported global: )?GLOBAL ([\w.]+)", text)
    if asked:
        return (
            f"{path}: this pickle asks to run code ({asked[1]}), which tensors never need; nothing of it was run. Octavo reads "
            "plain tensors only: get the model as safetensors from a source you trust"
        )
    return f"{path}: not a checkpoint of plain tensors ({one_line(error)}); get the model as safetensors"


class BinSource(Source):
    """A checkpoint of PyTorch pickles: one file, or shards with an index.

    Raises:
        CheckpointError: if a file is damaged or asks to run code, or the index names tensors that are not there.
    """

    kind = "bin"

    def __init__(self, folder: Path, files: list[Path], index: Path | None = None):
        super().__init__(folder, files)
        self._tensors: dict[str, torch.Tensor] = {}
        self._mapped: set[str] = set()
        for path in files:
            mapped = _is_zip(path)
            for name, tensor in load_tensors(path).items():
                if tensor.is_sparse or tensor.is_quantized:
                    raise CheckpointError(
                        f"{path}: tensor {name} is {tensor.layout} {tensor.dtype}, expected a dense one"
                    )
                self._tensors[name] = tensor.detach()
                if mapped:
                    self._mapped.add(name)
                self.tensors[name] = TensorInfo(
                    name, tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.element_size(), path.name
                )
        if index is not None:
            check_against_index(index, {name: info.file for name, info in self.tensors.items()})

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def release(self, name: str) -> None:
        tensor = self._tensors.get(name)
        if tensor is not None and name in self._mapped and tensor.is_contiguous():
            _forget_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())

    def close(self) -> None:
        self._tensors.clear()


def _forget_pages(address: int, nbytes: int) -> None:
    """Take the pages of a private, unwritten file map out of this process; touching them again reads the file."""
    if sys.platform != "linux" or nbytes == 0:
        return
    begin = address - address % mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + nbytes - begin), mmap.MADV_DONTNEED)
