"""A checkpoint on disk, seen lazily: names, shapes and types first, data tensor by tensor.

`open_source` recognizes what a folder, a file or a hub id holds:

    kind           what it is                                                      read by
    "safetensors"  one file, or shards with an index                               safetensors_source.py
    "bin"          pytorch_model.bin: a pickle of tensors, one file or shards      bin_source.py
    "published"    8-bit block-wise checkpoints (uint8 weight, absmax, code)       published.py
    "gguf"         a llama.cpp file                                                gguf_source.py
    "octavo"       what `octavo quantize` and `save_pretrained` write              safetensors_source.py

Example:
    >>> from octavo.checkpoint import open_source
    >>> with open_source("path/to/model") as source:  # doctest: +SKIP
    ...     for name, info in source.tensors.items():
    ...         print(name, info.shape, info.dtype)
    ...     weight = source.read("lm_head.weight")
"""

import json
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .locate import Location, locate

# What a tokenizer, a generation or a processor may consist of, and the licence the weights came under.
AUXILIARY_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before its data is read.

    Attributes:
        name: its name in the checkpoint.
        shape: as `read` returns it.
        dtype: as stored (uint8 for the weights of a published 8-bit checkpoint).
        nbytes: bytes it takes in the file.
        file: name of the file that holds it.
        stored: name of a type that torch does not have (GGUF's), else empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: str
    stored: str = ""


class Source:
    """A lazily read checkpoint. Use as a context manager, or call `close`.

    Attributes:
        kind: "safetensors", "bin", "published", "gguf" or "octavo".
        folder: the folder that holds it.
        files: the files that hold its weights.
        tensors: name → TensorInfo, in the order of the files.
        quantized: names of weights that are stored in 8 bits (published checkpoints), else empty.
        adapters: module name → (A, B), low-rank additions stored beside the weights (published checkpoints).
        dropped: names found in the files that are no parameters, and are left out on purpose.
    """

    kind: str

    def __init__(self, folder: Path, files: list[Path]):
        self.folder = folder
        self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        self.quantized: dict[str, Any] = {}
        self.adapters: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.dropped: list[str] = []

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of config.json.

        Raises:
            CheckpointError: if it is missing or no JSON object.
        """
        return read_config(self.folder)

    def model_config(self) -> Any:
        """The transformers configuration object of the model.

        Raises:
            CheckpointError: if this transformers does not know the architecture, or it needs code from the
                checkpoint.
        """
        from transformers import AutoConfig

        self.config  # noqa: B018  (its own error, if it is missing, is the clearer one)
        try:
            # Said explicitly: transformers would otherwise ask on the terminal whether to run the checkpoint's code.
            return AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: transformers cannot make a model of this: "
                f"{_first_line(error)}"
            ) from error

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in its stored precision, memory-mapped where the format allows: do not write to
        it.

        Raises:
            KeyError: if there is no such tensor.
            CheckpointError: if its data cannot be read.
        """
        raise NotImplementedError

    def read_packed(self, name: str) -> Any:
        """A weight of `quantized` in Octavo's layout, if it has that form exactly, else None."""
        raise KeyError(name)

    def release(self, name: str) -> None:
        """Let go of the memory of `name`'s data; reading it again goes back to the file. A hint: may do nothing."""

    def transforms(self, config: Any) -> list[Any] | None:
        """transformers' weight transforms from these names to the model's; None for those of the architecture."""
        return None

    def auxiliary_files(self) -> list[Path]:
        """Files of the folder that belong to the model besides weights and config.json: tokenizer and the like."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in AUXILIARY_PATTERNS)
        )

    def save_auxiliary(self, out: Path) -> list[str]:
        """Write what belongs to the model besides weights and config.json into the folder `out`; returns names."""
        copied = []
        for path in self.auxiliary_files():
            shutil.copyfile(path, out / path.name)
            copied.append(path.name)
        templates = self.folder / "chat_templates"
        if templates.is_dir():
            shutil.copytree(templates, out / "chat_templates", dirs_exist_ok=True)
            copied.append("chat_templates")
        return copied

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def close(self) -> None:
        """Forget the open files. Tensors already read stay valid."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, as a dictionary. Raises CheckpointError if it is missing or malformed."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: expected the model's config.json beside its weights; download it as well"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def open_source(src: str | Path, *, revision: str | None = None) -> Source:
    """Open a checkpoint for lazy reading.

    Args:
        src: a folder; a .safetensors, .bin or .gguf file; a hub id ("org/name", or "org/name/file.gguf").
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: if nothing is found there, files are missing, damaged or dangerous, or the weights
            are quantized by something else than Octavo.
    """
    location = locate(src, revision)
    if location.format == "gguf":
        from .gguf_source import GgufSource

        return GgufSource(location.files[0])
    kind = _quantization_kind(location)
    if location.format == "safetensors":
        from .safetensors_source import SafetensorsSource

        source: Source = SafetensorsSource(location.folder, location.files, location.index)
    else:
        from .bin_source import BinSource

        source = BinSource(location.folder, location.files, location.index)
    if kind == "octavo":
        source.kind = kind
        return source
    from .published import PublishedSource, is_published

    return PublishedSource(source) if is_published(source.tensors) else source


def _quantization_kind(location: Location) -> str | None:
    """ "octavo", None for plain weights; an error for weights packed by something else."""
    if not (location.folder / "config.json").exists():
        return None
    packed = read_config(location.folder).get("quantization_config")
    if not packed:
        return None
    method = packed.get("quant_method") if isinstance(packed, dict) else packed
    if method == "octavo":
        return "octavo"
    raise CheckpointError(
        f"{location.folder}: its weights are quantized already (quant_method {method!r}); "
        "give the original 16-bit or 32-bit checkpoint"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
