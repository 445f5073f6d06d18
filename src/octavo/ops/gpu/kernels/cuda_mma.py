"""Products with up to some sixty tokens on tensor cores: `cuda/linear_mma.cu`, its tilings and its launch.

Example:
    >>> from octavo.ops.gpu.kernels import cuda_mma
    >>> cuda_mma.tiling_for(8, 16384, multiprocessors=132)
    (2, 1, 2)
"""

import functools

import torch

from ..cuda_launch import (
    CHECKED_COLUMNS,
    bind_product,
    is_tall,
    launch_product,
    prepared,
    segments_pay,
    type_parameters,
    unsupported_reason,
)
from ..device import multiprocessors
from ..kernel import Call, Instance, Kernel

# From here on for float16; bfloat16 needs the second.
CAPABILITY = (7, 5)
BFLOAT16_CAPABILITY = (8, 0)
# Tokens at most -> (16-row tiles per warp, groups of warps with rows of their own, depth), where that leaves each multiprocessor
# two blocks or more, and where not. The second has fewer groups if a multiprocessor would get no block. Measured on an H100 in
# bfloat16 (part "settings" of benchmarks.gpu), microseconds for 4096 x 4096, 16384 x 4096, 4096 x 16384:
#   1 token: (2, 1, 2): 13.1 31.0 41.0; (1, 1, 2): 11.3 34.6 35.9        8 tokens: 13.4 33.1 41.8; 11.9 38.1 37.4
#   16: (4, 1, 1): 20.6 35.1 67.9; (1, 2, 2): 14.0 42.6 43.3      32: (2, 2, 1): 26.5 42.2 90.5; (1, 4, 2): 16.5 51.7 50.7
#   64: (4, 2, 1): 54.0 61.7 189; (2, 4, 2): 20.7 63.6 59.7
TILINGS = {
    8: ((2, 1, 2), (1, 1, 2)),
    16: ((4, 1, 1), (1, 2, 2)),
    32: ((2, 2, 1), (1, 4, 2)),
    64: ((2, 4, 2), (2, 4, 2)),
}
# The most tokens an instance exists for, and the most the kernel takes, reading the matrix once for each 64.
TOKENS = max(TILINGS)
MOST_TOKENS = 4 * TOKENS
# The most tokens for which it is tried before the next. H100, bfloat16, microseconds for 4096 x 4096, 16384 x 4096, 1024 x 4096:
#   tokens   cuda_mma         triton_gemm      panels
#       64   20.8 63.7 17.6   24.6 74.1 11.1   27.8 131 12.8
#      128   38.4  129 33.6   30.4 96.8 18.3   32.0 133 13.9
FIRST_UP_TO = 64
# The same for a matrix with fewer rows than SMALL per multiprocessor.
SMALL = 16
SMALL_FIRST_UP_TO = 32


def tiling_for(tokens: int, rows: int, multiprocessors: int) -> tuple[int, int, int]:
    """(16-row tiles per warp, groups of warps, depth): more rows per block for more tokens, while each multiprocessor
    still gets a block."""
    tall, low = next(tilings for most, tilings in TILINGS.items() if tokens <= most)
    m_tiles, groups, depth = tall if is_tall(rows, multiprocessors) else low
    while groups > 1 and rows < 16 * m_tiles * groups * multiprocessors:
        groups //= 2
    return m_tiles, groups, depth


@functools.lru_cache(4096)
def compiled(tokens, rows, device, dtype, scales, tiling=None, extra=(), segments=False):
    """The instance for these sizes and types, and the blocks to launch."""
    n_tiles = next(n for n in (1, 2, 4, 8) if 8 * n >= tokens)
    m_tiles, groups, depth = tiling or tiling_for(tokens, rows, multiprocessors(device))
    tiles = -(-rows // (16 * m_tiles * groups))
    parameters = (("M_TILES", m_tiles), ("N_TILES", n_tiles), ("WARPS_M", groups), ("DEPTH", depth), *extra)
    return prepared("linear_mma", tiles, device, type_parameters(dtype, scales, segments) + parameters)


def linear(
    x, qdata, absmax, code, block_size, bias, out, *, tiling=None, grid=None, extra=(), segments=False
) -> None:
    """x [tokens, K] Wᵀ + bias into out [tokens, N], for 1 to 256 tokens of float16 or bfloat16.

    The matrix is read once for each 64 tokens.

    Args:
        bias: [N] of x's type, or None.
        tiling, grid: tuning; by default `tiling_for`, and as many blocks as run at once.
        extra: further compile-time parameters, (("COPIES", 8),) for instance.
        segments: the codebook consists of segments and is computed, not looked up.
    """
    for start in range(0, x.shape[0], TOKENS):
        part = x[start : start + TOKENS]
        sizes = part.shape[0], qdata.shape[0], x.get_device(), x.dtype, absmax.dtype
        kernel, blocks = compiled(*sizes, tiling, tuple(extra), segments)
        rows = out[start : start + TOKENS]
        launch_product(kernel, grid or blocks, part, qdata, absmax, code, block_size, bias, rows)


def _unsupported_reason(call: Call) -> str | None:
    least = BFLOAT16_CAPABILITY if call.dtype == torch.bfloat16 else CAPABILITY
    if call.dtype == torch.float32 or call.capability < least:
        return unsupported_reason(call) or (
            "tensor cores take float16 from compute capability 7.5 on, and bfloat16 from 8.0 on"
        )
    if call.tokens > MOST_TOKENS:
        return f"{call.tokens} tokens are more than {MOST_TOKENS}"
    return unsupported_reason(call)


def _place(call: Call) -> int | None:
    small = call.rows < SMALL * call.multiprocessors
    return 30 if call.tokens <= (SMALL_FIRST_UP_TO if small else FIRST_UP_TO) else None


def _instance(call: Call) -> Instance:
    # The matrix of a check is small: with the call's own tiling, and as many tokens as that instance takes.
    tokens = next((t for t in (1, 2, 4, 8, 16, 32, 64, 128) if t >= call.tokens), MOST_TOKENS)
    tiling = tiling_for(min(tokens, TOKENS), call.rows, call.multiprocessors)
    run = functools.partial(linear, tiling=tiling, segments=call.segments)
    return Instance(run, CHECKED_COLUMNS, tokens, f"tiling {tiling}", call.segments)


def _segmented(call: Call) -> bool:
    # One block fits with a table on 7.5, two with segments; from 8.0 on registers bound the blocks of tall tilings either way.
    return call.capability < BFLOAT16_CAPABILITY and segments_pay(call)


def _bind(call: Call):
    if call.tokens > TOKENS:
        return None
    sizes = call.tokens, call.rows, call.device.index, call.dtype, call.scales
    return bind_product(compiled(*sizes, segments=call.segments), call)


KERNEL = Kernel(
    name="cuda_mma",
    operation="linear",
    summary="8 bits go straight into tensor-core instructions, de-quantized in registers; one token costs what eight cost",
    run=linear,
    unsupported_reason=_unsupported_reason,
    place=_place,
    instance=_instance,
    bind=_bind,
    segmented=_segmented,
)
