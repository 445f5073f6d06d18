"""From a file's three tensors to one `OctavoTensor` in vLLM's stream of weights, and cuts of it for the ranks.

Example:
    >>> list(assemble([("w_qdata", qdata), ("w_absmax", absmax), ("w_code", code)], OctavoConfig()))  # doctest: +SKIP
    [("w", OctavoTensor(shape=(16, 64), ...))]
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields

import torch
from vllm.model_executor.models.utils import WeightsMapper

from ...checkpoint.reading.octavo_source import put_together
from ...config import OctavoConfig
from ...quantizer import SHORTEST_REPEATED_BLOCK
from ...tensor import SUFFIXES, OctavoTensor
from ...wording import few


def assemble(
    weights: Iterable[tuple[str, torch.Tensor]], config: OctavoConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield plain tensors as they come, and a weight in 8 bits under its plain name once its three parts have come.

    Its compute dtype is torch's default type, which vLLM sets to the model's while it loads.

    Raises:
        ValueError: if a part is missing in the end or the parts do not fit together, naming the weight.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        plain, _, suffix = name.rpartition("_")
        if suffix not in SUFFIXES or isinstance(tensor, OctavoTensor):
            yield name, tensor
            continue
        parts = waiting.setdefault(plain, {})
        parts[suffix] = tensor
        if len(parts) == len(SUFFIXES):
            yield plain, _weight(plain, waiting.pop(plain), config)
    if waiting:
        missing = [f"{name}_{s}" for name, parts in waiting.items() for s in SUFFIXES if s not in parts]
        raise ValueError(f"the checkpoint is not complete: it lacks {few(missing, 6)}")


def _weight(name: str, parts: dict[str, torch.Tensor], config: OctavoConfig) -> OctavoTensor:
    packed = put_together(name, parts, config.row_block)
    return OctavoTensor.from_packed(packed, torch.get_default_dtype(), codebook=config.codebook)


class Assembling(WeightsMapper):
    """A mapper of vLLM's that first puts weights together, so that all names it maps are plain ones.

    vLLM combines the mappers of the model and of the quantization method by `|`. Whatever is combined with this one assembles.
    """

    def __init__(self, config: OctavoConfig, renaming: WeightsMapper | None = None):
        own = renaming or WeightsMapper()
        super().__init__(**{field.name: getattr(own, field.name) for field in fields(own)})
        self.config = config

    def __or__(self, other: WeightsMapper) -> "Assembling":
        return Assembling(self.config, super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> "Assembling":
        return Assembling(self.config, WeightsMapper.__or__(other, self))

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        return super().apply(assemble(weights, self.config))


def rows_as_outputs(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a layer of vLLM wants it. A class that transposes what transformers' `Conv1D` holds has undone what was
    stored with rows as outputs."""
    return weight.mT if isinstance(weight, OctavoTensor) and weight.transposed else weight


def inside_rows(weight: torch.Tensor, start: int, size: int, name: str) -> torch.Tensor:
    """weight[:, start : start + size], in 8 bits if the weight is.

    Blocks are cut smaller where the border is inside one, their scale repeated: exact.

    Raises:
        ValueError: if the blocks would be smaller than 32 weights.
    """
    if not isinstance(weight, OctavoTensor):
        return weight.narrow(-1, start, size)
    if start == 0 and size == weight.shape[-1]:
        return weight
    block = weight.block_size
    if start % block or (size % block and start + size != weight.shape[-1]):
        smaller = math.gcd(block, start, size)
        if smaller < SHORTEST_REPEATED_BLOCK:
            raise ValueError(
                f"{name}: rows of {weight.shape[-1]} weights in blocks of {block} cannot be split among ranks at every {size}: "
                f"blocks would shrink to {smaller} weights, and {SHORTEST_REPEATED_BLOCK} is the least. Use fewer ranks "
                "(--tensor-parallel-size), or quantize with a --block-size that divides the part of each rank"
            )
        absmax = weight.absmax.repeat_interleave(block // smaller, dim=-1)
        block, weight = smaller, OctavoTensor(weight.qdata, absmax, weight.code, smaller, weight.dtype)
    qdata = weight.qdata[..., start : start + size]
    absmax = weight.absmax[..., start // block : -(-(start + size) // block)]
    return OctavoTensor(qdata, absmax, weight.code, block, weight.dtype)


def own_copy(weight: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A weight that shares no memory with the file it was read from; floats in `dtype`."""
    if not isinstance(weight, OctavoTensor):
        return torch.empty(weight.shape, dtype=dtype, device=device).copy_(weight)
    qdata, absmax, code = (
        torch.empty(part.shape, dtype=part.dtype, device=device).copy_(part)
        for part in (weight.qdata, weight.absmax, weight.code)
    )
    return OctavoTensor(qdata, absmax, code, weight.block_size, dtype)
