"""Which kernel a call gets.

| tokens | float16, bfloat16 | float32 | odd rows or blocks |
| --- | --- | --- | --- |
| 1 | cuda_mma or cuda_simt, by shape (before sm_80: cuda_simt) | cuda_simt | triton_gemv |
| 2 to 8 | cuda_mma (sm_80 and later), else cuda_simt | cuda_simt | triton_gemm |
| 9 to 32 | cuda_mma, else panels | panels | triton_gemm (sm_80 and later) |
| 33 to 512 | cuda_wgmma (sm_90) | | |
| 33 to 64 | cuda_mma, else panels | panels | triton_gemm (sm_80 and later) |
| 65 to 128 | triton_gemm (sm_80 and later), else panels | panels | the same |
| more | panels | panels | panels |

The crossing points are constants below; small matrices have their own. OCTAVO_GPU_LINEAR=cuda_mma (or another
name of `LINEAR`), set before the first product, puts one kernel first wherever it can run. Whatever is chosen
has passed `verify`.

Example:
    >>> from octavo.ops.triton import choose
    >>> choose.candidates(torch.bfloat16, 1, (9, 0))[0]   # doctest: +SKIP
    'cuda_mma'
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

from .. import reference
from . import cuda_kernels, panels, verify, wgmma

VARIABLE = "OCTAVO_GPU_LINEAR"
# The most tokens for which each kernel is tried before the next. Measured on an H100 in bfloat16, microseconds for 4096 x 4096,
# 16384 x 4096 and 1024 x 4096:
#   tokens   cuda_mma         triton_gemm      panels
#       64   20.8 63.7 17.6   24.6 74.1 11.1   27.8 131 12.8
#      128   38.4  129 33.6   30.4 96.8 18.3   32.0 133 13.9
#      512                    95.5  301 30.3   44.7 171 16.9
MMA_TOKENS = 64
SIMT_TOKENS = 8
GEMM_TOKENS = 128
# The same for a matrix with fewer rows than this for each multiprocessor.
SMALL = 16
SMALL_MMA_TOKENS = 32
SMALL_GEMM_TOKENS = 64
# The same for `cuda_wgmma`, which takes over from `cuda_mma` on a GPU that has it, by the number of weights: up to 2^22, 2^24 or
# more. H100, bfloat16, microseconds for 1024 x 4096, 4096 x 4096, 16384 x 4096:
#   tokens   cuda_wgmma        cuda_mma          panels
#       16   9.7 16.6 42.8     9.7 14.1 35.8
#       32   9.8 16.7 42.7    10.7 16.3 41.6
#       48  10.3 17.2 43.1    11.7 20.1 62.8
#      128  13.5 21.7 49.5                       13.3 32.0  133
#      256  18.9 32.0 73.3                       15.2 35.9  136
#      512  24.4 50.8  139                       16.1 42.8  170
#     1024  37.0 74.2  267                       21.6 66.6  264
WGMMA_FROM = 33
WGMMA_TOKENS = ((1 << 22, 128), (1 << 24, 256), (1 << 62, 512))
# The most tokens that a choice is made for; more all go through panels.
MOST_TOKENS = 512
# One token: `cuda_simt` is ahead of `cuda_mma` for tall matrices, and from this row length on: 32.3 against 35.9 for
# 4096 x 16384, 11.7 against 11.3 for 4096 x 4096.
SIMT_COLUMNS = 8192


def have_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; of the CPU, where Triton's interpreter runs, the newest."""
    return capability(device.index) if device.type == "cuda" else (9, 0)


def triton_gemv(*arguments) -> None:
    from . import gemv

    gemv.gemv(*arguments)


def triton_gemm(*arguments) -> None:
    from . import gemm

    gemm.gemm(*arguments)


def panel_product(x, qdata, absmax, code, block_size, bias, out) -> None:
    panels.linear(x, qdata, absmax, code, block_size, bias, out, decode)


# name → run(x [M, K], qdata, absmax, code, block_size, bias of x's type or None, out [M, N])
LINEAR: dict[str, Callable[..., None]] = {
    "cuda_mma": cuda_kernels.linear_mma,
    "cuda_wgmma": wgmma.linear_wgmma,
    "cuda_simt": cuda_kernels.linear_simt,
    "triton_gemv": triton_gemv,
    "triton_gemm": triton_gemm,
    "panels": panel_product,
}


