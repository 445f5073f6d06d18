"""Octavo on a CPU against its peers, side by side in one run.

    python -m benchmarks.cpu kernels                      # one matrix at a time
    python -m benchmarks.cpu models --shape 1b            # whole models; needs 20 GB of disk and memory
    python -m benchmarks.cpu models --shape tiny --rounds 1 --decode 4 --prefill 16

`models` writes a checkpoint of random weights once (--folder), then starts Octavo and one peer after another, each in a process
of its own, and lets Octavo and the peer take turns: the ratio of a round compares two measurements a second apart. Peers that are
not installed are listed and left out. Results go to benchmarks/results/ as JSON and a plot, named after the processor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from . import cpu_kernels
from .cpu_engines import ENGINES, SHAPES
from .cpu_report import RESULTS, bars, file_stem, machine, save, spread, table

NEEDS = {
    "llama.cpp": "llama_cpp",
    "torchao": "torchao",
    "quanto": "optimum",
    "bnb-int8": "bitsandbytes",
    "bnb-published": "bitsandbytes",
}
# The published way takes seconds a token: fewer of them, and a shorter prefill would measure something else.
SLOW = {"bnb-published"}


class Worker:
    """An engine in a process of its own; see `benchmarks.cpu_worker`."""

    def __init__(self, name: str, folder: Path, threads: int):
        self.name = name
        command = [sys.executable, "-m", "benchmarks.cpu_worker", name, str(folder), str(threads)]
        # To a file: a full pipe would stop the worker.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the worker)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.ready = self._answer()["ready"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} ended: {self.errors.read()[-500:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def measure(worker: Worker, what: str, tokens: int) -> float:
    """Tokens a second."""
    return tokens / worker.ask(do=what, tokens=tokens)["seconds"]


def compare(octavo: Worker, name: str, folder: Path, options: argparse.Namespace) -> dict:
    """One peer and Octavo in turns: tokens a second of both in every round."""
    peer = Worker(name, folder, torch.get_num_threads())
    slow = name in SLOW
    try:
        found: dict = {"ready": peer.ready}
        for what, tokens, rounds in (
            ("decode", 4 if slow else options.decode, 2 if slow else options.rounds),
            ("prefill", options.prefill, 1 if slow else max(1, options.rounds // 2)),
        ):
            # Once each unmeasured: compilation, packing, first touches of memory.
            measure(octavo, what, tokens)
            measure(peer, what, tokens)
            pairs = [(measure(octavo, what, tokens), measure(peer, what, tokens)) for _ in range(rounds)]
            found[what] = {"octavo": [a for a, _ in pairs], "peer": [b for _, b in pairs]}
        found["peak_bytes"] = peer.ask(do="memory")["bytes"]
        return found
    finally:
        peer.close()


def run_models(options: argparse.Namespace) -> dict:
    folder = options.folder / options.shape
    _prepare(options.shape, folder)
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
    octavo = Worker("octavo", folder, torch.get_num_threads())
    try:
        result["octavo"] = {"ready": octavo.ready}
        for name in wanted:
            if name in missing:
                continue
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
            try:
                result["peers"][name] = compare(octavo, name, folder, options)
            except RuntimeError as error:
                result["failed"][name] = str(error)
            save(f"models-{options.shape}", result, options.results)
        result["octavo"]["peak_bytes"] = octavo.ask(do="memory")["bytes"]
    finally:
        octavo.close()
    return result


def _prepare(shape: str, folder: Path) -> None:
    """Write the checkpoints in a process of its own, so that its memory is gone afterwards."""
    done = folder / ".done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    code = "import sys; from pathlib import Path; from benchmarks.{0} import {1}; {1}(sys.argv[1], Path(sys.argv[2]))"
    subprocess.run(
        [sys.executable, "-c", code.format("cpu_engines", "prepare"), shape, str(folder)], check=True
    )
    gguf = str(folder / "model.gguf")
    subprocess.run([sys.executable, "-c", code.format("cpu_gguf", "write_gguf"), shape, gguf], check=True)
    done.touch()


def show_models(result: dict) -> None:
    rows, groups = [], {"decode": {}, "prefill": {}}
    own: dict[str, list[float]] = {"decode": [], "prefill": []}
    for name, found in result["peers"].items():
        cells = [name]
        for what in ("decode", "prefill"):
            mine, theirs = found[what]["octavo"], found[what]["peer"]
            own[what] += mine
            ratio = spread([a / b for a, b in zip(mine, theirs, strict=True)])
            groups[what][name] = spread(theirs)["median"]
            cells += [
                f"{spread(theirs)['median']:.2f}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            ]
        rows.append([*cells, f"{found['peak_bytes'] / 2**30:.2f}", f"{found['ready']:.1f}"])
    if not rows:
        return
    for what, values in own.items():
        groups[what]["octavo"] = spread(values)["median"]
    mine = result["octavo"]
    rows.insert(
        0,
        [
            "octavo",
            f"{groups['decode']['octavo']:.2f}",
            "1",
            f"{groups['prefill']['octavo']:.2f}",
            "1",
            f"{mine['peak_bytes'] / 2**30:.2f}",
            f"{mine['ready']:.1f}",
        ],
    )
    shape = next(iter(result["shape"]))
    table(
        f"{shape}, {result['machine']['processor']}, {result['machine']['threads']} threads",
        [
            "",
            "decode tok/s",
            "octavo is faster by",
            "prefill tok/s",
            "octavo is faster by",
            "peak GiB",
            "ready s",
        ],
        rows,
    )
    for name, why in result["failed"].items():
        print(f"failed: {name}: {why}")
    if result["missing"]:
        print("not installed:", ", ".join(result["missing"]))
    bars(f"models-{shape}", groups, "tokens/s", Path(result["folder"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kernels", "models"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=int, default=16384, help="kernels: rows of the matrix")
    parser.add_argument("--columns", type=int, default=4096, help="kernels: columns of the matrix")
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="models: the model's shape")
    parser.add_argument(
        "--engines", nargs="*", choices=list(ENGINES), help="models: which peers; default: all"
    )
    parser.add_argument("--decode", type=int, default=32, help="models: tokens decoded one by one")
    parser.add_argument("--prefill", type=int, default=512, help="models: tokens of a prefill")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/benchmarks"), help="models: where checkpoints go"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.what == "kernels":
        result = {"machine": machine(), **cpu_kernels.run(options.rows, options.columns, options.rounds)}
        print("written to", save("kernels", result, options.results))
        return
    result = run_models(options)
    result["folder"] = str(options.results)
    show_models(result)
    del result["folder"]
    print(
        "written to",
        save(f"models-{options.shape}", result, options.results),
        "and",
        file_stem(f"models-{options.shape}") + ".png",
    )


if __name__ == "__main__":
    main()
