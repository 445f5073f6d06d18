"""One token through one matrix: weights per second, against the memory's bandwidth and PyTorch's own products.

A token of a language model costs one read of every weight, so what a product can reach is set by the memory. Each function here
goes through STREAM_BYTES of weights, as many copies of the matrix as that takes, so that they come from memory and not from a
cache, as they do in a model larger than the caches.

Example:
    >>> from octavo.bench.kernels import linear
    >>> found = linear(512, 512, "cpu", rounds=2, stream_bytes=1 << 20)
    >>> found["weights_per_second"]["octavo"]["median"] > 0
    True
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from .. import codebook
from ..ops import blocks_per_row
from ..ops.cpu import native
from ..quantizer import Packed
from ..tensor import OctavoTensor
from .timing import alternate, ratios, spread

# Bytes that one measurement goes through, by device: several times the caches, within a fraction of the memory.
STREAM_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
# Matrices to measure where no model tells: the projections of a model of 6 billion parameters, and of one of 1 billion.
SHAPES = ((16384, 4096), (4096, 4096), (2048, 2048))
BLOCK = 64


def reading(device: torch.device, stream_bytes: int) -> Callable[[], object]:
    """A function that reads `stream_bytes` of memory once: by the native kernels on a CPU, else as a sum in PyTorch."""
    memory = torch.ones(stream_bytes // 8, dtype=torch.int64, device=device)
    if device.type == "cpu" and native.AVAILABLE:
        return lambda: native.library.read_through(memory.data_ptr(), stream_bytes, torch.get_num_threads())
    return memory.sum


@cache
def _code(kind: str) -> torch.Tensor:
    """A codebook of a kind: "segments" as `octavo quantize` fits them, or a "table" (the published one)."""
    if kind == "table":
        return codebook.dynamic()
    return codebook.fit(torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)), BLOCK)


def kind_of(code: torch.Tensor) -> str:
    """Which way kernels take with a codebook: "segments" are computed, a "table" of free entries is looked up."""
    return "table" if codebook.segments(code) is None else "segments"


def random_weight(
    rows: int, columns: int, block_size: int, device: torch.device, kind: str = "segments"
) -> OctavoTensor:
    """A quantized matrix of random bytes: the speed of a product depends on the kind of its codebook, not on them."""
    qdata = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device=device)
    absmax = torch.full((rows, blocks_per_row(columns, block_size)), 0.02, dtype=torch.float16, device=device)
    return OctavoTensor.from_packed(Packed(qdata, absmax, _code(kind).to(device), block_size), torch.float32)


def _products(matrices: list[torch.Tensor], x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        for matrix in matrices:
            F.linear(x, matrix)

    return run


@torch.inference_mode()
def linear(
    rows: int,
    columns: int,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    peers: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
    block_size: int = BLOCK,
    kind: str = "segments",
    rounds: int = 20,
    seconds: float = float("inf"),
    stream_bytes: int | None = None,
) -> dict:
    """Octavo's product of one token and a [rows, columns] matrix, PyTorch's, and reading the memory, in turns.

    Args:
        dtype: of Octavo's input and output.
        peers: types of PyTorch's products.
        kind: of the codebook; see `kind_of`.
        rounds, seconds: how often, and for how long at most; see `alternate`.
        stream_bytes: what each function goes through in a round. Default: STREAM_BYTES.

    Returns:
        rows, columns, dtype, block_size, codebook (its kind), bytes (stored, of one matrix), rounds;
        `weights_per_second`: name → median, low, high, for "octavo" and each peer; `faster_by`: the same of Octavo's speed over
        each peer's; `bandwidth`: bytes per second that the memory delivered; `share`: of it that Octavo's kernels read.
    """
    device = torch.device(device)
    stream_bytes = stream_bytes or STREAM_BYTES.get(device.type, STREAM_BYTES["cpu"])
    weight = random_weight(rows, columns, block_size, device, kind)
    stored = weight.nbytes_stored
    x = torch.randn(1, columns, device=device)
    copies = {"octavo": math.ceil(stream_bytes / stored)}
    own = [weight, *(weight.clone() for _ in range(copies["octavo"] - 1))]
    functions = {"read": reading(device, stream_bytes), "octavo": _products(own, x.to(dtype))}
    dense = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    for peer in peers:
        name = str(peer).removeprefix("torch.")
        copies[name] = math.ceil(stream_bytes / (rows * columns * peer.itemsize))
        functions[name] = _products([dense.to(peer) for _ in range(copies[name])], x.to(peer))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = alternate(functions, rounds, seconds=seconds, synchronize=synchronize)
    # Seconds a matrix, and a byte of memory.
    each = {name: [s / copies[name] for s in found[name]] for name in copies}
    read = [s / stream_bytes for s in found["read"]]
    return {
        "rows": rows,
        "columns": columns,
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": block_size,
        "codebook": kind,
        "bytes": stored,
        "rounds": len(read),
        "weights_per_second": {
            name: spread([rows * columns / s for s in values]) for name, values in each.items()
        },
        "faster_by": {name: ratios(each[name], each["octavo"]) for name in each if name != "octavo"},
        "bandwidth": spread([1 / s for s in read]),
        "share": ratios([s * stored for s in read], each["octavo"]),
    }
