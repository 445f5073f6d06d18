"""`octavo quantize` on a large float16 checkpoint: time, memory, and what the disk alone would take.

    python -m benchmarks.conversion                      # 12 GB, GPT-J-6B's shape: needs 24 GB of disk
    python -m benchmarks.conversion --gigabytes 1
    python -m benchmarks.conversion --shape tiny --gigabytes 0.01 --rounds 1    # to try the benchmark

Writes a sharded safetensors checkpoint of random normal weights, layers of `--shape` until it has the size, and converts it
by the command itself in a process of its own: once with the files dropped from the page cache, once with as much of them
there as fits. A plain copy of the same files is timed beside each. Before that, fitting and quantizing in memory, on one
thread and on all. What it wrote is deleted in the end; results go to benchmarks/results/.

Example:
    >>> from benchmarks.conversion import layers_for
    >>> layers_for("gptj-6b", 12.0)
    28
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from octavo.bench.load import Meter
from octavo.bench.timing import alternate, spread
from octavo.config import OctavoConfig
from octavo.quantizer import quantize_parameter

from . import page_cache
from .cpu_engines import SHAPES
from .cpu_report import RESULTS, machine, save, table

SHARD_BYTES = 5_000_000_000
# Random numbers are drawn once; every tensor is a piece of them, from a place of its own.
POOL = 1 << 25
# Disk that the checkpoint, its 8-bit copy (8.26 bits for 16) and one copied shard need, as a multiple of its size.
DISK = 1.6
# The matrix that is converted in memory: the largest of GPT-J-6B.
MATRIX = (16384, 4096)


def config_for(shape: str, layers: int):
    """transformers' configuration of a shape with so many layers."""
    from transformers import GPTJConfig, LlamaConfig

    if shape == "gptj-6b":
        return GPTJConfig(n_layer=layers, architectures=["GPTJForCausalLM"], dtype="float16")
    options = {**SHAPES[shape], "num_hidden_layers": layers, "max_position_embeddings": 2048}
    return LlamaConfig(**options, architectures=["LlamaForCausalLM"], dtype="float16")


def _parameters(shape: str, layers: int) -> list[tuple[str, torch.Size]]:
    from octavo.checkpoint.skeleton import build_skeleton

    return [(name, p.shape) for name, p in build_skeleton(config_for(shape, layers)).named_parameters()]


def _bytes(parameters: list[tuple[str, torch.Size]]) -> int:
    return 2 * sum(size.numel() for _, size in parameters)


def layers_for(shape: str, gigabytes: float) -> int:
    """Layers, at least one, with which a model of that shape comes closest to so many GB (10⁹ bytes) of float16."""
    one, two = (_bytes(_parameters(shape, layers)) for layers in (1, 2))
    return max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)


