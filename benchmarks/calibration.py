"""What calibration brings on text that it was not made on: `octavo quantize --calibrate`, measured.

    python -m benchmarks.calibration MODEL --calibrate A.txt B.txt --text C.txt D.txt [--block-sizes 64 128 4096]

MODEL is a folder or a GGUF file of a causal model or an encoder. A causal model's figure is the divergence KL(float ‖ 8-bit) in
nats, mean over tokens; an encoder's is the error of its last hidden state, ‖h - ĥ‖² / ‖h‖². The model is loaded in float32 once
and its matrices are stored in 8 bits, plainly and calibrated, for each block size. docs/CALIBRATION.md has the figures
and says where its texts come from.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from octavo import load_tokenizer
from octavo.calibration import Calibration
from octavo.calibration.text import read_windows
from octavo.checkpoint import open_source
from octavo.checkpoint.skeleton import model_class_of
from octavo.config import OctavoConfig
from octavo.evaluation.divergence import token_divergence
from octavo.model import plan_model, set_parameter
from octavo.quantizer import quantize_parameter
from octavo.tensor import OctavoTensor

WINDOW = 512


def load_float(source: Any) -> Any:
    """The model in float32."""
    options = {"gguf_file": source.files[0].name} if source.kind == "gguf" else {}
    model_class = model_class_of(source.model_config())
    return model_class.from_pretrained(str(source.folder), dtype=torch.float32, **options).eval()


def outputs(model: Any, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of a causal model, the last hidden state of an encoder: [tokens, ...] for each window."""
    with torch.inference_mode():
        results = [model(input_ids=ids[None]) for ids in windows]
    return [(out.logits if "logits" in out else out.last_hidden_state)[0] for out in results]


def distance(base: list[torch.Tensor], ours: list[torch.Tensor], causal: bool) -> float:
    """Mean divergence, or relative error of the hidden states."""
    pairs = list(zip(base, ours, strict=True))
    if causal:
        return torch.cat([token_divergence(a, b)[0] for a, b in pairs]).mean().item()
    error = sum((a - b).double().square().sum().item() for a, b in pairs)
    return error / sum(a.double().square().sum().item() for a in base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibrate", nargs="+", required=True, help="texts to calibrate on")
    parser.add_argument("--text", nargs="+", required=True, help="texts to measure on")
    parser.add_argument("--calibrate-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each text to measure on")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[64, 128, 4096])
    options = parser.parse_args()
    console = Console(width=110, highlight=False)

    with open_source(options.model) as source:
        base = load_float(source)
        causal = base.can_generate()
        tokenizer = load_tokenizer(options.model)
        texts = {
            Path(text).stem: read_windows([text], tokenizer, options.tokens, WINDOW) for text in options.text
        }
        expected = {name: outputs(base, windows) for name, windows in texts.items()}
        entries = plan_model(base, OctavoConfig()).entries
        started = time.monotonic()
        calibration = Calibration(options.calibrate, options.calibrate_tokens)
        calibration.progress = lambda done, total: console.print(f"window {done + 1} of {total}", end="\r")
        calibration.open(source, OctavoConfig(), list(entries))
        calibration.gram(next(name for name in entries if name not in calibration.left_out))
        console.print(f"ran the model on the calibration text in {time.monotonic() - started:.0f} s")
    counted = ", ".join(f"{name} ({sum(map(len, windows)):,} tokens)" for name, windows in texts.items())
    console.print(f"{'KL (nats)' if causal else 'error of the last hidden state'}: {counted}")

    for block_size in options.block_sizes:
        config = OctavoConfig(block_size=block_size)
        models = {"plain": copy.deepcopy(base), "calibrated": copy.deepcopy(base)}
        nbytes = weights = 0
        started = time.monotonic()
        for name, entry in entries.items():
            weight = base.get_parameter(name).detach()
            stored = weight.mT.contiguous() if entry.transposed else weight
            plain = quantize_parameter(stored, config, name)
            better = calibration.quantize(name, stored, plain)
            for model, packed in zip(models.values(), (plain, better), strict=True):
                tensor = OctavoTensor.from_packed(packed, torch.float32, entry.transposed)
                set_parameter(model, entry, tensor)
            nbytes += tensor.nbytes_stored
            weights += weight.numel()
        seconds = time.monotonic() - started
        found = {
            kind: {name: distance(expected[name], outputs(model, texts[name]), causal) for name in texts}
            for kind, model in models.items()
        }
        console.print(
            f"fitted/{block_size}, {8 * nbytes / weights:.3f} bits a weight, encoded in {seconds:.0f} s"
        )
        for name in texts:
            before, after = found["plain"][name], found["calibrated"][name]
            console.print(f"  {name:24} {before:.3e} → {after:.3e}  ({after / before - 1:+.0%})")


if __name__ == "__main__":
    main()
