"""Write a model as a GGUF file, tensor by tensor.

Names, shapes and types are known before any data is read: the header is written first, then each tensor's rows are
read (de-quantized, if they are in 8 bits), put into llama.cpp's order, stored in the file's type and written, some
rows at a time. Memory holds a few of these panels, never the model. The file appears under its name when it is whole.

Matrices get the type asked for. As in llama.cpp's own files, norms, biases, learned positions and routers stay in
float32, and a matrix whose rows are no multiple of 32 goes into float16 where Q8_0 is asked for.

Example:
    >>> from octavo.export import export_gguf
    >>> export_gguf("model-8bit", "demo.gguf").types
    {'F16': ..., 'F32': ...}
"""

import errno
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
    quants,
)
from gguf.utility import size_label

from ..checkpoint import Source, open_source
from ..checkpoint.skeleton import build_skeleton
from ..checkpoint.writing.durable import put_in_place
from ..checkpoint.writing.in_use import Lock
from .architectures import Architecture, Target, architecture_of
from .parameters import Parameters
from .vocabulary import Vocabulary, add_vocabulary

# name → type of the matrices, and the number that general.file_type has for it
TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
ALWAYS_F32 = ("_norm.weight", "position_embd.weight", "ffn_gate_inp.weight")
# Weights read and stored at a time: 16 MB in float32.
PANEL_WEIGHTS = 1 << 22
HEADER_ROOM = 64 << 20

Progress = Callable[[int, int, str], None]


@dataclass
class ExportResult:
    """What an export wrote.

    Attributes:
        out: the file.
        architecture: llama.cpp's name for the model's.
        vocabulary: what it was told of the tokenizer.
        nbytes: size of the file.
        types: number of tensors of each type.
        narrow: tensors in float16 because their rows are no multiple of 32, where Q8_0 was asked for.
    """

    out: Path
    architecture: str
    vocabulary: Vocabulary
    nbytes: int = 0
    types: dict[str, int] = field(default_factory=dict)
    narrow: list[str] = field(default_factory=list)