def write_checkpoint(folder: Path, shape: str, layers: int) -> int:
    """Write config.json and the shards, tensor by tensor. Returns the bytes of the shards."""
    folder.mkdir(parents=True)
    config_for(shape, layers).save_pretrained(folder)
    shards: list[list[tuple[str, torch.Size]]] = [[]]
    for name, size in _parameters(shape, layers):
        if shards[-1] and _bytes([*shards[-1], (name, size)]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, size))
    torch.manual_seed(0)
    pool = (torch.randn(POOL) * 0.02).half()
    index, total = {}, 0
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name, size in shard:
            end = position + 2 * size.numel()
            header[name] = {"dtype": "F16", "shape": list(size), "data_offsets": [position, end]}
            position = end
            index[name] = path.name
        encoded = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, size in shard:
                for piece in _normal(pool, size.numel()):
                    file.write(piece.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        total += path.stat().st_size
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return total


def _normal(pool: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """`count` numbers in pieces of the pool, each from a random place on."""
    while count > 0:
        start = int(torch.randint(0, len(pool) // 2, ()))
        piece = pool[start : start + count]
        yield piece
        count -= len(piece)


def watched(command: list[str]) -> dict:
    """Run a command and watch it.

    Returns:
        seconds; "peak" and "anonymous", bytes: the most memory it held, with files mapped into it and without; "others": cores
        that other work took meanwhile.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        meter = Meter()
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        found = {"peak": 0, "anonymous": 0}
        ended = threading.Event()

        def poll() -> None:
            status = Path(f"/proc/{process.pid}/status")
            while not ended.wait(0.05):
                try:
                    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
                except (OSError, ValueError):
                    return
                for name, field in (("peak", "VmHWM"), ("anonymous", "RssAnon")):
                    if field in lines:
                        found[name] = max(found[name], int(lines[field].split()[0]) * 1024)

        watcher = threading.Thread(target=poll)
        watcher.start()
        # Not Popen.wait: wait4 also tells what processor time the process used, when the counters are gone.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: status {process.returncode}: {said.read()[-500:]}")
    # To the meter all but this very process is others.
    others = meter.since()["others"] - (usage.ru_utime + usage.ru_stime) / seconds
    return {"seconds": seconds, **found, "others": round(max(0.0, others), 3)}


def copy_seconds(files: list[Path], folder: Path) -> float:
    """Seconds to copy the files, one after the other, onto the disk; the copies are deleted as it goes."""
    seconds = 0.0
    for path in files:
        copied = folder / "copy"
        started = time.perf_counter()
        shutil.copyfile(path, copied)
        with copied.open("rb") as file:
            os.fsync(file.fileno())
        seconds += time.perf_counter() - started
        copied.unlink()
    return seconds


def in_memory(rounds: int) -> dict[str, list[float]]:
    """Weights a second of fitting and quantizing a float16 matrix, on one thread and on all, in turns."""
    weight = (torch.randn(MATRIX) * 0.02).half()
    config, threads = OctavoConfig(), torch.get_num_threads()

    def run(count: int) -> None:
        torch.set_num_threads(count)
        quantize_parameter(weight, config)

    seconds = alternate(
        {
            f"{count} thread{'s' * (count > 1)}": lambda count=count: run(count)
            for count in sorted({1, threads})
        },
        rounds,
    )
    torch.set_num_threads(threads)
    return {name: [weight.numel() / s for s in values] for name, values in seconds.items()}


def convert(source: Path, out: Path, state: str, scratch: Path) -> dict:
    """One conversion, and a copy of the same files, both from the same state of the page cache."""
    files = sorted(source.glob("*.safetensors"))
    read = sum(path.stat().st_size for path in files)
    prepare = page_cache.drop if state == "cold" else page_cache.read
    prepare(files)
    result: dict = {"cache": state, "cached_before": page_cache.cached_share(files), "read_bytes": read}
    command = [sys.executable, "-m", "octavo", "quantize", str(source), str(out), "--overwrite"]
    result |= watched(command)
    result["written_bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    prepare(files)
    result["copy_cached_before"] = page_cache.cached_share(files)
    result["copy_seconds"] = copy_seconds(files, scratch)
    return result


def run(options: argparse.Namespace) -> dict:
    layers = layers_for(options.shape, options.gigabytes)
    needed = _bytes(_parameters(options.shape, layers))
    options.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.folder).free
    if free < DISK * needed + SHARD_BYTES:
        raise OSError(
            f"{options.folder}: expected {(DISK * needed + SHARD_BYTES) / 1e9:.0f} GB of free disk, found {free / 1e9:.0f}; give "
            "another --folder, or fewer --gigabytes"
        )
    result: dict = {"machine": machine(), "shape": options.shape, "layers": layers, "weights": needed // 2}
    result["in_memory"] = in_memory(options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conversion-") as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "out")
        started = time.perf_counter()
        result["bytes"] = write_checkpoint(source, options.shape, layers)
        print(f"wrote {result['bytes'] / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
        result["runs"] = [convert(source, out, state, Path(scratch)) for state in options.cache]
    return result


def show(result: dict) -> None:
    rows = [
        [name, *(f"{spread([v / 1e6 for v in values])[part]:.0f}" for part in ("median", "low", "high"))]
        for name, values in result["in_memory"].items()
    ]
    table(
        f"In memory: {MATRIX[0]} x {MATRIX[1]} of float16, fitted and quantized, M weights/s",
        ["", "median", "low", "high"],
        rows,
    )
    rows = []
    for each in result["runs"]:
        moved = each["read_bytes"] + each["written_bytes"]
        rows.append(
            [
                f"{each['cache']}, {each['cached_before']:.0%}",
                f"{each['seconds']:.1f}",
                f"{result['weights'] / each['seconds'] / 1e6:.0f}",
                f"{moved / each['seconds'] / 1e6:.0f}",
                f"{each['peak'] / 2**30:.2f}",
                f"{each['anonymous'] / 2**30:.2f}",
                f"{each['copy_seconds']:.1f}",
                f"{2 * each['read_bytes'] / each['copy_seconds'] / 1e6:.0f}",
                f"{each['others']:.1f}",
            ]
        )
    table(
        f"octavo quantize, {result['shape']} with {result['layers']} layers, {result['bytes'] / 1e9:.2f} GB of float16",
        [
            "page cache, share of the files in it",
            "s",
            "M weights/s",
            "MB/s read and written",
            "peak GiB",
            "of it anonymous",
            "copying them, s",
            "MB/s read and written",
            "others took, cores",
        ],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gigabytes", type=float, default=12.0, help="size of the float16 checkpoint, 10⁹ bytes"
    )
    parser.add_argument("--shape", choices=["gptj-6b", *SHAPES], default="gptj-6b")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement in memory")
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=["cold", "warm"],
        default=["cold", "warm"],
        help="states of the page cache",
    )
    parser.add_argument("--folder", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        result = run(options)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    show(result)
    print("written to", save(f"conversion-{options.shape}", result, options.results))


if __name__ == "__main__":
    main()
