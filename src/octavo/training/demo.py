"""Fine-tuning as `octavo demo` shows it: the shipped model learns a book in about a minute.

The first 80 % of the book are learned, the last 20 % only measured: the perplexity there, a text before and
after, and whether the frozen bytes are those of before.

Example:
    >>> result = finetune_demo(octavo.load("model-8bit"), tokenizer, "proverbios.txt", "out")  # doctest:
    +SKIP
    >>> result.perplexity_before, result.perplexity_after                                      # doctest:
    +SKIP (59.8, 40.5)
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..tensor import SUFFIXES, OctavoTensor
from .data import split_records, tokenize
from .recipe import Recipe
from .run import Outcome, finetune_model

# What teaches a model of 7 million parameters most in a minute on two cores: large steps, adapters
# everywhere. Measured on the shipped model; docs/TRAINING.md has the numbers.
DEMO_RECIPE = Recipe(
    max_steps=50,
    batch_size=8,
    max_length=128,
    learning_rate=1e-3,
    lora_r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    lora_targets="all",
    warmup=0.1,
    gradient_checkpointing=False,
    validation_split=0.2,
    evaluations=2,
    dtype="float32",
)


@dataclass
class DemoResult:
    """What the demonstration shows.

    Attributes:
        perplexity_before, perplexity_after: on the last 20 % of the book.
        text_before, text_after: what the model writes after the prompt, greedily.
        frozen_unchanged: whether every stored byte of the 8-bit weights is as before.
        outcome: the run itself: history, numbers of parameters.
    """

    perplexity_before: float
    perplexity_after: float
    text_before: str
    text_after: str
    frozen_unchanged: bool
    outcome: Outcome


def finetune_demo(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    output: str | Path,
    *,
    prompt: str = "El hombre sabio",
    recipe: Recipe = DEMO_RECIPE,
    callbacks: list[Any] | None = None,
) -> DemoResult:
    """Fine-tune a quantized model on the first part of a text and measure it on the rest.

    Args:
        model: a transformers model with 8-bit weights, in float32; it is changed in place (adapters are put
            on).
        tokenizer: its tokenizer.
        text: a text file.
        output: folder for the adapter and the checkpoints.
        prompt: what the texts before and after start with.
        callbacks: further callbacks for the Trainer.
    """
    records = [{"text": Path(text).read_text(encoding="utf-8"), "packed": True}]
    train, held_out = split_records(records, recipe.validation_split, recipe.seed)
    before = frozen_digest(model)
    text_before = _write(model, tokenizer, prompt)
    outcome = finetune_model(
        model,
        tokenizer,
        tokenize(train, tokenizer, recipe.max_length).examples,
        tokenize(held_out, tokenizer, recipe.max_length).examples,
        recipe,
        output,
        callbacks=callbacks,
    )
    return DemoResult(
        perplexity_before=outcome.before["eval_perplexity"],
        perplexity_after=outcome.after["eval_perplexity"],
        text_before=text_before,
        text_after=_write(outcome.model, tokenizer, prompt),
        frozen_unchanged=frozen_digest(outcome.model) == before,
        outcome=outcome,
    )


def frozen_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the stored bytes of all 8-bit weights, in the model's order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if isinstance(parameter, OctavoTensor):
            for suffix in SUFFIXES:
                digest.update(getattr(parameter, suffix).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(model: Any, tokenizer: Any, prompt: str, length: int = 40) -> str:
    training = model.training
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids.pop("token_type_ids", None)
    with torch.no_grad():
        out = model.generate(
            **ids, max_new_tokens=length, do_sample=False, use_cache=True, repetition_penalty=1.2
        )
    model.train(training)
    return tokenizer.decode(out[0], skip_special_tokens=True)
