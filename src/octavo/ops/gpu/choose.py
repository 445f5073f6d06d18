"""Which kernel a call gets: the first of those tried that can compute it and passed its check (`verify`).

When a kernel is tried is said in its own record; docs/GPU.md has the table that follows from them. OCTAVO_GPU_LINEAR=cuda_mma
(or another name), set before the first product, puts one kernel first wherever it can run.

Example:
    >>> import torch
    >>> from octavo.ops.gpu import choose
    >>> from octavo.ops.gpu.kernel import Call
    >>> call = Call(dtype=torch.bfloat16, rows=4096, columns=4096, device=torch.device("cuda", 0))
    >>> [kernel.name for kernel in choose.tried("linear", call)][:2]
    ['cuda_mma', 'cuda_simt']
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable

import torch

from . import kernels, verify
from .device import interpreted
from .kernel import Call, Kernel

VARIABLE = "OCTAVO_GPU_LINEAR"
# The most tokens that a choice is made for; more all go the way of the last.
MOST_TOKENS = 512


def tried(operation: str, call: Call) -> list[Kernel]:
    """The kernels to try, best first.

    Raises:
        ValueError: if OCTAVO_GPU_LINEAR names no kernel for products.
    """
    known = kernels.named()
    of_operation = [kernel for kernel in known.values() if kernel.operation == operation]
    placed = [(kernel.place(call), kernel) for kernel in of_operation]
    ordered = sorted(((place, kernel.name) for place, kernel in placed if place is not None))
    found = [known[name] for _, name in ordered]
    forced = os.environ.get(VARIABLE)
    if forced and operation == "linear":
        if forced in kernels.files() and forced not in known:
            _warn_once(f"octavo: {VARIABLE}={forced} cannot run here: Triton is not installed")
        elif forced not in (names := sorted(kernel.name for kernel in of_operation)):
            raise ValueError(f"{VARIABLE}={forced}: expected one of {', '.join(names)}")
        else:
            found.insert(0, known[forced])
    return found


def chosen(operation: str, call: Call) -> Kernel:
    """The first kernel that can compute a call and agrees with the reference."""
    for kernel in tried(operation, call):
        why_not = kernel.unsupported_reason(call)
        if why_not:
            if os.environ.get(VARIABLE) == kernel.name:
                _warn_once(f"octavo: {VARIABLE}={kernel.name} cannot run here: {why_not}")
        else:
            for variant, its_call in kernel.variants(call):
                if verify.trusted(variant, its_call):
                    return variant
    raise AssertionError(f"no kernel takes every call of {operation}")


def ranges(call_for: Callable[[int], Kernel], tokens: Iterable[int]) -> list[tuple[str, int, int]]:
    """(kernel, first, last number of tokens) for ascending numbers of tokens."""
    found: list[tuple[str, int, int]] = []
    for count in tokens:
        name = call_for(count).name
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], count)
        else:
            found.append((name, found[-1][2] + 1 if found else 1, count))
    return found


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


_products: dict[tuple, Kernel] = {}
_decoders: dict[tuple, Kernel] = {}
# Launches with their sizes filled in: a small product takes less time than finding the way to it.
_bound: dict[tuple, Callable[..., None]] = {}


def bound_key(x, qdata, absmax, code, block_size, bias, segments: bool) -> tuple | None:
    """What the launch of `linear` depends on but for addresses, for tensors that CUDA kernels can take as they are."""
    dtype = x.dtype
    if (
        (x.data_ptr() | qdata.data_ptr()) & 15
        or not (
            x.is_contiguous() and qdata.is_contiguous() and absmax.is_contiguous() and code.is_contiguous()
        )
        or (bias is not None and (bias.dtype != dtype or not bias.is_contiguous()))
    ):
        return None
    return x.get_device(), dtype, absmax.dtype, x.numel(), qdata.shape, block_size, segments


def bound_linear(key: tuple) -> Callable[..., None] | None:
    """The launch for a key, as a function of addresses (`Kernel.bind`); None before the kernel is chosen, or if it has none."""
    return _bound.get(key)


def bind_linear(key: tuple, kernel: Kernel, tokens: int, qdata, absmax) -> None:
    """Note that `kernel` was chosen for calls with this key."""
    if kernel.bind is not None:
        run = kernel.bind(product(key[1], tokens, qdata, absmax, key[5]))
        if run is not None:
            _bound[key] = run


def product(dtype: torch.dtype, tokens: int, qdata, absmax, block_size: int, segments: bool = False) -> Call:
    """The call that x [tokens, K] of a type makes with a matrix."""
    return Call.on(
        qdata,
        dtype=dtype,
        tokens=tokens,
        block_size=block_size,
        scales=absmax.dtype,
        aligned=qdata.data_ptr() % 16 == 0,
        contiguous=qdata.is_contiguous() and absmax.is_contiguous(),
        segments=segments,
    )


def linear_kernel(
    dtype: torch.dtype, tokens: int, qdata, absmax, block_size: int, segments: bool = False
) -> Kernel:
    """The kernel that computes `linear` for this many tokens of a type with this matrix."""
    # The tiling depends on the rows, the compiled instance on what the row length is a multiple of.
    key = (
        qdata.get_device(),
        dtype,
        absmax.dtype,
        min(tokens, MOST_TOKENS + 1),
        block_size,
        qdata.shape,
        qdata.data_ptr() % 16,
        qdata.is_contiguous() and absmax.is_contiguous(),
        segments,
    )
    kernel = _products.get(key)
    if kernel is None:
        kernel = chosen("linear", product(dtype, tokens, qdata, absmax, block_size, segments))
        _remember(_products, key, kernel, qdata)
    return kernel


def decode(qdata, absmax, code, block_size, ids, first_column, out, segments: bool = False) -> None:
    """Rows of the matrix into `out`, contiguous, by the best kernel that can (`Kernel.run` of decode)."""
    if out.numel() == 0:
        return
    aligned = (qdata.data_ptr() | out.data_ptr() | out.shape[1] | first_column) % 16 == 0
    contiguous = qdata.is_contiguous() and absmax.is_contiguous()
    key = (
        qdata.get_device(),
        out.dtype,
        absmax.dtype,
        block_size,
        qdata.shape[1],
        aligned,
        contiguous,
        segments,
    )
    kernel = _decoders.get(key)
    if kernel is None:
        if not qdata.is_cuda and not interpreted():
            raise ValueError(
                "octavo.ops.gpu: CPU tensors need TRITON_INTERPRET=1, set before Triton is imported"
            )
        call = Call.on(
            qdata,
            dtype=out.dtype,
            block_size=block_size,
            scales=absmax.dtype,
            aligned=aligned,
            contiguous=contiguous,
            segments=segments,
        )
        kernel = chosen("decode", call)
        _remember(_decoders, key, kernel, qdata)
    kernel.run(qdata, absmax, code, block_size, ids, first_column, out)


def encoder(weight, block_size: int, absmax_dtype: torch.dtype):
    """What quantizes a weight [N, K], with `quantize` and `histogram` as in `reference`."""
    call = Call.on(weight, dtype=weight.dtype, block_size=block_size, scales=absmax_dtype)
    return chosen("encode", call).run


def _remember(table: dict, key: tuple, kernel: Kernel, qdata) -> None:
    # A choice made under capture is an emergency and is not remembered.
    if not qdata.is_cuda or not torch.cuda.is_current_stream_capturing():
        table[key] = kernel
