"""Training step on the CPU: Octavo's time over the 16-bit (or 32-bit) model's, in one run, at several lengths.

Both models are the same Llama shape with the same adapters (rank 16 on every linear layer), prepared in the same way:
frozen weights, checkpointing, the loss in chunks. A step is a forward and a backward pass over one text. Steps alternate,
so that a busy machine troubles both alike; what counts is the median of the ratios of neighbouring steps.

    python -m benchmarks.training --shape 1b --steps 5

Written to benchmarks/results/cpu-training-SHAPE-PROCESSOR.json.
"""

import argparse
import copy
import time
from pathlib import Path

import torch

import octavo
from octavo.training.adapters import add_adapters
from octavo.training.loss import language_model_loss
from octavo.training.prepare import prepare_for_training
from octavo.training.recipe import Recipe

from .cpu_engines import SHAPES, make_model
from .cpu_report import RESULTS, machine, save, spread, spread_text, table


def models(shape: str, dtype: torch.dtype):
    """(8-bit model, plain model), both with adapters, checkpointing and frozen weights."""
    dense = make_model(shape).to(dtype)
    packed = octavo.quantize_model(dense)
    plain = octavo.dequantize_model(copy.deepcopy(packed), dtype)
    plain.requires_grad_(False)
    plain.enable_input_require_grads()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    plain.is_quantized = False
    recipe = Recipe(lora_dropout=0.0)
    return add_adapters(prepare_for_training(packed), recipe).train(), add_adapters(plain, recipe).train()


def step(model, ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Seconds for one forward and backward pass."""
    started = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total, tokens = language_model_loss(model, {"input_ids": ids, "labels": ids})
    (total / tokens).backward()
    return time.perf_counter() - started


def measure(shape: str, dtype: torch.dtype, lengths: list[int], steps: int) -> dict[str, dict]:
    """Length → seconds of both models' steps and the spread of their ratios."""
    packed, plain = models(shape, dtype)
    found = {}
    for length in lengths:
        ids = torch.randint(0, SHAPES[shape]["vocab_size"], (1, length))
        for model in (packed, plain):
            step(model, ids, dtype)
        # Each goes first in turn.
        pairs = []
        for number in range(steps):
            order = (packed, plain) if number % 2 == 0 else (plain, packed)
            seconds = [step(model, ids, dtype) for model in order]
            pairs.append(seconds if number % 2 == 0 else seconds[::-1])
        mine, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        found[str(length)] = {
            "octavo_s": spread(mine),
            "plain_s": spread(theirs),
            "ratio": spread([a / b for a, b in pairs]),
        }
        print(f"{length:5} tokens: ratio {found[str(length)]['ratio']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=5, help="pairs of steps a length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens a step")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    result = {
        "machine": machine(),
        "shape": {options.shape: SHAPES[options.shape]},
        "dtype": options.dtype,
        "steps": options.steps,
        "lengths": measure(options.shape, getattr(torch, options.dtype), options.lengths, options.steps),
    }
    result["machine"]["load_after"] = machine()["load_before"]
    rows = [
        [
            length,
            *(f"{one['median']:.2f}" for one in (found["octavo_s"], found["plain_s"])),
            spread_text(found["ratio"], ".3f"),
        ]
        for length, found in result["lengths"].items()
    ]
    table("a training step", ["tokens", "octavo, s", f"{options.dtype}, s", "octavo / plain"], rows)
    print("written to", save(f"training-{options.shape}", result, options.results))


if __name__ == "__main__":
    main()
