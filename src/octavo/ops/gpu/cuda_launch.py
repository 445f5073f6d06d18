"""What the CUDA kernels share: their source, the matrices they can read, and their launch.

Functions here take contiguous tensors on one CUDA device and fill `out`.

Example:
    >>> from octavo.ops.gpu import cuda_launch
    >>> "linear_simt" in cuda_launch.source(*cuda_launch.COMMON, "linear_simt")
    True
"""

import functools
from pathlib import Path

import torch

from ..schema import DTYPE_CODES
from . import nvrtc
from .device import multiprocessors
from .kernel import Call

THREADS = 256
WARPS = THREADS // 32
SOURCES = Path(__file__).parent / "cuda"
# Computing a codebook of segments takes 1.4 instructions per weight more than looking it up (2 where rows are written, 5 on 6.0,
# which has no dp2a), and no room, where a table takes 32 KB of shared memory per block. So it may pay where a multiprocessor has
# 100 KB at most and instructions are not the bound: on 6.0 they are, on 8.0 and 9.0 registers bound the blocks, and 9.0 was
# measured with tables. Counted, not measured (benchmarks/gpu_code.py): one token of cuda_simt fits 2 to 3 blocks with a table
# and 4 to 5 with segments, cuda_decode 2 to 3 and 4 to 6.
SHARED_IS_SCARCE = {(6, 1), (7, 0), (7, 5), (8, 6), (8, 9), (12, 0)}
# What every kernel's source starts with.
COMMON = ("common", "table", "segments", "stream")
# A matrix is tall if blocks of 32 rows give each multiprocessor two.
TALL = 64
# Row length of the matrix that CUDA kernels are checked on: instances are the same for all, and a partial last step shows more.
CHECKED_COLUMNS = 1040


@functools.cache
def source(*parts: str) -> str:
    """CUDA source: files of `cuda/`, in one piece."""
    return "".join((SOURCES / f"{part}.cu").read_text() for part in parts)


@functools.cache
def instance(name: str, device: int, parameters: tuple[tuple[str, int], ...]) -> nvrtc.Compiled:
    """The kernel compiled for one set of parameters and loaded on one device, once per process."""
    defines = tuple(f"-D{key}={value}" for key, value in parameters)
    return nvrtc.load(source(*COMMON, name), name, defines, device)


def unsupported_reason(call: Call) -> str | None:
    """Why the CUDA kernels cannot read this matrix, or None if they can."""
    if call.device.type != "cuda" or torch.version.hip:
        return "CUDA kernels need an NVIDIA GPU"
    if call.columns % 16:
        return f"rows of {call.columns} are not a multiple of 16"
    if call.block_size < 16 or call.block_size & (call.block_size - 1):
        return f"blocks of {call.block_size} are not a power of two of at least 16"
    if not call.aligned:
        return "qdata does not start at a multiple of 16 bytes"
    if not call.contiguous:
        return "qdata or absmax is not contiguous"
    if call.rows == 0 or call.columns == 0:
        return "the matrix is empty"
    return None


@functools.lru_cache(4096)
def prepared(name: str, tiles: int, device: int, parameters: tuple) -> tuple[nvrtc.Compiled, int]:
    """A kernel, and the blocks to launch: no more than run at once, since each fills its table first (32 KB, or the lines of
    segments) and then works through its tiles."""
    kernel = instance(name, device, parameters)
    return kernel, max(1, min(tiles, kernel.resident_blocks * multiprocessors(device)))


def type_parameters(dtype: torch.dtype, scales: torch.dtype, segments: bool) -> tuple[tuple[str, int], ...]:
    """The compile-time parameters that say the types of x (or of the rows wanted) and of absmax, and the kind of codebook."""
    types = (("X_TYPE", DTYPE_CODES[dtype]), ("SCALE", int(scales == torch.float16)))
    return (*types, ("SEGMENTS", 1)) if segments else types


def segments_pay(call: Call) -> bool:
    """Whether a kernel of which more blocks fit without a table should compute a codebook of segments."""
    return call.capability in SHARED_IS_SCARCE


def is_tall(rows: int, multiprocessors: int) -> bool:
    """Whether a matrix has rows enough for the taller tilings."""
    return rows >= TALL * multiprocessors


def launch_product(kernel, grid, x, qdata, absmax, code, block_size, bias, out) -> None:
    """Queue `linear_simt` or `linear_mma`."""
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


def bind_product(prepared_kernel, call: Call):
    """The same for fixed sizes, as a function of the addresses of x, qdata, absmax, code, bias (0: none) and out."""
    compiled, blocks = prepared_kernel
    shift = call.block_size.bit_length() - 1
    sizes = (call.tokens, call.rows, call.columns, shift, -(-call.columns // call.block_size))
    return compiled.bind(blocks, THREADS, 6, sizes)
