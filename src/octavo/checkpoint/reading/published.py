"""Published 8-bit checkpoints (`hivemind/gpt-j-6B-8bit` and what was saved like it), read exactly.

Beside every quantized `X.weight` (uint8 [out, in]) lie

    X.absmax  float32 [ceil(out * in / 4096)]   scales of blocks of the flattened matrix
    X.code    float32 [256]                     codebook, bitsandbytes' dynamic map of its day

with `weight[o, i] = code[X.weight[o, i]] * absmax[(o * in + i) // 4096]`, and in fine-tuned ones `X.adapter.0.weight` and
`X.adapter.2.weight`, a linear (for embeddings: a table) down and a linear up, added to the layer's output.

Blocks of 4096 may run across rows. Cut into blocks of gcd(4096, in), each with a copy of its scale, they do
not, and hold exactly the same weights.

Example:
    >>> from octavo.checkpoint import open_source
    >>> source = open_source("published")          # or "mrm8488/bertin-gpt-j-6B-ES-8bit"
    >>> source.read_packed("transformer.h.0.mlp.fc_in.weight").block_size      # gcd(4096, 64)
    64
"""

import math
import re
import warnings
from collections.abc import Mapping

import torch

from ...config import OctavoConfig
from ...quantizer import SHORTEST_REPEATED_BLOCK, Packed
from ..errors import CheckpointError
from .source import Source, SourceOver, TensorInfo

BLOCK_SIZES = (4096, 2048, 1024, 512, 256, 128, 64)
CODES = 256
# GPT-J's and GPT-Neo's causal mask [1, 1, n, n] and the number it fills with: constants, saved as buffers.
MASK = re.compile(r"\.(attn|attention)\.bias$")
MASK_FILL = re.compile(r"\.(attn|attention)\.masked_bias$")


