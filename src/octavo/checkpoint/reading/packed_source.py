"""Checkpoints packed by other methods, de-quantized exactly: FP8, int8 by rows, MXFP4 (`octavo.checkpoint.reading.packing`).

Many of these have no 16-bit original. A value is what the method's own code computes, in float32:

    FP8, int8            value · scale: one scale for all, for a row, or for a block of a grid [ceil(N / b), ceil(K / b)];
                         the last blocks may be cut (DeepSeek: b = 128)
    bitsandbytes int8    value · SCB[row] · (1 / 127)
    MXFP4                (OCP Microscaling 1.0) 32 values share a scale 2^(byte - 127); two values of 4 bits
                         (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign) in a byte, the lower half first. bfloat16 holds
                         them exactly. GPT-OSS keeps [experts, out, in] in the file, [experts, in, out] in the model.

Example:
    >>> from octavo.checkpoint.reading.packed_source import scaled
    >>> scaled(torch.ones(2, 4, dtype=torch.int8), torch.tensor([[1.0, 2.0]]), grid=[2, 2])
    tensor([[1., 1., 2., 2.],
            [1., 1., 2., 2.]])
"""

from copy import deepcopy
from functools import cached_property
from typing import Any

import torch

from ..errors import CheckpointError
from .packing import HARMLESS, PackedWeight, declarations
from .source import Source, SourceOver, TensorInfo

# As transformers' and bitsandbytes' own code has it.
ONE_127TH = 7.874015718698502e-3
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The grid of most FP8 checkpoints, where config.json does not say.
USUAL_BLOCK = 128
# Bytes of MXFP4 unpacked at a time.
AT_ONCE = 1 << 22


class PackedSource(SourceOver):
    """A checkpoint over the files of `inner`, of which some weights are packed.

    `tensors` lists weights as `read` gives them: their scales are folded into them. `config` no longer says that they are
    packed.

    Args:
        packed: `octavo.checkpoint.reading.packing.find_packed(inner)`.

    Raises:
        CheckpointError: if scales do not fit a weight.
    """

    kind = "packed"
    native = False

    def __init__(self, inner: Source, packed: dict[str, PackedWeight]):
        super().__init__(inner)
        self.packed = packed
        by_data = {each.data: name for name, each in packed.items()}
        scales = {each.scale for each in packed.values()}
        bases = {name.removesuffix(".weight") for name in packed}
        for name, info in inner.tensors.items():
            owner, _, leaf = name.rpartition(".")
            if name in by_data:
                self.tensors[by_data[name]] = self._info(by_data[name])
            elif leaf in HARMLESS and owner in bases:
                self.dropped.append(name)
            elif name not in scales:
                self.tensors[name] = info
        self._require_row_layout()

    @property
    def methods(self) -> list[str]:
        """The methods that packed its weights."""
        return sorted({each.method for each in self.packed.values()})

    def _info(self, name: str) -> TensorInfo:
        packed = self.packed[name]
        data, scale = (self._inner.tensors[part] for part in (packed.data, packed.scale))
        shape, dtype = data.shape, torch.float32
        if packed.method == "MXFP4":
            experts, rows, groups, half = data.shape
            shape, dtype = (experts, groups * half * 2, rows), torch.bfloat16
            fits = scale.shape == data.shape[:-1]
        else:
            fits = self._grid(name) is not None
        if not fits:
            raise CheckpointError(
                f"{self.folder}: {packed.scale}: its shape {list(scale.shape)} does not fit {packed.data} of shape "
                f"{list(data.shape)} ({packed.method}); the file is damaged, or packed in another way than its names say"
            )
        return TensorInfo(name, shape, dtype, data.nbytes + scale.nbytes, data.file, packed.method)

    def _require_row_layout(self) -> None:
        for name, packed in self.packed.items():
            marker = f"{name.removesuffix('.weight')}.weight_format"
            if packed.method != "bitsandbytes int8" or marker not in self._inner.tensors:
                continue
            value = int(self._inner.read(marker).reshape(-1)[0])
            if value != 0:
                raise CheckpointError(
                    f"{self.folder}: {name}: bitsandbytes keeps it in tiles for one kind of GPU (weight_format {value}), "
                    "expected rows (0); save the model anew with a current bitsandbytes, or give the original checkpoint"
                )

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json without what it says of the packing."""
        config = deepcopy(self._inner.config)
        for part, key in list(declarations(config)):
            del part[key]
        return config

    def model_config(self) -> Any:
        config = super().model_config()
        for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
            for key in ("quantization_config", "compression_config"):
                if getattr(part, key, None) is not None:
                    delattr(part, key)
        return config

    @cached_property
    def _block(self) -> list[int]:
        """Block of an FP8 grid as config.json says it; empty if it does not."""
        for part, key in declarations(self._inner.config):
            found = _find(part[key], ("weight_block_size", "block_structure"))
            if isinstance(found, list) and all(isinstance(n, int) and n > 0 for n in found):
                return found
        return []

    def _grid(self, name: str) -> list[int] | None:
        """How many of a weight's values along each dimension share a scale; None if the scales do not fit."""
        packed = self.packed[name]
        shape, scale = (self._inner.tensors[part].shape for part in (packed.data, packed.scale))
        if all(n == 1 for n in scale):
            return list(shape)
        if len(scale) == 1:
            scale = (*scale, *(1,) * (len(shape) - 1))
        if len(scale) != len(shape):
            return None
        said = [0] * (len(shape) - 2) + self._block if len(self._block) == 2 else [0] * len(shape)
        sizes = [_block_of(n, count, block) for n, count, block in zip(shape, scale, said, strict=True)]
        return None if 0 in sizes else sizes

    def read(self, name: str) -> torch.Tensor:
        """The tensor; de-quantized, float32 or (MXFP4) bfloat16, for a packed weight."""
        if name not in self.packed:
            return self._inner.read(name)
        packed = self.packed[name]
        data, scale = self._inner.read(packed.data), self._inner.read(packed.scale)
        if packed.method == "MXFP4":
            return unpack_mxfp4(data, scale).mT
        if packed.method == "bitsandbytes int8":
            return data * scale.to(torch.float32).view(-1, 1) * ONE_127TH
        grid = self._grid(name)
        assert grid is not None  # checked when it was opened
        return scaled(data, scale, grid)

    def release(self, name: str) -> None:
        packed = self.packed.get(name)
        for part in (packed.data, packed.scale) if packed else (name,):
            self._inner.release(part)


