"""The CUDA kernels of `cuda/`: which matrices they take, which instance a call needs, and its launch.

Functions here take contiguous tensors on one CUDA device and fill `out`; `refusal` says what they cannot.

Example:
    >>> from octavo.ops.triton import cuda_kernels  # doctest: +SKIP
    >>> cuda_kernels.linear_mma(x, qdata, absmax, code, 64, None, out)  # doctest: +SKIP
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from . import nvrtc

THREADS = 256
WARPS = THREADS // 32
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SOURCES = Path(__file__).parent / "cuda"

# Measured on an H100 in bfloat16 (part "settings" of benchmarks.gpu; microseconds for 4096 x 4096, 16384 x 4096, 4096 x 16384).
# `linear_simt`, tokens at most -> (rows a warp, depth), where that leaves each multiprocessor two blocks or more, and where not.
#   1 token: 4 rows, depth 1: 13.4 29.5 40.8; 2 rows, depth 4: 11.7 31.1 32.3.   2 tokens: 15.7 32.4 48.1; 13.9 43.1 41.0
#   8 tokens: 2 rows, depth 1 / 2 / 4: 104 / 95 / 99 for 16384 x 4096
SIMT_TILINGS = {1: ((4, 1), (2, 4)), 2: ((4, 1), (2, 4)), 4: ((2, 2), (2, 2)), 8: ((2, 2), (2, 2))}
# `linear_mma`, tokens at most -> (16-row tiles a warp, groups of warps with rows of their own, depth), likewise. The second has
# fewer groups if a multiprocessor would get no block.
#   1 token: (2, 1, 2): 13.1 31.0 41.0; (1, 1, 2): 11.3 34.6 35.9        8 tokens: 13.4 33.1 41.8; 11.9 38.1 37.4
#   16: (4, 1, 1): 20.6 35.1 67.9; (1, 2, 2): 14.0 42.6 43.3      32: (2, 2, 1): 26.5 42.2 90.5; (1, 4, 2): 16.5 51.7 50.7
#   64: (4, 2, 1): 54.0 61.7 189; (2, 4, 2): 20.7 63.6 59.7
MMA_TILINGS = {
    8: ((2, 1, 2), (1, 1, 2)),
    16: ((4, 1, 1), (1, 2, 2)),
    32: ((2, 2, 1), (1, 4, 2)),
    64: ((2, 4, 2), (2, 4, 2)),
}
# A matrix is tall if blocks of 32 rows give each multiprocessor two.
TALL = 64
DECODE_DEPTH = 4
# The most tokens an instance exists for, and the most that `linear_mma` takes, reading the matrix once for each 64.
SIMT_TOKENS = max(SIMT_TILINGS)
MMA_TOKENS = max(MMA_TILINGS)
MMA_MOST_TOKENS = 4 * MMA_TOKENS


@functools.cache
def source(name: str) -> str:
    """The CUDA source of one kernel, in one piece."""
    return "".join((SOURCES / f"{part}.cu").read_text() for part in ("common", "stream", name))


@functools.cache
def instance(name: str, device: int, parameters: tuple[tuple[str, int], ...]) -> nvrtc.Kernel:
    """The kernel compiled for one set of parameters and loaded on one device, once a process."""
    return nvrtc.load(source(name), name, tuple(f"-D{key}={value}" for key, value in parameters), device)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def refusal(qdata: torch.Tensor, absmax: torch.Tensor, block_size: int) -> str | None:
    """Why the CUDA kernels cannot read this matrix, or None if they can."""
    if qdata.shape[1] % 16:
        return f"rows of {qdata.shape[1]} are not a multiple of 16"
    if block_size < 16 or block_size & (block_size - 1):
        return f"blocks of {block_size} are not a power of two of at least 16"
    if qdata.data_ptr() % 16:
        return "qdata does not start at a multiple of 16 bytes"
    if not (qdata.is_contiguous() and absmax.is_contiguous()):
        return "qdata or absmax is not contiguous"
    if qdata.numel() == 0:
        return "the matrix is empty"
    return None


@functools.lru_cache(4096)
def _prepared(name: str, tiles: int, device: int, parameters: tuple) -> tuple[nvrtc.Kernel, int]:
    """A kernel, and the blocks to launch: no more than run at once, since each fills a table of 32 KB first and then works
    through its share of tiles."""
    kernel = instance(name, device, parameters)
    return kernel, max(1, min(tiles, kernel.resident_blocks * _multiprocessors(device)))


def _types(dtype: torch.dtype, scales: torch.dtype) -> tuple[tuple[str, int], ...]:
    return (("X_TYPE", TYPES[dtype]), ("SCALE", int(scales == torch.float16)))


def _linear(kernel, grid, x, qdata, absmax, code, block_size, bias, out) -> None:
    if x.data_ptr() % 16:
        x = x.clone()
    rows, columns = qdata.shape
    kernel.launch(
        grid,
        THREADS,
        x,
        qdata,
        absmax,
        code,
        bias,
        out,
        x.shape[0],
        rows,
        columns,
        block_size.bit_length() - 1,
        absmax.shape[1],
    )


def simt_tiling(tokens: int, rows: int, device: int) -> tuple[int, int]:
    """(rows a warp, depth) of `linear_simt`."""
    tall, low = next(tilings for most, tilings in SIMT_TILINGS.items() if tokens <= most)
    return tall if is_tall(rows, device) else low


def is_tall(rows: int, device: int) -> bool:
    """Whether a matrix has rows enough for the taller tilings."""
    return rows >= TALL * _multiprocessors(device)


@functools.lru_cache(4096)
def _simt(tokens, rows, device, dtype, scales, tiling, extra):
    each, depth = tiling or simt_tiling(tokens, rows, device)
    tokens = next(t for t in SIMT_TILINGS if t >= tokens)
    parameters = (("TOKENS", tokens), ("ROWS", each), ("DEPTH", depth), *extra)
    return _prepared("linear_simt", -(-rows // (each * WARPS)), device, _types(dtype, scales) + parameters)


def linear_simt(x, qdata, absmax, code, block_size, bias, out, *, tiling=None, grid=None, extra=()) -> None:
    """x [tokens, K] Wᵀ + bias into out [tokens, N], for 1 to 8 tokens of any type, by ordinary multiply-adds.

    Args:
        bias: [N] of x's type, or None.
        tiling, grid: tuning; by default `simt_tiling`, and as many blocks as run at once.
        extra: further compile-time parameters, (("COPIES", 8),) for instance.
    """
    kernel, blocks = _simt(
        x.shape[0], qdata.shape[0], x.get_device(), x.dtype, absmax.dtype, tiling, tuple(extra)
    )
    _linear(kernel, grid or blocks, x, qdata, absmax, code, block_size, bias, out)


def mma_tiling(tokens: int, rows: int, device: int) -> tuple[int, int, int]:
    """(16-row tiles a warp, groups of warps, depth): more rows a block for more tokens, while each multiprocessor
    still gets a block."""
    tall, low = next(tilings for most, tilings in MMA_TILINGS.items() if tokens <= most)
    m_tiles, groups, depth = tall if is_tall(rows, device) else low
    while groups > 1 and rows < 16 * m_tiles * groups * _multiprocessors(device):
        groups //= 2
    return m_tiles, groups, depth


@functools.lru_cache(4096)
def _mma(tokens, rows, device, dtype, scales, tiling, extra):
    n_tiles = next(n for n in (1, 2, 4, 8) if 8 * n >= tokens)
    m_tiles, groups, depth = tiling or mma_tiling(tokens, rows, device)
    tiles = -(-rows // (16 * m_tiles * groups))
    parameters = (("M_TILES", m_tiles), ("N_TILES", n_tiles), ("WARPS_M", groups), ("DEPTH", depth), *extra)
    return _prepared("linear_mma", tiles, device, _types(dtype, scales) + parameters)


def linear_mma(x, qdata, absmax, code, block_size, bias, out, *, tiling=None, grid=None, extra=()) -> None:
    """The same for 1 to 256 tokens of float16 or bfloat16, on tensor cores (compute capability 8.0 on).

    The matrix is read once for each 64 tokens.

    Args:
        tiling: see `mma_tiling`, which gives the default.
    """
    for start in range(MMA_TOKENS, x.shape[0], MMA_TOKENS):
        part = slice(start, start + MMA_TOKENS)
        linear_mma(
            x[part], qdata, absmax, code, block_size, bias, out[part], tiling=tiling, grid=grid, extra=extra
        )
    if x.shape[0] > MMA_TOKENS:
        x, out = x[:MMA_TOKENS], out[:MMA_TOKENS]
    kernel, blocks = _mma(
        x.shape[0], qdata.shape[0], x.get_device(), x.dtype, absmax.dtype, tiling, tuple(extra)
    )
    _linear(kernel, grid or blocks, x, qdata, absmax, code, block_size, bias, out)


def bind(kernel, tokens, rows, columns, block_size, dtype, scales, device) -> Callable[..., None] | None:
    """`linear_simt` or `linear_mma` for fixed sizes, as a function of the addresses of x, qdata, absmax, code, bias (0: none)
    and out; None for another kernel, or if it takes more than one launch."""
    if kernel is linear_mma and tokens <= MMA_TOKENS:
        compiled, blocks = _mma(tokens, rows, device, dtype, scales, None, ())
    elif kernel is linear_simt:
        compiled, blocks = _simt(tokens, rows, device, dtype, scales, None, ())
    else:
        return None
    sizes = (tokens, rows, columns, block_size.bit_length() - 1, -(-columns // block_size))
    return compiled.bind(blocks, THREADS, 6, sizes)


def decode_rows(
    qdata, absmax, code, block_size, ids, first_column, out, *, depth=DECODE_DEPTH, grid=None, extra=()
) -> None:
    """Rows of the matrix in floating point into out [count, width], from `first_column` on.

    Args:
        ids: int32 or int64 [count], the rows wanted, or None for all. A row that does not exist becomes NaN.
        first_column: a multiple of 16; so is out's width.
        out: contiguous, of the type wanted.
    """
    rows, columns = qdata.shape
    count, width = out.shape
    kernel, blocks = _decode(count, out.get_device(), out.dtype, absmax.dtype, depth, tuple(extra))
    kernel.launch(
        grid or blocks,
        THREADS,
        qdata,
        absmax,
        code,
        ids,
        out,
        int(ids is not None and ids.dtype == torch.int64),
        count,
        rows,
        columns,
        first_column,
        width,
        block_size.bit_length() - 1,
        absmax.shape[1],
    )


@functools.lru_cache(4096)
def _decode(count, device, dtype, scales, depth, extra):
    parameters = (*_types(dtype, scales), ("DEPTH", depth), *extra)
    return _prepared("decode_rows", -(-count // WARPS), device, parameters)
