"""Octavo's own format (docs/FORMAT.md): a parameter `P` is `P_qdata`, `P_absmax` and `P_code`, put together here.

Rows are outputs: what a model holds transposed (`Conv1D`) is listed and read as [out, in].

Example:
    >>> from octavo.checkpoint import open_source
    >>> with open_source("model-8bit") as source:
    ...     source.read_packed("lm_head.weight").block_size
    64
"""

from collections.abc import Mapping
from typing import Any

import torch

from ... import ops
from ...config import OctavoConfig, stored_block_size
from ...quantizer import Packed
from ...tensor import SUFFIXES, OctavoTensor
from ..errors import CheckpointError
from .source import Source, SourceOver, TensorInfo


def part_names(name: str) -> list[str]:
    """Names of the three tensors of a parameter, in the order of `Packed`."""
    return [f"{name}_{suffix}" for suffix in SUFFIXES]


def put_together(name: str, parts: Mapping[str, Any], block_size: int) -> Packed:
    """A parameter from its three parts, which are checked to belong together.

    Args:
        name: the parameter, for errors.
        parts: "qdata", "absmax" and "code" → a tensor, or anything that has its `shape` and `dtype`.
        block_size: of config.json; the parameter's own follows from its number of scales.

    Raises:
        ValueError: if a part is missing or does not fit the others.
    """
    absent = [suffix for suffix in SUFFIXES if suffix not in parts]
    if absent:
        raise ValueError(f"{name}: the checkpoint lacks {', '.join(f'{name}_{suffix}' for suffix in absent)}")
    qdata, absmax, code = (parts[suffix] for suffix in SUFFIXES)
    if (
        len(qdata.shape) < 2
        or qdata.dtype != torch.uint8
        or absmax.dtype not in ops.schema.SCALE_TYPES
        or tuple(absmax.shape[:-1]) != tuple(qdata.shape[:-1])
        or code.dtype != torch.float32
        or tuple(code.shape) != (*qdata.shape[:-2], 256)
    ):
        found = ", ".join(f"{name}_{s} {parts[s].dtype} {list(parts[s].shape)}" for s in SUFFIXES)
        raise ValueError(f"{name}: these parts do not belong together: {found}")
    try:
        size = stored_block_size(qdata.shape[-1], absmax.shape[-1], block_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Packed(qdata, absmax, code, size)


class OctavoSource(SourceOver):
    """A checkpoint in Octavo's format over the safetensors files of `inner`.

    `tensors` lists parameters, each with its three parts folded into it.

    Attributes:
        options: how it was quantized, as config.json says.

    Raises:
        CheckpointError: if parts are missing or do not belong together.
        ValueError: on a `format_version` that this code does not know.
    """

    kind = "octavo"
    eight_bit = True
    rows_are_outputs = True

    def __init__(self, inner: Source):
        super().__init__(inner)
        self.options = OctavoConfig.from_dict(dict(self.config["quantization_config"]))
        self.codebook = self.options.codebook
        for name in [n.removesuffix("_qdata") for n in inner.tensors if n.endswith("_qdata")]:
            found = zip(SUFFIXES, part_names(name), strict=True)
            parts = {suffix: inner.tensors[part] for suffix, part in found if part in inner.tensors}
            try:
                self.quantized[name] = put_together(name, parts, self.options.row_block).block_size
            except ValueError as error:
                raise CheckpointError(f"{self.folder}: {error}") from error
        folded = {part for name in self.quantized for part in part_names(name)[1:]}
        for name, info in inner.tensors.items():
            parameter = name.removesuffix("_qdata")
            if parameter in self.quantized and parameter != name:
                nbytes = sum(inner.tensors[part].nbytes for part in part_names(parameter))
                info = TensorInfo(parameter, info.shape, torch.float32, nbytes, info.file, "8-bit")
                self.tensors[parameter] = info
            elif name not in folded:
                self.tensors[name] = info

    def own_config(self, config: OctavoConfig) -> OctavoConfig:
        return self.options

    def scale_type(self, name: str) -> torch.dtype:
        return self._inner.tensors[f"{name}_absmax"].dtype

    def transforms(self, model: Any) -> list[Any]:
        """transformers' renamings alone: nothing in these files is to be merged or split any more."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def read(self, name: str) -> torch.Tensor:
        """The tensor; de-quantized, float32 with rows as outputs, for one in 8 bits."""
        if name not in self.quantized:
            return self._inner.read(name)
        return OctavoTensor.from_packed(self.read_packed(name), torch.float32).dequantize()

    def read_packed(self, name: str) -> Packed:
        """A parameter's three parts and block size.

        Raises:
            KeyError: if it is not in 8 bits.
            CheckpointError: if its codebook breaks the format.
        """
        qdata, absmax, code = (self._inner.read(part) for part in part_names(name))
        ascending = bool((code[..., 1:] >= code[..., :-1]).all() and (code.abs() <= 1).all())
        if not ascending or not bool((code == 0).any(-1).all()):
            raise CheckpointError(
                f"{self.folder}: {name}_code: expected 256 ascending numbers within [-1, 1] with an exact 0"
            )
        return Packed(qdata, absmax, code, self.quantized[name])

    def release(self, name: str) -> None:
        for part in part_names(name) if name in self.quantized else (name,):
            self._inner.release(part)


def rows_of(packed: Packed, rows: Any, matrix: int = 0) -> torch.Tensor:
    """Some rows of one matrix of a parameter, de-quantized.

    Args:
        rows: a slice, or int64 [n].
        matrix: which matrix of a stack.

    Returns:
        float32 [n, K].
    """
    qdata, absmax = (part.reshape(-1, *part.shape[-2:])[matrix][rows] for part in packed[:2])
    return ops.dequantize(
        qdata, absmax, packed.code.reshape(-1, 256)[matrix], packed.block_size, torch.float32
    )
