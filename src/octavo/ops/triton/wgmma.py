"""`linear` for some ten to some hundred tokens on Hopper (compute capability 9.0): `cuda/linear_wgmma.cu` and its launches.

Three kernels: the input is put into the order of the decoded columns; the product; and, where the columns were split to give
each multiprocessor work, the sum of the parts.

Example:
    >>> from octavo.ops.triton import wgmma  # doctest: +SKIP
    >>> wgmma.linear_wgmma(x, qdata, absmax, code, 64, None, out)  # doctest: +SKIP
"""

import functools

import torch

from . import nvrtc
from .cuda_kernels import SOURCES, THREADS, WARPS, _multiprocessors, _types

CAPABILITY = (9, 0)
ROWS = 128
COLUMNS = 64
# Tokens at most -> (tokens a block, depth, stages, groups). Measured on an H100 in bfloat16, microseconds for 4096 x 4096,
# 16384 x 4096, 4096 x 16384; depth 2 and more stages are within 2 % of these:
#    64 tokens: two groups 17.7 43.9 46.4; one (depth 4) 19.4 54.2 55.4
#   128 tokens: two groups 21.7 49.5 54.5; one (depth 2) 22.3 57.6 62.8
#   256 tokens: one group of 256 32.0 73.3 84.7; two of 128 tokens 32.4 89.5 96.1
TILINGS = {64: (64, 1, 4, 2), 128: (128, 1, 4, 2), 256: (256, 2, 3, 1)}
# A share of the columns is at least this many steps of 64.
LEAST_STEPS = 4


@functools.cache
def source() -> str:
    """The CUDA source of the three kernels, in one piece."""
    parts = ("common", "stream", "wgmma", "linear_wgmma")
    return "".join((SOURCES / f"{part}.cu").read_text() for part in parts)


@functools.lru_cache(1024)
def _instance(name, device, dtype, scales, tile, depth, stages, groups) -> nvrtc.Kernel:
    parameters = (*_types(dtype, scales), ("TOKENS", tile), ("DEPTH", depth), ("STAGES", stages))
    parameters += (("GROUPS", groups), ("WARPS", groups * WARPS))
    # Rows of 128 bytes for each stage and token, from a multiple of 1024 on.
    shared = groups * stages * tile * 128 + 1024 if name == "linear_wgmma" else 0
    defines = tuple(f"-D{key}={value}" for key, value in parameters)
    return nvrtc.load(source(), name, defines, device, specific=True, shared=shared)


def tiling(tokens: int) -> tuple[int, int, int, int]:
    """(tokens a block, depth, stages, groups) for a number of tokens."""
    return next((found for most, found in TILINGS.items() if tokens <= most), TILINGS[max(TILINGS)])


def splits_for(tokens: int, rows: int, columns: int, tile: int, multiprocessors: int) -> int:
    """Shares of the columns, so that every multiprocessor has a block."""
    tiles = -(-tokens // tile) * -(-rows // ROWS)
    return max(1, min(multiprocessors // tiles, -(-columns // COLUMNS) // LEAST_STEPS))


def linear_wgmma(x, qdata, absmax, code, block_size, bias, out, *, tile=None, splits=None) -> None:
    """x [tokens, K] Wᵀ + bias into out [tokens, N], for float16 and bfloat16, on Hopper's tensor cores; any number of tokens.

    Args:
        bias: [N] of x's type, or None.
        tile, splits: tuning; see `tiling` and `splits_for`.
    """
    if x.data_ptr() % 16:
        x = x.clone()
    tokens, (rows, columns) = x.shape[0], qdata.shape
    size, depth, stages, groups = tile or tiling(tokens)
    device = x.get_device()
    which = (device, x.dtype, absmax.dtype, size, depth, stages, groups)
    threads = groups * THREADS
    steps, token_tiles, row_tiles = -(-columns // COLUMNS), -(-tokens // size), -(-rows // ROWS)
    splits = splits or splits_for(tokens, rows, columns, size, _multiprocessors(device))
    padded = token_tiles * size
    permuted = torch.empty((padded, steps * COLUMNS), dtype=x.dtype, device=x.device)
    _instance("permute_x", *which).launch(
        -(-padded * steps // (groups * WARPS)), threads, x, permuted, tokens, columns, padded, steps
    )
    parts = None
    if splits > 1:
        parts = torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    _instance("linear_wgmma", *which).launch(
        token_tiles * row_tiles * splits,
        threads,
        permuted,
        qdata,
        absmax,
        code,
        bias,
        out,
        parts,
        tokens,
        rows,
        columns,
        block_size.bit_length() - 1,
        absmax.shape[1],
        splits,
    )
    if parts is not None:
        blocks = min(-(-tokens * rows // threads), 8 * _multiprocessors(device))
        _instance("add_parts", *which).launch(blocks, threads, parts, bias, out, splits, tokens, rows)
