"""A checkpoint on disk, seen lazily: names, shapes and types first, data tensor by tensor.

`Source` is what every kind of checkpoint offers; `octavo.checkpoint.reading.open` says which kinds there are.

Example:
    >>> from octavo.checkpoint import open_source
    >>> with open_source("model") as source:
    ...     source.tensors["lm_head.weight"].shape
    ...     source.read("lm_head.weight").dtype
    (4096, 256)
    torch.float16
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...config import OctavoConfig
from ...json_files import read_object
from ...ops.schema import DTYPES_BY_NAME
from ...quantizer import Packed
from ...wording import one_line
from ..errors import CheckpointError, library_errors
from .regular import require_regular
from .side_files import side_files

# Layers that a model may have in any case, whatever its files hold: they may share tensors.
MOST_EMPTY_LAYERS = 128
# Where the configuration of a model of several parts keeps that of its language model.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "decoder")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before its data is read.

    Attributes:
        name: its name in the checkpoint.
        shape: as `read` returns it.
        dtype: as `read` returns it.
        nbytes: bytes it takes in the file, scales and tables included.
        file: name of the file that holds it.
        stored: name of the form that `read` de-quantizes; empty for a tensor that lies in the file as it is read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: str
    stored: str = ""


def states_of(files: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """Which file lies where, and in what state: file → number, size, time of its last change; nothing of one that is absent."""
    found: dict[Path, tuple[int, ...]] = {}
    for path in files:
        try:
            stat = path.stat()
        except OSError:
            found[path] = ()
        else:
            found[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


class Source:
    """A lazily read checkpoint. Use as a context manager, or call `close`.

    Attributes:
        kind: what it is, in a word (`octavo.checkpoint.reading.open` lists them).
        native: whether transformers' `from_pretrained` reads these files as they are.
        eight_bit: whether its weights lie in blocks of 8 bits already: Octavo's format, or a published checkpoint.
        rows_are_outputs: whether matrices are listed and read as [out, in] even where the model holds the transpose.
        codebook: name of the codebooks of its 8-bit weights; None if it has none.
        folder: the folder that holds it.
        files: the files that hold its weights.
        tensors: name → TensorInfo, in the order of the files.
        quantized: names of weights that are stored in 8-bit blocks → block size; else empty.
        adapters: module name → (A, B), low-rank additions stored beside the weights (published checkpoints).
        dropped: names found in the files that are no parameters, and are left out on purpose.
        trust_remote_code: whether code in the folder may be run and comes along; said by who opens it.
        seen: file → its state (`states_of`) before anything of it was read; said by who opens it.
    """

    kind: str
    native = True
    eight_bit = False
    rows_are_outputs = False
    codebook: str | None = None

    def __init__(self, folder: Path, files: list[Path]):
        self.folder = folder
        self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        self.quantized: dict[str, int] = {}
        self.adapters: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.dropped: list[str] = []
        self.trust_remote_code = False
        self.seen: dict[Path, tuple[int, ...]] = {}

    def check_unchanged(self) -> None:
        """After the last read: what was read comes from one checkpoint, not from two of which one took the other's place.

        Raises:
            CheckpointError: if another file is in the place of one that was there at first, or it was written to.
        """
        changed = [path for path, state in states_of(self.seen).items() if state != self.seen[path]]
        if changed:
            raise CheckpointError(
                f"{changed[0]} was replaced while it was read; do this again when nothing writes there"
            )

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
            CheckpointError: if this transformers does not know the architecture, or it needs code from the checkpoint.
        """
        from transformers import AutoConfig

        self.config  # noqa: B018  (its own error, if it is missing, is the clearer one)
        try:
            # Said explicitly: transformers would otherwise ask on the terminal whether to run the checkpoint's code.
            config = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=self.trust_remote_code)
            check_layers(config, len(self.tensors), self.folder / "config.json")
        except CheckpointError:
            raise
        except library_errors() as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: transformers cannot make a model of this: {one_line(error)}"
            ) from error
        return config

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in its stored precision, memory-mapped where the format allows: do not write to
        it.

        Raises:
            KeyError: if there is no such tensor.
            CheckpointError: if its data cannot be read.
        """
        raise NotImplementedError

    def read_packed(self, name: str) -> Packed | None:
        """A weight of `quantized` in Octavo's layout, if it has that form exactly, else None."""
        raise KeyError(name)

    def own_config(self, config: OctavoConfig) -> OctavoConfig:
        """How the model is to be quantized when `config` is asked for: what is in 8 bits already stays as it is."""
        return config

    def refit_config(self, name: str) -> OctavoConfig:
        """How a weight of `quantized` is quantized anew, where its own numbers cannot be kept."""
        raise KeyError(name)

    def keeps(self, name: str, transposed: bool) -> bool:
        """Whether a weight of `quantized` keeps its numbers, in a model that holds it `transposed` or as it is."""
        raise KeyError(name)

    def scale_type(self, name: str) -> torch.dtype:
        """Type of the scales of a weight of `quantized`."""
        raise KeyError(name)

    @property
    def place(self) -> Path:
        """What `open_source` opens it by again."""
        return self.folder

    @property
    def pretrained_options(self) -> dict[str, str]:
        """What transformers' `from_pretrained` needs besides the folder."""
        return {}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that config.json says the model computes in, else that of most of its float tensors."""
        stated = stated_dtype(self.config)
        if stated is not None:
            return stated
        plain = (info.dtype for info in self.tensors.values() if not info.stored)
        kinds = Counter(dtype for dtype in plain if dtype in DTYPES_BY_NAME.values())
        return kinds.most_common(1)[0][0] if kinds else torch.float32

    def release(self, name: str) -> None:
        """Let go of the memory of `name`'s data; reading it again goes back to the file. A hint: may do nothing."""

    def transforms(self, model: Any) -> list[Any] | None:
        """transformers' weight transforms from these names to those of `model`; None for those of the architecture."""
        return None

    def auxiliary_files(self) -> list[Path]:
        """Files of the folder, sub-folders included, that belong to the model besides weights and config.json."""
        return side_files(self.folder, self.trust_remote_code)

    def save_auxiliary(self, out: Path) -> list[str]:
        """Write what belongs to the model besides weights and config.json into the folder `out`; returns names."""
        names = [path.relative_to(self.folder) for path in self.auxiliary_files()]
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, out / name)
        return [name.as_posix() for name in names]

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


