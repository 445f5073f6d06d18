"""What the kernels in Triton share: de-quantizing a tile, code[q] * absmax for BLOCK_N rows and BLOCK_K columns.

Triton places tables itself, so `cuda/table.cu`'s copy a bank cannot be said here. Three ways can:

    GATHER = False   a load from global memory; the 1 KB table stays in the L1 cache
    GATHER = True    `tl.gather` from a tile of 256 entries, which Triton keeps in shared memory, one copy
    SEGMENTS = True  `tl.gather` from a tile of sixteen lines, each a word, and integer arithmetic as in `cuda/segments.cu`

Example:
    >>> table = load_table(code_ptr, GATHER, SEGMENTS)             # inside a kernel  # doctest: +SKIP
    >>> weight = decode_tile(qdata_ptr, ..., table, n, start, ...)  # doctest: +SKIP
"""

import torch
import triton
import triton.language as tl

from .device import have_triton, interpreted
from .kernel import Call


def unsupported_reason(call: Call) -> str | None:
    """Why Triton's kernels cannot run on a device, or None if they can."""
    if not have_triton():
        return "Triton is not installed"
    if call.device.type == "cuda" and call.capability < (7, 0) and not torch.version.hip:
        return "Triton needs compute capability 7.0"
    if call.device.type != "cuda" and not interpreted():
        return "CPU tensors need TRITON_INTERPRET=1"
    return None


def checked_columns(columns: int) -> int:
    """A small row length for which Triton compiles the same instance as for `columns`."""
    for small, factor in ((1024, 512), (1152, 128), (1088, 64), (1040, 16)):
        if columns % factor == 0:
            return small
    return 1037


@triton.jit
def load_table(code_ptr, GATHER: tl.constexpr, SEGMENTS: tl.constexpr):
    """The table as a tile, for GATHER; its sixteen lines, (base, slope) in 16 bits each, for SEGMENTS; one entry otherwise, so
    that all ways are called alike."""
    if SEGMENTS:
        first = code_ptr + 16 * tl.arange(0, 16)
        base = (tl.load(first) * 16384.0).to(tl.int32)
        slope = (tl.load(first + 1) * 16384.0).to(tl.int32) - base
        table = (base << 16) | slope
    elif GATHER:
        table = tl.load(code_ptr + tl.arange(0, 256))
    else:
        table = tl.load(code_ptr + tl.arange(0, 1))
    return table


@triton.jit
def look_up(q, table, code_ptr, GATHER: tl.constexpr, SEGMENTS: tl.constexpr):
    """code[q]: uint8 of any shape → float32 of that shape."""
    index = q.to(tl.int32)
    if SEGMENTS:
        line = tl.reshape(tl.gather(table, tl.ravel(index >> 4), 0), index.shape)
        entry = (line >> 16) + (line & 0xFFFF) * (index & 15)
        # The bits of 1.5 2^23 + entry: conversion from integers is slower. All of this is exact.
        values = (entry + 0x4B400000).to(tl.float32, bitcast=True) * (1.0 / 16384) - 768.0
    elif GATHER:
        values = tl.reshape(tl.gather(table, tl.ravel(index), 0), index.shape)
    else:
        values = tl.load(code_ptr + index)
    return values


@triton.jit
def decode_tile(
    q_rows,
    absmax_rows,
    code_ptr,
    table,
    start,
    columns,
    blocks,
    BLOCK_SIZE: tl.constexpr,
    GATHER: tl.constexpr,
    SEGMENTS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights of BLOCK_N rows and of columns start ... start + BLOCK_K - 1: float32, 0 beyond the last column.

    Args:
        q_rows, absmax_rows: pointers to the start of each row, [BLOCK_N, 1]; all of them exist.
        start: a multiple of BLOCK_K.
        EVEN: the row length is a multiple of BLOCK_K, so that nothing needs a mask.

    Where tile and block divide each other, each scale is loaded once a row, not once a weight.
    """
    k = start + tl.arange(0, BLOCK_K)
    valid = (k < columns)[None, :]
    if EVEN:
        q = tl.load(q_rows + k[None, :])
    else:
        q = tl.load(q_rows + k[None, :], mask=valid, other=0)
    values = look_up(q, table, code_ptr, GATHER, SEGMENTS)
    if BLOCK_SIZE % BLOCK_K == 0:
        weight = values * tl.load(absmax_rows + start // BLOCK_SIZE).to(tl.float32)
    elif BLOCK_K % BLOCK_SIZE == 0:
        run: tl.constexpr = BLOCK_K // BLOCK_SIZE
        block = start // BLOCK_SIZE + tl.arange(0, run)
        if EVEN:
            scale = tl.load(absmax_rows + block[None, :])
        else:
            scale = tl.load(absmax_rows + block[None, :], mask=(block < blocks)[None, :], other=0.0)
        weight = tl.reshape(values, [BLOCK_N, run, BLOCK_SIZE]) * scale.to(tl.float32)[:, :, None]
        weight = tl.reshape(weight, [BLOCK_N, BLOCK_K])
    else:
        scale = tl.load(absmax_rows + (k // BLOCK_SIZE)[None, :], mask=valid, other=0.0)
        weight = values * scale.to(tl.float32)
    if not EVEN:
        # Beyond the last column the index read as 0 stands for code[0]; the products there must be 0.
        weight = tl.where(valid, weight, 0.0)
    return weight
