"""A forward pass beside busy processes: Octavo's time over that of the float32 model, on the same number of threads.

    python -m benchmarks.neighbours                    # none, one and two busy processes per core, then eight
    python -m benchmarks.neighbours --busy 0 2 --tokens 96

A product that waits for a thread which the system has not begun yet costs a time slice, not microseconds. Each engine has a
process of its own; they take turns, and a round's ratio compares two passes a moment apart. Uses the checkpoints of
`benchmarks.cpu models`, which writes them once. Written to benchmarks/results/cpu-neighbours-SHAPE-PROCESSOR.json.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from octavo.bench.timing import ratios, spread
from octavo.bench.turns import take_turns

from .cpu import positive, prepared, start
from .cpu_engines import SHAPES
from .cpu_report import RESULTS, machine, save, spread_text, table

ENGINES = {"octavo": "octavo-f32", "plain": "transformers-f32"}
# Where every slice of time is fought for, so many tokens are enough to see it.
CROWD, CROWD_TOKENS = 8, 96


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(folder: Path, busy: list[int], tokens: list[int], rounds: int) -> list[dict]:
    """One row for each number of busy processes and of tokens."""
    found = []
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(start(engine, folder)) for name, engine in ENGINES.items()}
        for count in busy:
            for n in tokens if count < CROWD else [CROWD_TOKENS]:
                with neighbours(count):
                    speeds = take_turns(workers, "prefill", n, rounds)
                row = {"busy": count, "tokens": n}
                row |= {f"{name}_s": spread([n / speed for speed in speeds[name]]) for name in ENGINES}
                # Speeds the other way round are times.
                row["ratio"] = ratios(speeds["plain"], speeds["octavo"])
                print(f"{count} busy, {n} tokens: {row['ratio']}", file=sys.stderr, flush=True)
                found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = psutil.cpu_count(logical=False) or 1
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1, 96, 512], help="default: 1 96 512")
    parser.add_argument(
        "--busy",
        type=int,
        nargs="+",
        default=[0, cores, 2 * cores, CROWD],
        help=f"numbers of busy processes; from {CROWD} on with {CROWD_TOKENS} tokens only; default: %(default)s",
    )
    parser.add_argument("--rounds", type=positive, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmarks"), help="where checkpoints go")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"machine": machine(), "shape": {options.shape: SHAPES[options.shape]}, "rounds": options.rounds}
    result["rows"] = measure(
        prepared(options.shape, options.folder), options.busy, options.tokens, options.rounds
    )
    table(
        f"a forward pass of {options.shape} on {options.threads} threads",
        ["busy processes", "tokens", "octavo, s", "float32, s", "octavo / float32"],
        [
            [
                str(row["busy"]),
                str(row["tokens"]),
                *(f"{row[name]['median']:.3f}" for name in ("octavo_s", "plain_s")),
                spread_text(row["ratio"], ".2f"),
            ]
            for row in result["rows"]
        ],
    )
    print("written to", save(f"neighbours-{options.shape}", result, options.results))


if __name__ == "__main__":
    main()