class SourceOver(Source):
    """A checkpoint seen through another form of its own files: `inner` reads them."""

    def __init__(self, inner: Source):
        super().__init__(inner.folder, inner.files)
        self._inner = inner

    def model_config(self) -> Any:
        self._inner.trust_remote_code = self.trust_remote_code
        return self._inner.model_config()

    def read(self, name: str) -> torch.Tensor:
        return self._inner.read(name)

    def release(self, name: str) -> None:
        self._inner.release(name)

    def close(self) -> None:
        self._inner.close()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, as a dictionary. Raises CheckpointError if it is missing or malformed."""
    path = folder / "config.json"
    require_regular(path)
    try:
        config = read_object(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: expected the model's config.json beside its weights; download it as well"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    for key in ("dtype", "torch_dtype"):
        if not isinstance(config.get(key), str | dict | None):
            raise CheckpointError(f"{path}: {key}: expected the name of a type, found {config[key]!r:.60}")
    return config


def check_layers(config: Any, tensors: int, place: Path) -> None:
    """That the files can fill the layers of a model: building what they cannot would take for ever.

    Args:
        config: of the model.
        tensors: how many the files hold.
        place: the file that speaks of the layers.

    Raises:
        CheckpointError: if there are more layers than tensors.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(MOST_EMPTY_LAYERS, tensors):
        raise CheckpointError(
            f"{place}: {layers} layers, but the files hold {tensors} tensors; download it again"
        )


def stated_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The type that a config.json states: as a string, or as a dictionary of one per part ("" for the whole), under `dtype`
    or, as older versions of transformers wrote it, `torch_dtype`; else the type that its text model states.

    None if it states none, "auto", or one that no model computes in.
    """
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        parts = [value.get(""), *value.values()] if isinstance(value, dict) else [value]
        for part in parts:
            name = str(part).removeprefix("torch.")
            if name in DTYPES_BY_NAME:
                return DTYPES_BY_NAME[name]
    nested = (config.get(key) for key in TEXT_CONFIGS)
    return next((found for part in nested if isinstance(part, dict) and (found := stated_dtype(part))), None)
