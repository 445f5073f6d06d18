"""What the parts of `benchmarks.gpu` share: timing, random quantized matrices, and a report that survives a time limit.

Times on a GPU are of launches captured in a CUDA graph, over so many copies of the weights that they do not fit the
cache, by device events; the median of the replays is kept. On a CPU (the --tiny rehearsal) they are wall-clock times and
mean nothing.

Example:
    >>> from benchmarks.gpu_common import matrix
    >>> matrix(8, 64, 32, "cpu")[0].shape
    torch.Size([8, 64])
"""

import functools
import json
import statistics
import time
from pathlib import Path

import torch

GIB = 1 << 30


class Report:
    """Rows of results, written to a file as they come, so that what is done is kept when time runs out."""

    def __init__(self, path: str | Path, seconds: float):
        self.path = Path(path)
        self.rows: list[dict] = []
        self.facts: dict[str, object] = {}
        self.end = time.monotonic() + seconds

    def late(self, needed: float = 0.0) -> bool:
        """Whether fewer than `needed` seconds are left."""
        return time.monotonic() + needed > self.end

    def add(self, **row) -> None:
        self.rows.append(row)
        self.write()

    def fact(self, **facts) -> None:
        self.facts.update(facts)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps({"facts": self.facts, "rows": self.rows}))


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measure(calls, device: str, milliseconds: float = 15.0, graph: bool = True) -> float:
    """Microseconds per call: the median over replays of all the calls, one after another."""
    if device == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6
    for call in calls:
        call()
    torch.cuda.synchronize()
    run = _captured(calls) if graph else _in_turn(calls)
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    spent = 0.0
    while len(times) < 5 or (spent < milliseconds and len(times) < 200):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
        spent += times[-1]
    return statistics.median(times) / len(calls) * 1000


def _in_turn(calls):
    def run():
        for call in calls:
            call()

    return run


def _captured(calls):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def copies_for(size: int, device: str) -> int:
    """Copies of a matrix of `size` bytes that together are four times the cache, and at least two."""
    if device == "cpu":
        return 1
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
    return int(min(32, max(2, -(-4 * cache // size))))


@functools.cache
def fitted_code() -> torch.Tensor:
    """A codebook fitted to normal weights: float32 [256]."""
    from octavo import codebook

    generator = torch.Generator().manual_seed(0)
    return codebook.fit(torch.randn(256, 512, generator=generator), 64)


def matrix(rows: int, columns: int, block_size: int, device: str, spread: float = 0.02):
    """A random quantized matrix whose weights have a standard deviation of about `spread`: qdata, absmax, code."""
    code = fitted_code().to(device, copy=True)
    qdata = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device=device)
    blocks = -(-columns // block_size)
    # Every code is as frequent as any other here, so the spread of the weights is that of the table.
    scale = spread / float(code.std())
    absmax = torch.empty((rows, blocks), dtype=torch.float32, device=device).uniform_(
        0.8 * scale, 1.2 * scale
    )
    return qdata, absmax.to(torch.float16), code


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a large copy on the device."""
    size = 1 << (20 if device == "cpu" else 30)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (measure([lambda: target.copy_(source)], device) * 1e-6)


def table(rows: list[dict]) -> str:
    """Rows as aligned text, a column for every key."""
    if not rows:
        return "(nothing)"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(keys)]
    lines = [keys, *cells]
    return "\n".join(
        "  ".join(value.rjust(width) for value, width in zip(line, widths, strict=True)) for line in lines
    )


def _text(value) -> str:
    if isinstance(value, float):
        return (
            f"{value:.2e}"
            if value and abs(value) < 1e-2
            else f"{value:.2f}"
            if abs(value) < 100
            else f"{value:.0f}"
        )
    return str(value)
