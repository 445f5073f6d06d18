"""`linear` for some ten to some hundred tokens on Hopper (compute capability 9.0): `cuda/linear_wgmma.cu` and its launches.

Three kernels: the input is put into the order of the decoded columns; the product; and, where the columns were split (split-K)
to give each multiprocessor work, the sum of the partial products.

Example:
    >>> from octavo.ops.gpu.kernels import cuda_wgmma
    >>> cuda_wgmma.splits_for(64, 4096, 4096, 64, multiprocessors=132)
    4
"""

import functools

import torch

from .. import nvrtc
from ..cuda_launch import (
    CHECKED_COLUMNS,
    COMMON,
    THREADS,
    WARPS,
    segments_pay,
    source,
    type_parameters,
    unsupported_reason,
)
from ..device import multiprocessors
from ..kernel import Call, Instance, Kernel

SOURCE = (*COMMON, "wgmma", "linear_wgmma")
CAPABILITY = (9, 0)
ROWS = 128
COLUMNS = 64
# Tokens at most -> (tokens per block, depth, stages, groups). Measured on an H100 in bfloat16, microseconds for 4096 x 4096,
# 16384 x 4096, 4096 x 16384; depth 2 and more stages are within 2 % of these:
#    64 tokens: two groups 17.7 43.9 46.4; one (depth 4) 19.4 54.2 55.4
#   128 tokens: two groups 21.7 49.5 54.5; one (depth 2) 22.3 57.6 62.8
#   256 tokens: one group of 256 32.0 73.3 84.7; two of 128 tokens 32.4 89.5 96.1
TILINGS = {64: (64, 1, 4, 2), 128: (128, 1, 4, 2), 256: (256, 2, 3, 1)}
# A split of the columns is at least this many steps of 64.
LEAST_STEPS = 4
# It takes over from `cuda_mma` at this many tokens, and gives way to `panels` beyond so many for up to 2^22, 2^24 or more
# weights. H100, bfloat16, microseconds for 1024 x 4096, 4096 x 4096, 16384 x 4096:
#   tokens   cuda_wgmma        cuda_mma          panels
#       16   9.7 16.6 42.8     9.7 14.1 35.8
#       32   9.8 16.7 42.7    10.7 16.3 41.6
#       48  10.3 17.2 43.1    11.7 20.1 62.8
#      128  13.5 21.7 49.5                       13.3 32.0  133
#      256  18.9 32.0 73.3                       15.2 35.9  136
#      512  24.4 50.8  139                       16.1 42.8  170
#     1024  37.0 74.2  267                       21.6 66.6  264
FROM_TOKENS = 33
UP_TO_TOKENS = ((1 << 22, 128), (1 << 24, 256), (1 << 62, 512))


@functools.lru_cache(1024)
def _compiled(name, device, dtype, scales, segments, tile, depth, stages, groups) -> nvrtc.Compiled:
    parameters = (
        *type_parameters(dtype, scales, segments),
        ("TOKENS", tile),
        ("DEPTH", depth),
        ("STAGES", stages),
    )
    parameters += (("GROUPS", groups), ("WARPS", groups * WARPS))
    shared = dynamic_shared(tile, stages, groups) if name == "linear_wgmma" else 0
    defines = tuple(f"-D{key}={value}" for key, value in parameters)
    return nvrtc.load(source(*SOURCE), name, defines, device, specific=True, shared=shared)


def dynamic_shared(tile: int, stages: int, groups: int) -> int:
    """Bytes of shared memory for tiles of the input: rows of 128 bytes for each stage and token, from a multiple of 1024 on."""
    return groups * stages * tile * 128 + 1024


def tiling_for(tokens: int) -> tuple[int, int, int, int]:
    """(tokens per block, depth, stages, groups) for a number of tokens."""
    return next((found for most, found in TILINGS.items() if tokens <= most), TILINGS[max(TILINGS)])


def splits_for(tokens: int, rows: int, columns: int, tile: int, multiprocessors: int) -> int:
    """Splits of the columns, so that every multiprocessor has a block."""
    tiles = -(-tokens // tile) * -(-rows // ROWS)
    return max(1, min(multiprocessors // tiles, -(-columns // COLUMNS) // LEAST_STEPS))


def linear(x, qdata, absmax, code, block_size, bias, out, *, tile=None, splits=None, segments=False) -> None:
    """x [tokens, K] Wᵀ + bias into out [tokens, N], for float16 and bfloat16, on Hopper's tensor cores; any number of tokens.

    Args:
        bias: [N] of x's type, or None.
        tile, splits: tuning; see `tiling_for` and `splits_for`.
        segments: the codebook consists of segments and is computed, not looked up.
    """
    if x.data_ptr() % 16:
        x = x.clone()
    tokens, (rows, columns) = x.shape[0], qdata.shape
    size, depth, stages, groups = tile or tiling_for(tokens)
    device = x.get_device()
    which = (device, x.dtype, absmax.dtype, segments, size, depth, stages, groups)
    threads = groups * THREADS
    steps, token_tiles, row_tiles = -(-columns // COLUMNS), -(-tokens // size), -(-rows // ROWS)
    splits = splits or splits_for(tokens, rows, columns, size, multiprocessors(device))
    padded = token_tiles * size
    permuted = torch.empty((padded, steps * COLUMNS), dtype=x.dtype, device=x.device)
    _compiled("permute_x", *which).launch(
        -(-padded * steps // (groups * WARPS)), threads, x, permuted, tokens, columns, padded, steps
    )
    partial = None
    if splits > 1:
        partial = torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    _compiled("linear_wgmma", *which).launch(
        token_tiles * row_tiles * splits,
        threads,
        permuted,
        qdata,
        absmax,
        code,
        bias,
        out,
        partial,
        tokens,
        rows,
        columns,
        block_size.bit_length() - 1,
        absmax.shape[1],
        splits,
    )
    if partial is not None:
        blocks = min(-(-tokens * rows // threads), 8 * multiprocessors(device))
        _compiled("add_parts", *which).launch(blocks, threads, partial, bias, out, splits, tokens, rows)


def _unsupported_reason(call: Call) -> str | None:
    if call.dtype == torch.float32 or call.capability != CAPABILITY:
        return unsupported_reason(call) or "wgmma takes float16 and bfloat16, on compute capability 9.0"
    return unsupported_reason(call)


def _place(call: Call) -> int | None:
    most = next(tokens for weights, tokens in UP_TO_TOKENS if call.rows * call.columns <= weights)
    fits = call.capability == CAPABILITY and call.dtype != torch.float32
    return 20 if fits and FROM_TOKENS <= call.tokens <= most else None


def _instance(call: Call) -> Instance:
    tile = tiling_for(call.tokens)
    tokens = next((t for t in (1, 2, 4, 8, 16, 32, 64, 128) if t >= call.tokens), 256)
    # The columns whole, or split and added up.
    splits = min(2, splits_for(call.tokens, call.rows, call.columns, tile[0], call.multiprocessors))
    run = functools.partial(linear, tile=tile, splits=splits, segments=call.segments)
    return Instance(run, CHECKED_COLUMNS, tokens, f"tile {tile}, splits {splits}", call.segments)


KERNEL = Kernel(
    name="cuda_wgmma",
    operation="linear",
    summary="33 to some hundred tokens with Hopper's own tensor-core instruction, which reads the input from shared memory",
    run=linear,
    unsupported_reason=_unsupported_reason,
    place=_place,
    instance=_instance,
    segmented=segments_pay,
)