def is_published(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether tensors of these names and types are a published 8-bit checkpoint."""
    return any(_is_quantized(tensors, name) for name in tensors)


def _is_quantized(tensors: Mapping[str, TensorInfo], name: str) -> bool:
    base = name.removesuffix(".weight")
    return (
        base != name
        and tensors[name].dtype == torch.uint8
        and f"{base}.absmax" in tensors
        and f"{base}.code" in tensors
    )


class PublishedSource(SourceOver):
    """A published 8-bit checkpoint over the files of `inner`.

    `tensors` lists what the model has: `X.absmax`, `X.code` and adapters are folded into `X.weight` and `adapters`, mask
    buffers are in `dropped`. `read` de-quantizes; `read_packed` gives the stored bytes, row by row.

    Raises:
        CheckpointError: if scales or codebook do not fit a weight.
    """

    kind = "published"
    native = False
    eight_bit = True
    codebook = "as published"

    def __init__(self, inner: Source):
        super().__init__(inner)
        tensors = inner.tensors
        for name in tensors:
            if _is_quantized(tensors, name):
                self.quantized[name] = _flat_block_size(tensors, name)
        bases = [name.removesuffix(".weight") for name in self.quantized]
        folded = {f"{base}.{part}" for base in bases for part in ("absmax", "code")}
        adapters = {f"{base}.adapter.{layer}.weight" for base in bases for layer in (0, 2)}
        for name, info in tensors.items():
            if name in folded or name in adapters:
                continue
            if _is_mask(info):
                self.dropped.append(name)
                continue
            if name in self.quantized:
                base = name.removesuffix(".weight")
                nbytes = info.nbytes + tensors[f"{base}.absmax"].nbytes + tensors[f"{base}.code"].nbytes
                info = TensorInfo(name, info.shape, torch.float32, nbytes, info.file, "8-bit")
            self.tensors[name] = info
        for base in bases:
            self._add_adapter(base)

    def _add_adapter(self, base: str) -> None:
        names = [f"{base}.adapter.{layer}.weight" for layer in (0, 2)]
        present = [name for name in names if name in self._inner.tensors]
        if not present:
            return
        if len(present) == 1:
            raise CheckpointError(
                f"{self.folder}: {present[0]} has no counterpart; expected both {names[0]} and {names[1]}"
            )
        down, up = (self._inner.read(name) for name in names)
        rows, columns = self.tensors[f"{base}.weight"].shape
        # A linear's A is [r, in]; an embedding's is a table [num, r] of the same rows as the weight.
        linear = down.shape == (up.shape[1], columns) and up.shape[0] == rows
        table = down.shape == (rows, up.shape[1]) and up.shape[0] == columns
        if not linear and not table:
            raise CheckpointError(
                f"{self.folder}: the adapter of {base}, {list(down.shape)} and {list(up.shape)}, does not fit its weight "
                f"{[rows, columns]}; expected [r, {columns}] and [{rows}, r]"
            )
        self.adapters[base] = (down, up)

    def read(self, name: str) -> torch.Tensor:
        """The tensor; float32 and de-quantized for a quantized weight."""
        if name not in self.quantized:
            if name not in self.tensors:
                raise KeyError(name)
            return self._inner.read(name)
        qdata, absmax, code = self._stored(name)
        size = self.quantized[name]
        flat = qdata.reshape(-1)
        out = torch.empty(flat.shape, dtype=torch.float32)
        step = size * 1024
        for start in range(0, flat.numel(), step):
            values = code[flat[start : start + step].to(torch.int32)]
            scales = absmax[start // size : (start + step) // size]
            out[start : start + step] = values * scales.repeat_interleave(size)[: values.numel()]
        return out.view(qdata.shape)

    def own_config(self, config: OctavoConfig) -> OctavoConfig:
        return OctavoConfig(codebook="dynamic", skip=config.skip)

    def keeps(self, name: str, transposed: bool) -> bool:
        kept = self.block_size(name) is not None and not transposed
        if not kept:
            warnings.warn(
                f"{name}: rows of {self.tensors[name].shape[-1]} weights cut its blocks of {self.quantized[name]} too short "
                "to repeat their scales; it is de-quantized and quantized anew",
                stacklevel=3,
            )
        return kept

    def scale_type(self, name: str) -> torch.dtype:
        return torch.float32

    def block_size(self, name: str) -> int | None:
        """Block size with which a quantized weight is exactly row-local; None where it would be uselessly short."""
        shared = math.gcd(self.quantized[name], self.tensors[name].shape[-1])
        return shared if shared >= SHORTEST_REPEATED_BLOCK else None

    def read_packed(self, name: str) -> Packed | None:
        """A quantized weight in Octavo's layout, exactly the published numbers.

        Returns:
            qdata uint8 [out, in], absmax float32 [out, in / B], code float32 [256] ascending with an exact 0, and B =
            gcd(4096, in). None where no such form exists (B under 32) and, with a warning, where all 256 codes are used and
            none is 0: `read` it and quantize it as `refit_config` says.
        """
        block = self.block_size(name)
        if block is None:
            return None
        canonical = _canonical(*self._stored(name))
        if canonical is None:
            warnings.warn(
                f"{name}: all 256 entries of its codebook are in use and none is 0; it is de-quantized and quantized anew",
                stacklevel=2,
            )
            return None
        qdata, absmax, code = canonical
        rows, columns = qdata.shape
        # [rows, columns / block]: the flat block that each run of `block` weights lies in
        runs = torch.arange(0, rows * columns, block).view(rows, columns // block)
        return Packed(qdata, absmax[runs // self.quantized[name]], code, block)

    def refit_config(self, name: str) -> OctavoConfig:
        """How to quantize a weight whose own numbers cannot be kept: fitted anew, which costs no more bytes."""
        block = self.block_size(name) or self.quantized[name]
        return OctavoConfig(codebook="fitted", block_size=block)

    def _stored(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qdata [out, in], absmax float32 [blocks], code float32 [256], as in the file; checked to be numbers."""
        base = name.removesuffix(".weight")
        absmax = self._inner.read(f"{base}.absmax").to(torch.float32).reshape(-1)
        code = self._inner.read(f"{base}.code").to(torch.float32).reshape(-1)
        for part, values in (("absmax", absmax), ("code", code)):
            if not torch.isfinite(values).all():
                raise CheckpointError(
                    f"{self.folder}: {base}.{part} holds NaN or infinity; the file is damaged"
                )
        return self._inner.read(name), absmax, code


def _is_mask(info: TensorInfo) -> bool:
    # By shape as well as by name: an attention's `bias` may also be a parameter.
    mask = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    fill = math.prod(info.shape) == 1
    return bool((MASK.search(info.name) and mask) or (MASK_FILL.search(info.name) and fill))


def _flat_block_size(tensors: Mapping[str, TensorInfo], name: str) -> int:
    """Block size over the flattened matrix, from the number of scales: 4096 unless that contradicts it."""
    base = name.removesuffix(".weight")
    info, absmax, code = tensors[name], tensors[f"{base}.absmax"], tensors[f"{base}.code"]
    if len(info.shape) != 2:
        raise CheckpointError(
            f"{info.file}: {name}: expected an 8-bit matrix, found shape {list(info.shape)}"
        )
    if math.prod(code.shape) != CODES:
        raise CheckpointError(
            f"{info.file}: {base}.code: expected {CODES} entries, found shape {list(code.shape)}"
        )
    count, blocks = math.prod(info.shape), math.prod(absmax.shape)
    for size in BLOCK_SIZES:
        if -(-count // size) == blocks:
            return size
    raise CheckpointError(
        f"{info.file}: {base}.absmax: expected {-(-count // 4096)} scales, one for each 4096 weights of {list(info.shape)}, "
        f"found {blocks}"
    )


def _canonical(
    qdata: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The same weights with a codebook that is ascending, within [-1, 1], and holds an exact 0; None if impossible."""
    lookup = torch.arange(CODES, dtype=torch.uint8)
    if not bool((code == 0).any()):
        unused = torch.bincount(qdata.reshape(-1), minlength=CODES) == 0
        if not bool(unused.any()):
            return None
        code = code.clone()
        code[int(unused.nonzero()[0])] = 0.0
    largest = float(code.abs().max())
    if largest > 1:
        # By a power of two: exact for both factors.
        factor = 2.0 ** math.ceil(math.log2(largest))
        code, absmax = code / factor, absmax * factor
        if not torch.isfinite(absmax).all():
            return None
    if bool((absmax < 0).any()):
        return None
    if bool((code[1:] < code[:-1]).any()):
        order = torch.argsort(code, stable=True)
        lookup[order] = torch.arange(CODES, dtype=torch.uint8)
        code = code[order]
        renamed = torch.empty_like(qdata, memory_format=torch.contiguous_format)
        # In panels: an index into the table takes four times the memory of the bytes it replaces.
        for start in range(0, qdata.shape[0], 1024):
            renamed[start : start + 1024] = lookup[qdata[start : start + 1024].to(torch.int32)]
        qdata = renamed
    return qdata, absmax, code
