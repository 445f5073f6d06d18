"""One parameter, from float to its quantized parts, as a config asks.

A parameter is a matrix [N, K] or a stack of matrices [..., N, K] (fused experts), each with its own codebook.

Example:
    >>> import torch
    >>> from octavo.config import OctavoConfig
    >>> from octavo.quantizer import quantize_parameter
    >>> quantize_parameter(torch.randn(8, 128), OctavoConfig()).absmax.shape
    torch.Size([8, 2])
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from . import codebook, ops
from .config import OctavoConfig

# Scales of blocks that straddle rows are stored by repeating them for runs of gcd(block, row); below this length the
# repeated scales would cost more than they are worth.
SHORTEST_REPEATED_BLOCK = 32

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Packed(NamedTuple):
    """A quantized parameter: qdata uint8 [..., N, K], absmax [..., N, ceil(K / B)], code float32 [..., 256]."""

    qdata: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    block_size: int


def quantize_parameter(weight: torch.Tensor, config: OctavoConfig, name: str = "weight") -> Packed:
    """Quantize a matrix or a stack of matrices.

    Args:
        weight: float [..., N, K], rows being outputs.
        config: codebook, block size and scales.
        name: the parameter's name, for errors.

    Returns:
        Packed; `block_size` may be smaller than the config's where blocks straddle rows ("dynamic").

    Raises:
        ValueError: if the weight holds NaN or infinity, or is no matrix, naming it.
    """
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point matrix or stack of matrices, found {weight.dtype} of shape {tuple(weight.shape)}"
        )
    # One pass and no copy, which `isfinite` would take; both ends are NaN if any weight is.
    low, high = torch.aminmax(weight.detach()) if weight.numel() else (torch.zeros(()), torch.zeros(()))
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest):
        raise ValueError(
            f"{name} holds NaN or infinity: it cannot be quantized. Check the checkpoint, or leave this parameter in float "
            f"with skip=[{name!r}]"
        )
    lead = weight.shape[:-2]
    matrices = weight.detach().reshape(-1, *weight.shape[-2:])
    scales = scale_dtype(matrices, config)
    if scales == torch.float16 and largest > ops.HALF_LARGEST:
        raise ValueError(
            f"{name} holds weights beyond {ops.HALF_LARGEST:g}, which float16 scales cannot hold: use scales='auto'"
        )
    parts = [_quantize_matrix(matrix, config, scales) for matrix in matrices]
    if not parts:
        raise ValueError(f"{name} is empty: shape {tuple(weight.shape)}")
    if not lead:
        return parts[0]
    qdata, absmax, code = (
        torch.stack(tensors).reshape(*lead, *tensors[0].shape)
        for tensors in zip(*((part.qdata, part.absmax, part.code) for part in parts), strict=True)
    )
    return Packed(qdata, absmax, code, parts[0].block_size)


def scale_dtype(matrices: Iterable[torch.Tensor], config: OctavoConfig) -> torch.dtype:
    """One type of scales for all matrices [N, K] of a parameter; they are looked at only where the config says "auto"."""
    if config.scales != "auto":
        return SCALE_DTYPES[config.scales]
    if config.codebook == "dynamic":
        return torch.float32
    types = {ops.scale_dtype(matrix, config.row_block) for matrix in matrices}
    return torch.float32 if torch.float32 in types else torch.float16


def _quantize_matrix(matrix: torch.Tensor, config: OctavoConfig, scales: torch.dtype) -> Packed:
    block_size = config.row_block
    if config.codebook == "dynamic":
        code = codebook.dynamic().to(matrix.device)
        shared = math.gcd(block_size, matrix.shape[1])
        if matrix.shape[1] % block_size and shared >= SHORTEST_REPEATED_BLOCK:
            return _quantize_flattened(matrix, code, block_size, shared, scales)
    else:
        code = codebook.fit(matrix, block_size, scales)
    qdata, absmax = ops.quantize(matrix, code, block_size, scales)
    return Packed(qdata, absmax, code, block_size)


def _quantize_flattened(
    matrix: torch.Tensor, code: torch.Tensor, block_size: int, shared: int, scales: torch.dtype
) -> Packed:
    """Blocks that run over the flattened matrix, across rows, as bitsandbytes cuts them.

    Stored row by row in blocks of `shared` = gcd(block_size, K), which never straddle a flattened block, each with a copy
    of its scale: exactly the same weights.
    """
    rows, columns = matrix.shape
    flat = matrix.reshape(1, -1)
    qdata, absmax = ops.quantize(flat, code, block_size, scales)
    starts = torch.arange(0, rows * columns, shared, device=matrix.device)
    repeated = absmax[0, starts // block_size].view(rows, columns // shared)
    return Packed(qdata.view(rows, columns), repeated, code, shared)
