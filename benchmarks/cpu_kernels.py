"""Octavo's CPU operations against PyTorch's and the published way, one matrix at a time, in alternation.

    python -m benchmarks.cpu kernels

Every function runs once a round; the table gives the median over rounds, and the spread of its ratio to Octavo's in the same
round. The matrices (64 M weights by default) are larger than the caches, and before each call other memory is read, so that
each call reads its own from memory, as a model does.

Example:
    >>> from benchmarks.cpu_kernels import alternate
    >>> len(alternate({"nothing": lambda: None}, rounds=3)["nothing"])
    3
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from octavo import codebook, ops
from octavo.ops import cpu

from .cpu_report import spread, table

BLOCK, PUBLISHED_BLOCK = 64, 4096
# Bytes to read through so that nothing else is left in the caches.
CACHES = 128 << 20
# Numbers of tokens. Products of many take a second; their medians need no more rounds than that allows.
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 96, 512)
MANY_TOKENS = 32


def alternate(
    functions: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each function in each round, `before` called ahead of each; every function runs once before, unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            before()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _published(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """bitsandbytes' block-wise functions: de-quantize whole, then multiply."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    packed, state = functional.quantize_blockwise(weight.float().reshape(-1), blocksize=4096)
    shape = weight.shape
    return lambda x: F.linear(x, functional.dequantize_blockwise(packed, state).to(x.dtype).view(shape))


def linear(rows: int, columns: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict:
    """One product: seconds of every way, and the bandwidth of the memory in the same rounds."""
    weight = torch.randn(rows, columns) * 0.02
    code = codebook.fit(weight, BLOCK, torch.float16)
    qdata, absmax = ops.quantize(weight, code, BLOCK, torch.float16)
    dense = weight.to(dtype)
    x = torch.randn(tokens, columns).to(dtype)
    threads = torch.get_num_threads()
    stored = qdata.numel() + 2 * absmax.numel()
    functions: dict[str, Callable[[], object]] = {
        "octavo": lambda: cpu.linear_fast(x, qdata, absmax, code, BLOCK),
        "read": lambda: cpu.native.library.read_through(qdata.data_ptr(), qdata.numel(), threads),
        f"torch {str(dtype)[6:]}": lambda: F.linear(x, dense),
    }
    if dtype != torch.float32:
        # Where a processor has no instructions for 16 bits, float32 is what a user has instead.
        wide, wide_x = weight.clone(), x.float()
        functions["torch float32"] = lambda: F.linear(wide_x, wide)
    if dtype == torch.bfloat16 and tokens == 1:
        columnwise = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        scales = torch.rand(rows).to(dtype)
        functions["torch int8pack"] = lambda: torch._weight_int8pack_mm(x, columnwise, scales)
    if tokens in (1, 512):
        # The published format, whose codebook is a table, by Octavo's kernels and as it was computed before.
        dynamic = codebook.dynamic()
        table_qdata, table_absmax = ops.quantize(weight, dynamic, PUBLISHED_BLOCK)
        functions["octavo, published format"] = lambda: cpu.linear_fast(
            x, table_qdata, table_absmax, dynamic, PUBLISHED_BLOCK
        )
        published = _published(weight)
        if published is not None and tokens == 1:
            functions["published way"] = lambda: published(x)
    del weight
    # What a call left in the caches must not help the next: "read" follows "octavo" on the same matrix.
    other = torch.ones(CACHES, dtype=torch.uint8)
    return {
        "rows": rows,
        "columns": columns,
        "tokens": tokens,
        "dtype": str(dtype)[6:],
        "bytes": stored,
        "weights": qdata.numel(),
        "seconds": alternate(functions, rounds, lambda: other.sum(dtype=torch.int64)),
    }


def conversion(rows: int, columns: int, dtype: torch.dtype, rounds: int) -> dict:
    """Fitting a codebook and quantizing a matrix in memory."""
    weight = (torch.randn(rows, columns) * 0.02).to(dtype)
    code = codebook.fit(weight, BLOCK)
    packed = ops.quantize(weight, code, BLOCK)
    functions = {
        "fit": lambda: codebook.fit(weight, BLOCK),
        "quantize": lambda: ops.quantize(weight, code, BLOCK),
        "dequantize": lambda: ops.dequantize(*packed, code, BLOCK, dtype),
    }
    seconds = alternate(functions, rounds)
    seconds["fit and quantize"] = [a + b for a, b in zip(seconds["fit"], seconds["quantize"], strict=True)]
    return {
        "rows": rows,
        "columns": columns,
        "dtype": str(dtype)[6:],
        "weights": rows * columns,
        "seconds": seconds,
    }


def run(rows: int, columns: int, rounds: int, counts: tuple[int, ...] = TOKENS) -> dict:
    """All kernel measurements; prints tables as it goes."""
    products = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for tokens in counts:
            found = linear(
                rows, columns, tokens, dtype, rounds if tokens < MANY_TOKENS else max(3, rounds // 4)
            )
            products.append(found)
            show_linear(found)
    conversions = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = conversion(rows, columns, dtype, rounds)
        conversions.append(found)
        show_conversion(found)
    return {"linear": products, "conversion": conversions}


def show_linear(found: dict) -> None:
    seconds = found["seconds"]
    rows = []
    for name, values in seconds.items():
        ratio = spread([v / o for v, o in zip(values, seconds["octavo"], strict=True)])
        count = found["weights"]
        rows.append(
            [
                name,
                f"{spread(values)['median'] * 1e3:.2f}",
                f"{count / spread(values)['median'] / 1e9:.1f}",
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            ]
        )
    share = spread(
        [
            r / o * found["bytes"] / found["weights"]
            for r, o in zip(seconds["read"], seconds["octavo"], strict=True)
        ]
    )
    table(
        f"{found['rows']} x {found['columns']}, {found['tokens']} token(s), {found['dtype']}, block {BLOCK}: octavo reads at "
        f"{share['median']:.0%} of the memory's bandwidth",
        ["", "ms", "G weights/s", "times octavo", "spread"],
        rows,
    )


def show_conversion(found: dict) -> None:
    rows = []
    for name, values in found["seconds"].items():
        rate = spread([found["weights"] / v / 1e6 for v in values])
        rows.append([name, f"{rate['median']:.0f}", f"{rate['low']:.0f} to {rate['high']:.0f}"])
    table(
        f"{found['rows']} x {found['columns']} of {found['dtype']}, in memory",
        ["", "M weights/s", "spread"],
        rows,
    )