def refusal(name: str, dtype, tokens: int, qdata, absmax, block_size) -> str | None:
    """Why a kernel cannot run a call, or None if it can."""
    device = qdata.device
    if name.startswith("cuda"):
        if device.type != "cuda" or torch.version.hip:
            return "CUDA kernels need an NVIDIA GPU"
        if name == "cuda_mma" and (dtype == torch.float32 or capability(device.index) < (8, 0)):
            return "tensor cores take float16 and bfloat16, from compute capability 8.0 on"
        if name == "cuda_wgmma":
            if dtype == torch.float32 or capability(device.index) != wgmma.CAPABILITY:
                return "wgmma takes float16 and bfloat16, on compute capability 9.0"
            return cuda_kernels.refusal(qdata, absmax, block_size)
        most = cuda_kernels.MMA_MOST_TOKENS if name == "cuda_mma" else cuda_kernels.SIMT_TOKENS
        if tokens > most:
            return f"{tokens} tokens are more than {most}"
        return cuda_kernels.refusal(qdata, absmax, block_size)
    if name == "panels":
        return None
    if not have_triton():
        return "Triton is not installed"
    if device.type == "cuda" and capability(device.index) < (7, 0):
        return "Triton needs compute capability 7.0"
    if device.type != "cuda" and not interpreted():
        return "CPU tensors need TRITON_INTERPRET=1"
    if name == "triton_gemv" and tokens > 1:
        return "triton_gemv takes one token"
    return None


def candidates(
    dtype: torch.dtype,
    tokens: int,
    device_capability: tuple[int, int],
    shape: tuple[int, int] = (4096, 4096),
    multiprocessors: int = 132,
) -> list[str]:
    """Names of the kernels to try, best first; the last, "panels", takes everything.

    Args:
        shape: rows and columns of the matrix.
    """
    rows, columns = shape
    small = rows < SMALL * multiprocessors
    names = []
    most = next(most for weights, most in WGMMA_TOKENS if rows * columns <= weights)
    if device_capability == wgmma.CAPABILITY and dtype != torch.float32 and WGMMA_FROM <= tokens <= most:
        names.append("cuda_wgmma")
    if tokens <= (SMALL_MMA_TOKENS if small else MMA_TOKENS):
        names.append("cuda_mma")
    if tokens <= SIMT_TOKENS:
        simt_first = tokens == 1 and (
            rows >= cuda_kernels.TALL * multiprocessors or (not small and columns >= SIMT_COLUMNS)
        )
        names.insert(0 if simt_first else len(names), "cuda_simt")
    if tokens == 1:
        names.append("triton_gemv")
    # Triton multiplies float32, and anything before sm_80, without tensor cores: then cuBLAS is better.
    gemm = tokens <= (SMALL_GEMM_TOKENS if small else GEMM_TOKENS)
    if gemm and dtype != torch.float32 and device_capability >= (8, 0):
        names.append("triton_gemm")
    names.append("panels")
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in LINEAR:
            raise ValueError(f"{VARIABLE}={forced}: expected one of {', '.join(LINEAR)}")
        names.insert(0, forced)
    return names


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def like(columns: int) -> int:
    """A small row length for which Triton compiles the same instance as for `columns`."""
    for small, factor in ((1024, 512), (1152, 128), (1088, 64), (1040, 16)):
        if columns % factor == 0:
            return small
    return 1037


_chosen: dict[tuple, Callable[..., None]] = {}
# Launches of CUDA kernels with their sizes filled in: a small product takes less time than finding the way to it.
_bound: dict[tuple, Callable[..., None]] = {}


def bound_key(x, qdata, absmax, code, block_size, bias) -> tuple | None:
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
    return x.get_device(), dtype, absmax.dtype, x.numel(), qdata.shape, block_size


def bound_linear(key: tuple) -> Callable[..., None] | None:
    """The launch for a key, as a function of addresses (`cuda_kernels.bind`); None before the kernel is chosen, or if it is
    not one of CUDA's."""
    return _bound.get(key)


def bind_linear(key: tuple, kernel: Callable[..., None]) -> None:
    """Note that `kernel` was chosen for calls with this key."""
    device, dtype, scales, numbers, (rows, columns), block_size = key
    run = cuda_kernels.bind(kernel, numbers // columns, rows, columns, block_size, dtype, scales, device)
    if run is not None:
        _bound[key] = run


def linear_kernel(dtype: torch.dtype, tokens: int, qdata, absmax, block_size) -> Callable[..., None]:
    """The function that computes `linear` for this many tokens of a type with this matrix."""
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
    )
    kernel = _chosen.get(key)
    if kernel is None:
        kernel = _find(dtype, tokens, qdata, absmax, block_size)
        _remember(_chosen, key, kernel, qdata)
    return kernel


def _remember(table: dict, key: tuple, kernel: Callable[..., None], qdata) -> None:
    # A choice made under capture is an emergency and is not remembered.
    if qdata.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        table[key] = kernel