def scaled(data: torch.Tensor, scale: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """Values times the scale of their block.

    Args:
        data: int8 or float8 [..., N, K].
        scale: float, or E8M0 (float8_e8m0fnu, or its bytes: 2^(byte - 127)); any shape that `grid` fits.
        grid: values along each dimension of `data` that share a scale.

    Returns:
        float32 [..., N, K].
    """
    if scale.dtype == torch.uint8:
        scale = (scale.to(torch.float32) - 127).exp2()
    scale = scale.to(torch.float32)
    if scale.numel() == 1:
        return data.to(torch.float32) * scale.reshape(())
    *lead, rows, columns = data.shape
    scale = scale.reshape([-(-n // size) for n, size in zip(data.shape, grid, strict=True)])
    for dim in range(len(lead)):
        scale = scale.repeat_interleave(grid[dim], dim).narrow(dim, 0, data.shape[dim])
    out = torch.empty(data.shape, dtype=torch.float32)
    flat, scales = out.view(-1, rows, columns), scale.reshape(-1, *scale.shape[-2:])
    for matrix, values, factors in zip(flat, data.reshape(-1, rows, columns), scales, strict=True):
        # A row of blocks at a time: no second float matrix.
        step = grid[-2] if grid[-2] > 1 else rows
        for start in range(0, rows, step):
            part = factors[start // step] if grid[-2] > 1 else factors
            wide = part.repeat_interleave(grid[-1], -1)[..., :columns] if part.shape[-1] > 1 else part
            torch.mul(values[start : start + step].to(torch.float32), wide, out=matrix[start : start + step])
    return out


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of MXFP4 blocks.

    Args:
        blocks: uint8 [..., G, B], two values per byte.
        scales: uint8 [..., G], 2^(byte - 127).

    Returns:
        bfloat16 [..., G · 2B], exact.
    """
    table = torch.tensor(E2M1 + tuple(-value for value in E2M1), dtype=torch.bfloat16)
    *lead, groups, half = blocks.shape
    packed, exponents = blocks.reshape(-1, half), scales.reshape(-1, 1).to(torch.int32) - 127
    out = torch.empty(packed.shape[0], half * 2, dtype=torch.bfloat16)
    step = max(1, AT_ONCE // half)
    for start in range(0, packed.shape[0], step):
        part, exponent = packed[start : start + step], exponents[start : start + step]
        both = torch.stack([table[(part & 15).int()], table[(part >> 4).int()]], dim=-1)
        out[start : start + step] = torch.ldexp(both.view(part.shape[0], -1).float(), exponent)
    return out.view(*lead, groups * half * 2)


def _block_of(length: int, count: int, said: int) -> int:
    """Values along one dimension that share one of `count` scales; 0 if that many do not fit `length`."""
    if count == 1:
        return length
    for size in (said, USUAL_BLOCK):
        if size and -(-length // size) == count:
            return size
    return length // count if count and length % count == 0 else 0


def _find(value: Any, keys: tuple[str, ...]) -> Any:
    """The first value under one of `keys`, however deep."""
    if not isinstance(value, dict):
        return None
    for key in keys:
        if value.get(key):
            return value[key]
    return next((found for each in value.values() if (found := _find(each, keys)) is not None), None)
