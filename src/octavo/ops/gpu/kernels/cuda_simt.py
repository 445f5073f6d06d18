"""Products with few tokens by ordinary multiply-adds: `cuda/linear_simt.cu`, its tilings and its launch.

Example:
    >>> from octavo.ops.gpu.kernels import cuda_simt
    >>> cuda_simt.tiling_for(1, 16384, multiprocessors=132)
    (4, 1)
"""

import functools

from ..cuda_launch import (
    CHECKED_COLUMNS,
    WARPS,
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

# Tokens at most -> (rows per warp, depth), where that leaves each multiprocessor two blocks or more, and where not. Measured on
# an H100 in bfloat16 (part "settings" of benchmarks.gpu), microseconds for 4096 x 4096, 16384 x 4096, 4096 x 16384:
#   1 token: 4 rows, depth 1: 13.4 29.5 40.8; 2 rows, depth 4: 11.7 31.1 32.3.   2 tokens: 15.7 32.4 48.1; 13.9 43.1 41.0
#   8 tokens: 2 rows, depth 1 / 2 / 4: 104 / 95 / 99 for 16384 x 4096
TILINGS = {1: ((4, 1), (2, 4)), 2: ((4, 1), (2, 4)), 4: ((2, 2), (2, 2)), 8: ((2, 2), (2, 2))}
MOST_TOKENS = max(TILINGS)
# One token: `cuda_simt` is ahead of `cuda_mma` for tall matrices, and from this row length on: 32.3 against 35.9 for
# 4096 x 16384, 11.7 against 11.3 for 4096 x 4096. Not for fewer rows than SMALL per multiprocessor.
LONG_ROWS = 8192
SMALL = 16


def tiling_for(tokens: int, rows: int, multiprocessors: int) -> tuple[int, int]:
    """(rows per warp, depth)."""
    tall, low = next(tilings for most, tilings in TILINGS.items() if tokens <= most)
    return tall if is_tall(rows, multiprocessors) else low


@functools.lru_cache(4096)
def compiled(tokens, rows, device, dtype, scales, tiling=None, extra=(), segments=False):
    """The instance for these sizes and types, and the blocks to launch."""
    each, depth = tiling or tiling_for(tokens, rows, multiprocessors(device))
    tokens = next(t for t in TILINGS if t >= tokens)
    parameters = (("TOKENS", tokens), ("ROWS", each), ("DEPTH", depth), *extra)
    types = type_parameters(dtype, scales, segments)
    return prepared("linear_simt", -(-rows // (each * WARPS)), device, types + parameters)


def linear(
    x, qdata, absmax, code, block_size, bias, out, *, tiling=None, grid=None, extra=(), segments=False
) -> None:
    """x [tokens, K] Wᵀ + bias into out [tokens, N], for 1 to 8 tokens of any type.

    Args:
        bias: [N] of x's type, or None.
        tiling, grid: tuning; by default `tiling_for`, and as many blocks as run at once.
        extra: further compile-time parameters, (("COPIES", 8),) for instance.
        segments: the codebook consists of segments and is computed, not looked up.
    """
    sizes = x.shape[0], qdata.shape[0], x.get_device(), x.dtype, absmax.dtype
    kernel, blocks = compiled(*sizes, tiling, tuple(extra), segments)
    launch_product(kernel, grid or blocks, x, qdata, absmax, code, block_size, bias, out)


def _unsupported_reason(call: Call) -> str | None:
    if call.tokens > MOST_TOKENS:
        return f"{call.tokens} tokens are more than {MOST_TOKENS}"
    return unsupported_reason(call)


def _place(call: Call) -> int | None:
    if call.tokens > MOST_TOKENS:
        return None
    long = call.columns >= LONG_ROWS and call.rows >= SMALL * call.multiprocessors
    first = call.tokens == 1 and (long or is_tall(call.rows, call.multiprocessors))
    return 10 if first else 40


def _instance(call: Call) -> Instance:
    tokens = next(most for most in TILINGS if call.tokens <= most)
    tiling = tiling_for(tokens, call.rows, call.multiprocessors)
    run = functools.partial(linear, tiling=tiling, segments=call.segments)
    return Instance(run, CHECKED_COLUMNS, tokens, f"tiling {tiling}", call.segments)


def _segmented(call: Call) -> bool:
    # With more tokens registers bound the blocks either way.
    return call.tokens == 1 and segments_pay(call)


def _bind(call: Call):
    sizes = call.tokens, call.rows, call.device.index, call.dtype, call.scales
    return bind_product(compiled(*sizes, segments=call.segments), call)


KERNEL = Kernel(
    name="cuda_simt",
    operation="linear",
    summary="8 bits de-quantized in registers, ordinary multiply-adds: for float32, and for GPUs before 8.0",
    run=linear,
    unsupported_reason=_unsupported_reason,
    place=_place,
    instance=_instance,
    bind=_bind,
    segmented=_segmented,
)
