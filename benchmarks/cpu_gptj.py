"""GPT-J-6B's shape on a CPU: how soon it is ready from a warm cache, tokens a second, and peak memory over the file's size.

    python -m benchmarks.cpu_gptj --format octavo
    python -m benchmarks.cpu_gptj --format published --layers 2     # a small one, to try the benchmark

The weights are random bytes, written once in Octavo's own format (safetensors, blocks of 64) or in that of the published 8-bit
checkpoints (one pickle, blocks of 4096 over the flattened matrix); speed does not depend on them. Needs 7 GB of disk each.

Example:
    >>> from benchmarks.cpu_gptj import write  # write(Path("build/gptj"), "octavo", layers=2)
"""

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from octavo import codebook
from octavo.bench.timing import spread
from octavo.bench.turns import take_turns, undisturbed
from octavo.ops import blocks_per_row

from .cpu import probes, start
from .cpu_report import RESULTS, chosen, machine, save, table

BLOCK, PUBLISHED_BLOCK = 64, 4096
SHARD_BYTES = 1 << 30


def _config(layers: int):
    from transformers import GPTJConfig

    return GPTJConfig(n_layer=layers, architectures=["GPTJForCausalLM"], dtype="bfloat16")


def _parameters(layers: int) -> Iterator[tuple[str, torch.Size]]:
    from transformers import GPTJForCausalLM

    with torch.device("meta"):
        model = GPTJForCausalLM(_config(layers))
    for name, parameter in model.named_parameters():
        yield name, parameter.shape


def _octavo_tensors(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
    if len(shape) < 2:
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    rows, columns = shape
    return {
        f"{name}_qdata": torch.randint(0, 256, (rows, columns), dtype=torch.uint8),
        f"{name}_absmax": torch.full((rows, blocks_per_row(columns, BLOCK)), 0.02, dtype=torch.float16),
        f"{name}_code": _fitted().clone(),
    }


@cache
def _fitted() -> torch.Tensor:
    """A codebook as `octavo quantize` fits them to weights that are about normal."""
    return codebook.fit(torch.randn(1024, BLOCK, generator=torch.Generator().manual_seed(0)), BLOCK)


def _published_tensors(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
    if len(shape) < 2:
        return {name: torch.ones(shape, dtype=torch.float16)}
    module = name.removesuffix(".weight")
    blocks = blocks_per_row(shape.numel(), PUBLISHED_BLOCK)
    return {
        name: torch.randint(0, 256, shape, dtype=torch.uint8),
        f"{module}.absmax": torch.full((blocks,), 0.02),
        f"{module}.code": codebook.dynamic(),
    }


def write(folder: Path, form: str, layers: int) -> None:
    """Write the checkpoint, unless it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        return
    config = _config(layers).to_dict()
    if form == "published":
        tensors = {}
        for name, shape in _parameters(layers):
            tensors |= _published_tensors(name, shape)
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        config["quantization_config"] = {
            "quant_method": "octavo",
            "format_version": 1,
            "block_size": BLOCK,
            "codebook": "fitted",
        }
        _write_shards(folder, layers)
    (folder / "config.json").write_text(json.dumps(config))


def _write_shards(folder: Path, layers: int) -> None:
    shard, size, number, index = {}, 0, 1, {}

    def flush() -> None:
        nonlocal shard, size, number
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard, size, number = {}, 0, number + 1

    for name, shape in _parameters(layers):
        shard |= _octavo_tensors(name, shape)
        size = sum(t.nbytes for t in shard.values())
        if size > SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=["octavo", "published"], default="octavo")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.folder / f"gptj-{options.format}-{options.layers}"
    checkpoint = folder / "octavo"
    write(checkpoint, options.format, options.layers)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    with start("octavo", folder) as worker:
        found = take_turns({"octavo": worker}, "decode", options.decode, options.rounds, probes=probes())
        peak, pages = worker.ask("peak_memory"), worker.ask("page_kinds")
    rates = found["octavo"]
    result = {
        "machine": machine(),
        "format": options.format,
        "layers": options.layers,
        "file_bytes": size,
        "peak_bytes": peak,
        "pages": pages,
        "ready_seconds": worker.ready,
        "tokens_per_second": rates,
        "rounds": found,
    }
    trusted = undisturbed(found)
    rate = spread(chosen(rates, trusted))
    table(
        f"GPT-J, {options.layers} layers, {options.format} format, {options.threads} threads",
        ["tok/s", "spread", "undisturbed rounds", "file GiB", "peak GiB", "peak over file GiB", "ready s"],
        [
            [
                f"{rate['median']:.2f}",
                f"{rate['low']:.2f} to {rate['high']:.2f}",
                f"{sum(trusted)} of {len(trusted)}",
                f"{size / 2**30:.2f}",
                f"{peak / 2**30:.2f}",
                f"{(peak - size) / 2**30:.2f}",
                f"{worker.ready:.1f}",
            ]
        ],
    )
    print("written to", save(f"gptj-{options.format}", result, options.results))


if __name__ == "__main__":
    main()