def _find(dtype, tokens, qdata, absmax, block_size) -> Callable[..., None]:
    device = qdata.device
    several = cuda_kernels._multiprocessors(device.index) if device.type == "cuda" else 132
    for name in candidates(dtype, tokens, capability_of(device), tuple(qdata.shape), several):
        why_not = refusal(name, dtype, tokens, qdata, absmax, block_size)
        if why_not:
            if os.environ.get(VARIABLE) == name:
                _warn_once(f"octavo: {VARIABLE}={name} cannot run here: {why_not}")
            continue
        if name == "panels" or _is_trusted(name, dtype, tokens, qdata, absmax, block_size):
            return LINEAR[name]
    raise AssertionError("panels take every call")


def _is_trusted(name, dtype, tokens, qdata, absmax, block_size) -> bool:
    """Check a fused kernel in the instance that this call would run."""
    # The number of tokens that an instance is compiled for; a kernel's own tokens are padded up to it.
    padded = next((t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256) if t >= tokens), 256)
    case = [str(dtype), str(absmax.dtype), f"{padded} tokens", f"block {block_size}"]
    kernel = LINEAR[name]
    if name == "cuda_mma":
        most = min(padded, cuda_kernels.MMA_TOKENS)
        tiling = cuda_kernels.mma_tiling(most, qdata.shape[0], qdata.device.index)
        kernel = functools.partial(kernel, tiling=tiling)
        case.append(f"tiling {tiling}")
    if name == "cuda_wgmma":
        rows, columns = qdata.shape
        tile = wgmma.tiling(tokens)
        several = cuda_kernels._multiprocessors(qdata.device.index)
        # The columns whole, or in parts that are added up.
        splits = min(2, wgmma.splits_for(tokens, rows, columns, tile[0], several))
        kernel = functools.partial(kernel, tile=tile, splits=splits)
        case.append(f"tile {tile}, splits {splits}")
    if name == "cuda_simt":
        rows_and_depth = cuda_kernels.simt_tiling(padded, qdata.shape[0], qdata.device.index)
        kernel = functools.partial(kernel, tiling=rows_and_depth)
        case.append(f"tiling {rows_and_depth}")
    # The CUDA kernels are the same for all; there, a partial last step shows more.
    columns = 1040 if name.startswith("cuda") else like(qdata.shape[1])
    case.append(f"columns {columns}")

    def check() -> str:
        return verify.check_linear(kernel, padded, columns, block_size, dtype, absmax.dtype, qdata.device)

    return verify.trusted(name, qdata.device, tuple(case), check)


_decoders: dict[tuple, Callable[..., None]] = {}


def decode(qdata, absmax, code, block_size, ids, first_column, out) -> None:
    """Rows of the matrix into `out`, contiguous, by the best kernel that can (see `decode.py`)."""
    if out.numel() == 0:
        return
    sizes_fit = out.shape[1] % 16 == 0 and first_column % 16 == 0 and out.data_ptr() % 16 == 0
    key = (
        qdata.get_device(),
        out.dtype,
        absmax.dtype,
        block_size,
        qdata.shape[1],
        sizes_fit and qdata.data_ptr() % 16 == 0,
        qdata.is_contiguous() and absmax.is_contiguous(),
    )
    run = _decoders.get(key)
    if run is None:
        run = _find_decoder(qdata, absmax, block_size, out.dtype, sizes_fit)
        _remember(_decoders, key, run, qdata)
    run(qdata, absmax, code, block_size, ids, first_column, out)


def _find_decoder(qdata, absmax, block_size, dtype, sizes_fit: bool) -> Callable[..., None]:
    device = qdata.device
    on_cuda = device.type == "cuda" and not torch.version.hip
    case = (str(dtype), str(absmax.dtype), f"block {block_size}")
    if on_cuda and sizes_fit and cuda_kernels.refusal(qdata, absmax, block_size) is None:

        def check_cuda() -> str:
            run = cuda_kernels.decode_rows
            return verify.check_decode(run, 1040, block_size, dtype, absmax.dtype, device)

        if verify.trusted("cuda_decode", device, case, check_cuda):
            return cuda_kernels.decode_rows
    if have_triton() and (
        (on_cuda and capability(device.index) >= (7, 0)) or torch.version.hip or interpreted()
    ):
        from . import decode as triton_decode

        columns = like(qdata.shape[1])

        def check_triton() -> str:
            run = triton_decode.decode
            return verify.check_decode(run, columns, block_size, dtype, absmax.dtype, device)

        if verify.trusted("triton_decode", device, (*case, f"columns {columns}"), check_triton):
            return triton_decode.decode
    if device.type != "cuda":
        raise ValueError(
            "octavo.ops.triton: CPU tensors need TRITON_INTERPRET=1, set before Triton is imported"
        )
    return _reference_decode


def _reference_decode(qdata, absmax, code, block_size, ids, first_column, out) -> None:
    if ids is not None:
        qdata, absmax = qdata.index_select(0, ids), absmax.index_select(0, ids)
    dense = reference.dequantize(qdata, absmax, code, block_size, out.dtype)
    out.copy_(dense[:, first_column : first_column + out.shape[1]])