def export_gguf(
    model: str | Path,
    out: str | Path,
    to: str = "f16",
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a model as a GGUF file.

    Args:
        model: what `octavo.load` takes: a model quantized by Octavo, a plain one, a published 8-bit checkpoint, a GGUF file.
        out: the file to write, ending in .gguf.
        to: type of the matrices: "f16", "q8_0", "bf16", "f32".
        name: general.name in the file. Default: the name of the model's folder, file or repository.
        overwrite: replace `out`.
        progress: called with bytes written, bytes in all, and the tensor at hand.

    Raises:
        ValueError: on an unknown type, a model or tokenizer that llama.cpp has no counterpart for, a weight beyond
            float16's range.
        octavo.checkpoint.CheckpointError: if the model cannot be read.
        OSError: if `out` exists, or the disk is full.
    """
    if to not in TYPES:
        raise ValueError(f"--to: expected one of {', '.join(TYPES)}, found {to!r}")
    out = Path(out)
    if out.suffix != ".gguf":
        raise ValueError(f"{out}: expected a file name that ends in .gguf")
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; expected a file to write")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; give another name, or --overwrite to replace it")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.absolute().parent}: no such folder to write {out.name} to")
    from .. import load_tokenizer

    with open_source(model) as source:
        tokenizer = load_tokenizer(model)
        return _Export(source, tokenizer, out, to, name or _name(model)).run(progress)


def _name(model: str | Path) -> str:
    path = Path(model)
    if path.exists():
        return path.stem if path.is_file() else path.absolute().name
    return str(model).rpartition("/")[2]


class _Export:
    """One run of `export_gguf`: what is written, decided from names and shapes, then panel by panel."""

    def __init__(self, source: Source, tokenizer: Any, out: Path, to: str, name: str):
        self.source, self.tokenizer, self.out, self.name = source, tokenizer, out, name
        self.type, self.file_type = TYPES[to]
        self.config = source.model_config()
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        self.architecture: Architecture = architecture_of(self.config)
        self.parameters = Parameters(source, build_skeleton(self.config))
        names = get_tensor_name_map(self.architecture.arch, self.config.num_hidden_layers)
        self.targets = self.architecture.targets(self.parameters, self.config, names)
        self.done = 0
        self.total = sum(self._nbytes(target) for target in self.targets)

    def run(self, progress: Progress | None) -> ExportResult:
        self.progress = progress or (lambda done, total, what: None)
        partial = self.out.with_name(self.out.name + ".partial")
        free = shutil.disk_usage(self.out.absolute().parent).free
        if free < self.total + HEADER_ROOM:
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: {self.total + HEADER_ROOM:,} bytes are needed, {free:,} free",
                str(self.out),
            )
        with Lock(partial):
            vocabulary = self._write(partial)
        types = Counter(self._type(target).name for target in self.targets)
        narrow = [t.name for t in self.targets if self.type.name == "Q8_0" and self._type(t).name == "F16"]
        nbytes = self.out.stat().st_size
        return ExportResult(self.out, self.arch_name, vocabulary, nbytes, dict(types.most_common()), narrow)

    def _write(self, partial: Path) -> Vocabulary:
        writer = GGUFWriter(partial, self.arch_name)
        try:
            vocabulary = self._describe(writer)
            self._write_tensors(writer)
            self.source.check_unchanged()
            put_in_place(partial, self.out)
        except BaseException:
            writer.close()
            partial.unlink(missing_ok=True)
            raise
        return vocabulary

    @property
    def arch_name(self) -> str:
        from gguf import MODEL_ARCH_NAMES

        return MODEL_ARCH_NAMES[self.architecture.arch]

    def _describe(self, writer: GGUFWriter) -> Vocabulary:
        from .. import __version__

        writer.add_type("model")
        writer.add_name(self.name)
        writer.add_description(f"{type(self.parameters.model).__name__}, written by Octavo {__version__}")
        experts = [t for t in self.targets if "_exps." in t.name]
        in_experts = sum(prod(target.shape) for target in experts)
        everything = sum(prod(target.shape) for target in self.targets if target.parameter)
        count = experts[0].shape[0] if experts else 0
        writer.add_size_label(
            size_label(everything, everything - in_experts, in_experts // max(count, 1), count)
        )
        self.architecture.describe(writer, self.config)
        writer.add_file_type(self.file_type)
        if self.type == GGMLQuantizationType.Q8_0:
            writer.add_quantization_version(GGML_QUANT_VERSION)
        rows = next(target.shape[0] for target in self.targets if target.name == "token_embd.weight")
        options: dict[str, Any] = {}
        if self.source.kind == "gguf":
            # transformers does not take it over into the tokenizer it makes of a GGUF.
            source: Any = self.source
            options["pre"] = source.header.metadata.get("tokenizer.ggml.pre")
        elif (pieces := self.source.folder / "tokenizer.model").exists():
            options["sentencepiece"] = pieces
        return add_vocabulary(writer, self.tokenizer, self.source.config, rows, **options)

    def _type(self, target: Target) -> GGMLQuantizationType:
        if len(target.shape) == 1 or target.name.endswith(ALWAYS_F32) or not target.name.endswith(".weight"):
            return GGMLQuantizationType.F32
        if target.shape[-1] % GGML_QUANT_SIZES[self.type][0]:
            return GGMLQuantizationType.F16
        return self.type

    def _nbytes(self, target: Target) -> int:
        weights, nbytes = GGML_QUANT_SIZES[self._type(target)]
        return prod(target.shape) // weights * nbytes

    def _write_tensors(self, writer: GGUFWriter) -> None:
        for target in self.targets:
            # The element type only matters to the writer where no type of the file is given.
            writer.add_tensor_info(
                target.name, target.shape, np.dtype(np.float32), self._nbytes(target), self._type(target)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target in self.targets:
            tensor: Any = _Streamed(self._nbytes(target), self._panels(target))
            writer.write_tensor_data(tensor)
            if target.parameter:
                self.parameters.release(target.parameter)
        writer.close()

    def _panels(self, target: Target) -> Iterator[np.ndarray]:
        """The tensor's bytes, in pieces."""
        kind = self._type(target)
        for values in self._values(target):
            self.progress(self.done, self.total, target.name)
            with np.errstate(over="ignore"):
                stored = quants.quantize(values, kind)
            if kind == GGMLQuantizationType.F16 and not np.isfinite(stored).all():
                raise ValueError(
                    f"{target.parameter}: a weight is beyond float16's range (65504); export with --to bf16 or f32"
                )
            self.done += stored.nbytes
            yield stored

    def _values(self, target: Target) -> Iterator[np.ndarray]:
        """The tensor's float32 values in the file's order of rows, some rows at a time."""
        if target.constant is not None:
            yield target.constant
            return
        *stack, rows = target.shape if len(target.shape) == 1 else target.shape[:-1]
        order = target.order if target.order is not None else torch.arange(rows)
        step = max(1, PANEL_WEIGHTS // (target.shape[-1] if len(target.shape) > 1 else 1))
        for matrix in range(prod(stack)):
            for start in range(0, rows, step):
                values = self.parameters.rows(target.parameter, order[start : start + step], matrix)
                yield np.ascontiguousarray((values + target.shift if target.shift else values).numpy())


class _Streamed:
    """Stands for an array where a GGUFWriter writes one: it only asks for its size, and to write itself."""

    def __init__(self, nbytes: int, panels: Iterator[np.ndarray]):
        self.nbytes = nbytes
        self.panels = panels

    def tofile(self, file: BinaryIO) -> None:
        written = 0
        for panel in self.panels:
            file.write(panel.data)
            written += panel.nbytes
        # The place of every tensor that follows was chosen from this.
        assert written == self.nbytes, (written, self.nbytes)
