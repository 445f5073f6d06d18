"""No kernel is trusted unseen: before its first use, each is checked against the reference.

That happens once a process, device and case. A kernel that fails to compile or disagrees is left out with a
warning that names it, and the next one is taken. What was found is kept in `verdicts`, for `octavo doctor`.

Example:
    >>> from octavo.ops.gpu import verify
    >>> verify.verdicts()
    {}
"""

import threading
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import reference
from ..schema import blocks_per_row
from .kernel import Call, Kernel

# A fused product rounds in another order than cuBLAS; a wrong index gives errors near 1.
ERROR_MARGIN = 1.5
FLOAT32_ERROR = 1e-5
ROWS = 70

_verdicts: dict[tuple, tuple[bool, str]] = {}
_lock = threading.RLock()


class Disagreement(RuntimeError):
    """A kernel's result is not the reference's."""


def verdicts() -> dict[str, tuple[bool, str]]:
    """What was found so far: "kernel, device, case" → (trusted, reason)."""
    return {", ".join(str(part) for part in key): verdict for key, verdict in _verdicts.items()}


def trusted(kernel: Kernel, call: Call) -> bool:
    """Whether the instance of a kernel that a call would run agrees with the reference; checked when first asked.

    On the CPU, in Triton's interpreter, everything is trusted: that is what the tests check.
    """
    if call.device.type != "cuda" or kernel.instance is None:
        return True
    instance = kernel.instance(call)
    numbers = f"{instance.tokens} tokens" if kernel.operation == "linear" else ""
    kind = "segments" if instance.segments else ""
    parts = (str(call.dtype), str(call.scales), numbers, f"block {call.block_size}", instance.tuning, kind)
    key = (kernel.name, str(call.device), *filter(None, parts), f"columns {instance.columns}")
    found = _verdicts.get(key)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            warnings.warn(
                f"octavo: kernel {kernel.name} meets {key[2:]} for the first time while a CUDA graph is captured, "
                "where it cannot be checked; a slower one is captured. Run the model once before capturing it",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        types = (call.block_size, call.dtype, call.scales, call.device)

        def check() -> str:
            if kernel.operation == "linear":
                return check_linear(
                    instance.run, instance.tokens, instance.columns, *types, instance.segments
                )
            if kernel.operation == "decode":
                return check_decode(instance.run, instance.columns, *types, instance.segments)
            return check_encode(instance.run, instance.columns, *types)

        with _lock:
            found = _verdicts.get(key) or _check(key, check)
    return found[0]


def _check(key: tuple, check: Callable[[], str]) -> tuple[bool, str]:
    try:
        with torch.no_grad():
            found = (True, check())
    # Whatever a compiler, a driver or a kernel raises: the next kernel is tried, and this one named.
    except Exception as failure:
        found = (False, f"{type(failure).__name__}: {failure}")
        warnings.warn(
            f"octavo: GPU kernel {key[0]} is not used for {key[1:]}: {found[1]}. A slower one takes its "
            "place; please report this with the output of `octavo doctor`",
            RuntimeWarning,
            stacklevel=3,
        )
    _verdicts[key] = found
    return found


def sample(columns: int, block_size: int, scales: torch.dtype, device: torch.device, segments: bool = False):
    """A small random matrix: qdata, absmax, code, of segments or not. The user's random numbers stay as they are."""
    generator = torch.Generator().manual_seed(0)
    qdata = torch.randint(0, 256, (ROWS, columns), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(ROWS, blocks_per_row(columns, block_size), generator=generator) + 0.5
    code = torch.randn(256, generator=generator).sort().values
    code = code / code.abs().max()
    if segments:
        # Lines of the finest grid and any slope up to the steepest that lets sixteen of them fill [-1, 1].
        slopes = torch.randint(0, 128, (16, 1), generator=generator)
        rising = slopes * torch.arange(16) + 16 * (slopes.cumsum(0) - slopes)
        code = ((rising.reshape(256) - 16384) / 16384).to(torch.float32)
    return qdata.to(device), absmax.to(scales).to(device), code.to(device)


def check_linear(
    run: Callable, tokens: int, columns: int, block_size, dtype, scales, device, segments=False
) -> str:
    """Compare run(x, qdata, absmax, code, block_size, bias, out) with float64 and PyTorch's own error."""
    qdata, absmax, code = sample(columns, block_size, scales, device, segments)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator).to(dtype).to(device)
    bias = torch.randn(ROWS, generator=generator).to(dtype).to(device)
    weight = reference.dequantize(qdata, absmax, code, block_size, torch.float32)
    exact = F.linear(x.double(), weight.double(), bias.double())
    out = torch.full((tokens, ROWS), float("nan"), dtype=dtype, device=device)
    run(x, qdata, absmax, code, block_size, bias, out)
    error = relative_error(out, exact)
    naive = relative_error(F.linear(x, weight.to(dtype), bias), exact)
    limit = FLOAT32_ERROR if dtype == torch.float32 else ERROR_MARGIN * naive
    if not error <= limit:
        raise Disagreement(f"error {error:.2e} for {tokens} tokens, expected at most {limit:.2e}")
    return f"error {error:.1e} (PyTorch's own {naive:.1e})"


def check_decode(run: Callable, columns: int, block_size, dtype, scales, device, segments=False) -> str:
    """Compare run(qdata, absmax, code, block_size, ids, first_column, out) with the reference, bitwise."""
    qdata, absmax, code = sample(columns, block_size, scales, device, segments)
    expected = reference.dequantize(qdata, absmax, code, block_size, dtype)
    ids = torch.tensor([3, ROWS - 1, 0, 3], device=device)
    for rows, first, width in ((None, 0, columns), (ids, 0, columns), (None, 512, 512)):
        wanted = expected if rows is None else expected[rows]
        wanted = wanted[:, first : first + width]
        out = torch.full(wanted.shape, float("nan"), dtype=dtype, device=device)
        run(qdata, absmax, code, block_size, rows, first, out)
        if not torch.equal(out, wanted):
            raise Disagreement(f"{int((out != wanted).sum())} of {wanted.numel()} weights differ")
    return "bit for bit"


def check_encode(encoder, columns: int, block_size, dtype, scales, device) -> str:
    """Compare encoder.quantize and encoder.histogram with the reference, byte for byte."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(ROWS, columns, generator=generator).to(dtype).to(device)
    weight[3, :100] = 0.0
    code = sample(16, 16, scales, device)[2]
    for found, wanted in zip(
        (
            *encoder.quantize(weight, code, block_size, scales),
            encoder.histogram(weight, block_size, 8193, scales),
        ),
        (
            *reference.quantize(weight, code, block_size, scales),
            reference.histogram(weight, block_size, 8193, scales),
        ),
        strict=True,
    ):
        if not torch.equal(found, wanted):
            raise Disagreement(f"{int((found != wanted).sum())} of {wanted.numel()} values differ")
    return "byte for byte"


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖; NaN counts as infinitely wrong."""
    error = ((found.double() - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")
