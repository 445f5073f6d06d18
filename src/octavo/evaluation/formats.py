"""Formats for weights, as functions: the weight that a format gives back, and the bytes it takes.

Octavo's formats go through its own operations and llama.cpp's through the gguf package; the others are written out here. What
a format costs a model is then measured on a float model that holds the decoded weights, with no kernel of that format needed.

    name                      what                                                             bits per weight, about
    float32, bfloat16, ...    plain types                                                      32, 16
    published                 dynamic map, blocks of 4096 over the flattened matrix            8.01
    bitsandbytes              the same, made by that library (which must be installed)         8.01
    dynamic-B                 the same map, blocks of B along rows                             8 + 32 / B
    fitted-B                  Octavo: a codebook fitted to each matrix, blocks of B            8 + 16 / B
    int8-row                  symmetric int8, a scale per row (torchao, storage of LLM.int8)   8.01
    int8-B                    symmetric int8, blocks of B                                      8 + 16 / B
    q8_0                      llama.cpp: int8, blocks of 32                                    8.5
    fp8-row                   float8 e4m3, a scale per row                                     8.01

Example:
    >>> import torch
    >>> from octavo.evaluation.formats import find_format
    >>> encoded = find_format("fitted-64")(torch.randn(128, 256))
    >>> encoded.weight.shape, encoded.nbytes
    (torch.Size([128, 256]), 34816)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .. import codebook, ops
from ..config import OctavoConfig
from ..ops.schema import DTYPES_BY_NAME
from ..quantizer import quantize_parameter
from ..tensor import OctavoTensor

PUBLISHED_BLOCK = 4096
GGUF_BLOCK = 32
# What `octavo compare` compares when it is not told.
USUAL = ("published", "fitted-4096", "fitted-128", "fitted-64", "fitted-32", "int8-row", "q8_0", "bfloat16")


class Encoded(NamedTuple):
    """A weight after a format.

    Attributes:
        weight: float32, of the original's shape.
        nbytes: bytes that the format takes for it, scales and tables included.
    """

    weight: torch.Tensor
    nbytes: int


@dataclass(frozen=True)
class Format:
    """A format for weights; call it with a weight.

    Attributes:
        name: as the command line has it.
        title: as a table has it.
        encode: float32 [..., N, K], rows being outputs → Encoded.
    """

    name: str
    title: str
    encode: Callable[[torch.Tensor], Encoded]

    def __call__(self, weight: torch.Tensor, transposed: bool = False, name: str = "weight") -> Encoded:
        """What is left of a weight, and the bytes it takes.

        Args:
            weight: float [..., N, K], or [..., K, N] with `transposed` (Conv1D), on any device.
            name: the parameter's name, for errors.

        Raises:
            ValueError: if the weight holds NaN or infinity, naming it.
        """
        stored = weight.detach().float()
        if not torch.isfinite(stored).all():
            raise ValueError(f"{name} holds NaN or infinity: no format can hold it. Check the checkpoint")
        decoded, nbytes = self.encode((stored.mT if transposed else stored).contiguous())
        return Encoded(decoded.mT if transposed else decoded, nbytes)


def find_format(name: str) -> Format:
    """The format of a name (see the module).

    Raises:
        ValueError: if there is none, listing what there is.
    """
    if name in DTYPES_BY_NAME:
        return Format(name, name, partial(_plain, dtype=DTYPES_BY_NAME[name]))
    if name in _SINGLE:
        title, encode = _SINGLE[name]
        return Format(name, title, encode)
    kind, _, size = name.rpartition("-")
    if kind in _BLOCKED and re.fullmatch(r"[1-9][0-9]{0,8}", size):
        title, encode = _BLOCKED[kind]
        return Format(name, title.format(size), partial(encode, block_size=int(size)))
    known = ", ".join([*DTYPES_BY_NAME, *_SINGLE, *(f"{kind}-B" for kind in _BLOCKED)])
    raise ValueError(f"format: expected one of {known} (B: weights that share a scale), found {name!r}")


def _plain(weight: torch.Tensor, dtype: torch.dtype) -> Encoded:
    return Encoded(weight.to(dtype).float(), weight.numel() * dtype.itemsize)


def octavo(weight: torch.Tensor, block_size: int, kind: str, scales: str = "auto") -> Encoded:
    """What `octavo.quantize_model` stores for a weight [..., N, K] with this codebook ("fitted", "dynamic") and block size."""
    config = OctavoConfig(kind, block_size, scales=scales)
    stored = OctavoTensor.from_packed(quantize_parameter(weight, config), torch.float32, codebook=kind)
    return Encoded(stored.dequantize(), stored.nbytes_stored)


def _published(weight: torch.Tensor) -> Encoded:
    """The published 8-bit checkpoints: block-wise quantization of the flattened matrix. Bytes as such a checkpoint holds them.

    By Octavo's operations, which take the nearest entry; bitsandbytes' CPU kernel takes the next one for the two weights in a
    thousand that lie all but in the middle (tests/test_compare.py). The error is the same to 4 digits.
    """
    code = codebook.dynamic().to(weight.device)
    decoded = torch.empty_like(weight)
    nbytes = 0
    for matrix, out in zip(_matrices(weight), _matrices(decoded), strict=True):
        flat = matrix.reshape(1, -1)
        qdata, absmax = ops.quantize(flat, code, PUBLISHED_BLOCK, torch.float32)
        out.copy_(ops.dequantize(qdata, absmax, code, PUBLISHED_BLOCK, torch.float32).view(out.shape))
        nbytes += qdata.nbytes + absmax.nbytes + code.nbytes
    return Encoded(decoded, nbytes)


def _bitsandbytes(weight: torch.Tensor) -> Encoded:
    """The published format as its own library makes it."""
    import bitsandbytes.functional as bnb

    decoded = torch.empty_like(weight)
    nbytes = 0
    for matrix, out in zip(_matrices(weight), _matrices(decoded), strict=True):
        qdata, state = bnb.quantize_blockwise(matrix.contiguous(), blocksize=PUBLISHED_BLOCK)
        out.copy_(bnb.dequantize_blockwise(qdata, state).view(out.shape))
        nbytes += qdata.nbytes + state.absmax.nbytes + state.code.nbytes
    return Encoded(decoded, nbytes)


def _int8_rows(weight: torch.Tensor) -> Encoded:
    """A row can afford a float32 scale."""
    return _int8(weight, weight.shape[-1], torch.float32)


def _int8(weight: torch.Tensor, block_size: int, scales: torch.dtype = torch.float16) -> Encoded:
    """Symmetric int8 in blocks of a row, the last one shorter where they do not fit."""
    columns = weight.shape[-1]
    padded = F.pad(weight, (0, -columns % block_size))
    blocks = padded.unflatten(-1, (-1, block_size))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).to(scales).float()
    codes = _divided(blocks, scale).round().clamp(-127, 127)
    nbytes = weight.numel() + scale.numel() * scales.itemsize
    return Encoded((codes * scale).flatten(-2)[..., :columns], nbytes)


def _fp8_rows(weight: torch.Tensor) -> Encoded:
    scale = weight.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    codes = _divided(weight, scale).to(torch.float8_e4m3fn)
    return Encoded(codes.float() * scale, weight.numel() + 4 * scale.numel())


def _q8_0(weight: torch.Tensor) -> Encoded:
    """llama.cpp's, by the gguf package. A matrix whose rows are no multiple of 32 stays in float16, as llama.cpp keeps it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    fits = weight.shape[-1] % GGUF_BLOCK == 0
    kind = GGMLQuantizationType.Q8_0 if fits else GGMLQuantizationType.F16
    data = quantize(weight.cpu().numpy(), kind)
    decoded = torch.from_numpy(np.array(dequantize(data, kind), dtype=np.float32))
    return Encoded(decoded.view(weight.shape).to(weight.device), data.nbytes)


def _divided(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """blocks / scale; zeros where the scale is zero: where all weights are, or too small for its type."""
    return torch.where(scale > 0, blocks / scale, 0.0)


def _matrices(weight: torch.Tensor) -> torch.Tensor:
    """[..., N, K] → [matrices, N, K], a view."""
    return weight.view(-1, *weight.shape[-2:])


_SINGLE: dict[str, tuple[str, Callable[[torch.Tensor], Encoded]]] = {
    "published": ("published (dynamic, 4096)", _published),
    "bitsandbytes": ("bitsandbytes dynamic, 4096", _bitsandbytes),
    "int8-row": ("int8, a scale a row", _int8_rows),
    "q8_0": ("llama.cpp Q8_0", _q8_0),
    "fp8-row": ("fp8 e4m3, a scale a row", _fp8_rows),
}
_BLOCKED: dict[str, tuple[str, Callable[..., Encoded]]] = {
    "fitted": ("Octavo fitted, {}", partial(octavo, kind="fitted")),
    "dynamic": ("Octavo dynamic, {}", partial(octavo, kind="dynamic")),
    "int8": ("int8, blocks of {}", _int8),
}
