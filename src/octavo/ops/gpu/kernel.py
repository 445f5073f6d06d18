"""What a GPU kernel is to the rest of the program: one record. Each file of `kernels/` ends with its own.

A record answers five questions about a `Call`: can the kernel compute it, when is it tried, which compiled instance would run
and has to be checked first, how is it run, and can its launch be prepared once for all calls of these sizes. The choice
(`choose`), the checks (`verify`), `octavo doctor` and the tables of docs/GPU.md read records and know no kernel by name.

Example:
    >>> import torch
    >>> from octavo.ops.gpu import kernels
    >>> from octavo.ops.gpu.kernel import Call
    >>> call = Call(dtype=torch.float32, rows=4096, columns=4096, tokens=9, device=torch.device("cuda", 0))
    >>> kernels.named()["cuda_simt"].unsupported_reason(call)
    '9 tokens are more than 8'
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .device import capability_of, multiprocessors_of


@dataclass(frozen=True)
class Call:
    """What a choice depends on: a product x Wᵀ, rows of W wanted in floating point, or a W to be quantized.

    Args:
        dtype: of x, of the rows wanted, or of the weight to be quantized.
        rows, columns: shape of W.
        block_size: weights per scale.
        scales: type of absmax.
        device: where all of it is.
        tokens: rows of x.
        aligned: whether what is read and written starts at multiples of 16 bytes.
        contiguous: whether qdata and absmax are.
        segments: whether the codebook consists of segments (`kinds`).
        capability, multiprocessors: of the device.
    """

    dtype: torch.dtype
    rows: int
    columns: int
    device: torch.device
    block_size: int = 64
    scales: torch.dtype = torch.float16
    tokens: int = 1
    aligned: bool = True
    contiguous: bool = True
    segments: bool = False
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132

    @classmethod
    def on(cls, matrix: torch.Tensor, **fields) -> "Call":
        """The call for a matrix [rows, columns], on its device."""
        rows, columns = matrix.shape
        device = matrix.device
        return cls(
            rows=rows,
            columns=columns,
            device=device,
            capability=capability_of(device),
            multiprocessors=multiprocessors_of(device),
            **fields,
        )


@dataclass(frozen=True)
class Instance:
    """The compiled instance that a call would run, in the form in which it is checked.

    Args:
        run: as `Kernel.run`, its tuning fixed: the small matrix of a check would get another.
        columns: row length of the matrix it is checked on.
        tokens: tokens it is compiled for.
        tuning: what else tells instances apart.
        segments: it computes the codebook, and is checked on one of segments.
    """

    run: Any
    columns: int
    tokens: int = 1
    tuning: str = ""
    segments: bool = False


@dataclass(frozen=True)
class Kernel:
    """One GPU kernel.

    Args:
        name: its file's name in `kernels/`; what OCTAVO_GPU_LINEAR takes and `octavo doctor` shows.
        operation: "linear", "decode" or "encode".
        summary: one line for docs/GPU.md: what it is, and what it is for.
        run: linear: run(x [M, K], qdata, absmax, code, block_size, bias of x's type or None, out [M, N]).
            decode: run(qdata, absmax, code, block_size, ids or None, first_column, out).
            encode: an object with `quantize` and `histogram`, as in `reference`.
        unsupported_reason: why it cannot compute a call, or None if it can.
        place: its place among the kernels tried for a call, lower first, or None: it is not tried, since others are faster.
        instance: what is to be checked before a call; None for what is made of PyTorch's own operations.
        bind: the launch for a call's sizes, as a function of the addresses of x, qdata, absmax, code, bias (0: none) and out,
            or None where that takes more than one launch.
        segmented: whether a call with a codebook of segments should be computed from the segments; then `run` takes
            `segments=True`, and `instance` and `bind` go by the call's `segments`. None: it knows only tables.
    """

    name: str
    operation: str
    summary: str
    run: Any
    unsupported_reason: Callable[[Call], str | None]
    place: Callable[[Call], int | None]
    instance: Callable[[Call], Instance] | None = None
    bind: Callable[[Call], Callable[..., None] | None] | None = None
    segmented: Callable[[Call], bool] | None = None

    def variants(self, call: Call) -> list[tuple["Kernel", Call]]:
        """The ways in which it computes a call, best first: from the codebook's segments, and from its table."""
        table = (self, replace(call, segments=False)) if call.segments else (self, call)
        if self.segmented is None or not call.segments or not self.segmented(call):
            return [table]
        bind = self.bind
        segmented = replace(
            self,
            run=functools.partial(self.run, segments=True),
            bind=bind and (lambda call: bind(replace(call, segments=True))),
        )
        return [(segmented, call), table]
