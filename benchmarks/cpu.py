"""Octavo on a CPU against its peers, side by side in one run.

    python -m benchmarks.cpu kernels                      # one matrix at a time
    python -m benchmarks.cpu models --shape 1b            # whole models; needs 20 GB of disk and memory
    python -m benchmarks.cpu models --shape smollm2-135m
    python -m benchmarks.cpu models --shape tiny --rounds 1 --decode 4 --prefill 16

`models` writes a checkpoint of random weights once (--folder), then starts Octavo and one peer after another, each in a process
of its own, and lets Octavo and the peer take turns: the ratio of a round compares two measurements a second apart. Rounds that
other work disturbed are repeated, up to twice as many in all, and marked. Peers that are not installed are listed and left out.
Results go to benchmarks/results/ as JSON and a plot, named after the processor; docs/BENCHMARKS.md tells how to read them.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from octavo.bench.kernels import reading
from octavo.bench.process import Worker
from octavo.bench.turns import take_turns

from . import cpu_kernels, page_cache
from .cpu_engines import ENGINES, SHAPES
from .cpu_report import RESULTS, file_stem, machine, save, show_models

NEEDS = {
    "llama.cpp": "llama_cpp",
    "torchao": "torchao",
    "quanto": "optimum",
    "bnb-int8": "bitsandbytes",
    "bnb-published": "bitsandbytes",
}
# The published way takes seconds a token: fewer of them, and a shorter prefill would measure something else.
SLOW = {"bnb-published"}
# What is read before each turn to see whether the memory is disturbed; several times the caches of a small server's share.
READ_BYTES = 128 << 20
# Side of the float32 matrices that are multiplied for the clock; three of them stay in a core's cache.
MATMUL = 256


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text}")
    return int(text)


def start(name: str, folder: Path) -> Worker:
    """An engine of `benchmarks.cpu_engines` in a process of its own, its files laid out in the page cache as for any other."""
    page_cache.in_huge_pages(files_of(name, folder))
    return Worker("benchmarks.cpu_engines:make", torch.get_num_threads(), name=name, folder=str(folder))


def files_of(name: str, folder: Path) -> list[Path]:
    """What an engine reads."""
    if name == "llama.cpp":
        return [folder / "model.gguf"]
    return sorted((folder / ("octavo" if name.startswith("octavo") else "dense")).iterdir())


def probes() -> dict[str, Callable[[], float]]:
    """What the machine delivers at the moment: bytes a second from memory, float32 operations a second in the caches."""
    read = reading(torch.device("cpu"), READ_BYTES)
    a, b = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)

    def multiply() -> None:
        for _ in range(50):
            a @ b

    def rate(run: Callable[[], object], amount: float) -> float:
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - started)
        return amount / best

    return {
        "bandwidth": lambda: rate(read, READ_BYTES),
        "compute": lambda: rate(multiply, 50 * 2 * MATMUL**3),
    }


def compare(octavo: Worker, name: str, folder: Path, options: argparse.Namespace) -> dict:
    """One peer and Octavo in turns: what `take_turns` gives for decoding and prefill, and the peer's memory."""
    slow = name in SLOW
    with start(name, folder) as peer:
        found: dict = {"ready": peer.ready}
        for what, tokens, rounds in (
            ("decode", 4 if slow else options.decode, 2 if slow else options.rounds),
            ("prefill", options.prefill, 1 if slow else options.rounds),
        ):
            workers = {"octavo": octavo, "peer": peer}
            found[what] = take_turns(
                workers, what, tokens, rounds, extra=0 if slow else rounds, probes=options.probes
            )
        found["peak_bytes"] = peer.ask("peak_memory")
        found["pages"] = peer.ask("page_kinds")
        return found


def run_models(options: argparse.Namespace) -> dict:
    folder = prepared(options.shape, options.folder)
    options.probes = probes()
    wanted = [name for name in options.engines or ENGINES if name != "octavo"]
    missing = [name for name in wanted if name in NEEDS and find_spec(NEEDS[name]) is None]
    result: dict = {
        "machine": machine(),
        "shape": {options.shape: SHAPES[options.shape]},
        "decode_tokens": options.decode,
        "prefill_tokens": options.prefill,
        "missing": missing,
        "failed": {},
        "peers": {},
    }
    with start("octavo", folder) as octavo:
        result["octavo"] = {"ready": octavo.ready}
        for name in wanted:
            if name in missing:
                continue
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
            try:
                result["peers"][name] = compare(octavo, name, folder, options)
            except (RuntimeError, ValueError, OSError, ImportError) as error:
                result["failed"][name] = str(error)
            save(f"models-{options.shape}", result, options.results)
        result["octavo"]["peak_bytes"] = octavo.ask("peak_memory")
        result["octavo"]["pages"] = octavo.ask("page_kinds")
    return result


def prepared(shape: str, folder: Path) -> Path:
    """Where the checkpoints of a shape are; written once, in a process of its own, so that its memory is gone afterwards."""
    folder = folder / shape
    done = folder / ".done"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    code = "import sys; from pathlib import Path; from benchmarks.{0} import {1}; {1}(sys.argv[1], Path(sys.argv[2]))"
    subprocess.run(
        [sys.executable, "-c", code.format("cpu_engines", "prepare"), shape, str(folder)], check=True
    )
    gguf = str(folder / "model.gguf")
    subprocess.run([sys.executable, "-c", code.format("cpu_gguf", "write_gguf"), shape, gguf], check=True)
    done.touch()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kernels", "models"])
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument(
        "--rounds", type=positive, default=6, help="measurements of each, in turns; default: %(default)s"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder for the JSON and the plot, which replace those of the same processor and shape; default: benchmarks/results",
    )
    parser.add_argument(
        "--rows", type=positive, default=16384, help="kernels: rows of the matrix; default: %(default)s"
    )
    parser.add_argument(
        "--columns", type=positive, default=4096, help="kernels: columns of the matrix; default: %(default)s"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        nargs="+",
        default=cpu_kernels.TOKENS,
        help="kernels: how many tokens at a time; default: " + " ".join(map(str, cpu_kernels.TOKENS)),
    )
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="1b", help="models: the model's shape; default: %(default)s"
    )
    parser.add_argument(
        "--engines", nargs="*", choices=list(ENGINES), help="models: which peers; default: all"
    )
    parser.add_argument(
        "--decode", type=positive, default=32, help="models: tokens decoded one by one; default: %(default)s"
    )
    parser.add_argument(
        "--prefill", type=positive, default=512, help="models: tokens of a prefill; default: %(default)s"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("build/benchmarks"), help="models: where checkpoints go"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.what == "kernels":
        found = machine()
        kernels, load = found["kernels"]["active"], found["load_before"]
        print(
            f"{found['processor']}, {options.threads} threads, {kernels} kernels, load before {load['load_average']:.1f}"
        )
        result = {
            "machine": found,
            **cpu_kernels.run(options.rows, options.columns, options.rounds, options.tokens),
        }
        print("written to", save("kernels", result, options.results))
        return
    result = run_models(options)
    kind = f"models-{options.shape}"
    show_models(result, options.results)
    print("written to", save(kind, result, options.results), "and", file_stem(kind) + ".png")


if __name__ == "__main__":
    main()
