"""Fine-tuning as `octavo demo` shows it: the shipped model learns a book in about a minute.

Every fifth chapter is held out and only measured, four fifths are learned: the perplexity on the held-out chapters before and
after, a text before and after, and whether the frozen bytes are those of before.

Example:
    >>> before = frozen_digest(model)             # what training must not change
    >>> before == frozen_digest(model)
    True
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluation.perplexity import Perplexity, perplexity
from ..tensor import SUFFIXES, OctavoTensor
from .card import Origin
from .data import Example, tokenize
from .finetune import Outcome, finetune_model
from .prompts import Prompts
from .recipe import Recipe

# Chosen by chapters 3, 8, 13, ..., which that choice neither learned nor reported (earlier recipes were also looked at on the
# reported ones; docs/TRAINING.md has the numbers). Two things matter. The embedding gets no adapter: PEFT starts its B at
# N(0, 1), thirty times the size of other layers' A, so each step moves an embedding thirty times as far.
# And a large alpha with a small learning rate moves B, which starts at 0, but hardly A: this comes near to training the layers in
# full, where alpha = rank learns the text by heart.
DEMO_RECIPE = Recipe(
    epochs=2,
    batch_size=8,
    max_length=128,
    learning_rate=1.5e-4,
    lora_r=64,
    lora_alpha=1024,
    lora_dropout=0.1,
    lora_targets="q_proj,k_proj,v_proj,out_proj,fc_in,fc_out,lm_head",
    warmup=0.1,
    optimizer="adamw",
    gradient_checkpointing=False,
    validation_split=0.0,
    evaluations=1,
    dtype="float32",
)
# Of so many chapters one is held out: chapters 5, 10, 15, ...
EVERY = 5


@dataclass
class DemoResult:
    """What the demonstration shows.

    Attributes:
        before, after: perplexity on the held-out chapters, and how it was measured.
        chapters, held_out: chapters of the book, and the numbers of those held out.
        repeated, verses: how many of the held-out lines occur word for word in what was learned, and how many there are.
        text_before, text_after: what the model writes after the prompt, greedily.
        frozen_unchanged: whether every stored byte of the 8-bit weights is as before.
        outcome: the run itself: history, numbers of parameters.
    """

    before: Perplexity
    after: Perplexity
    chapters: int
    held_out: list[int]
    repeated: int
    verses: int
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
    base: str = "",
    prompt: str = "El hombre sabio",
    recipe: Recipe = DEMO_RECIPE,
    callbacks: list[Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DemoResult:
    """Fine-tune a quantized model on four fifths of a book and measure it on the rest.

    Args:
        model: a transformers model with 8-bit weights, in float32; it is changed in place (adapters are put on).
        tokenizer: its tokenizer.
        text: a text file; empty lines stand between its chapters.
        output: folder for the adapter and the checkpoints.
        base: where the model was loaded from; kept with the adapter. Default: not kept.
        prompt: what the texts before and after start with.
        callbacks: further callbacks for the Trainer.
        progress: called while measuring with "before" or "after", tokens done, and tokens in all.

    Raises:
        ValueError: if the book has fewer than five chapters.
    """
    chapters = Path(text).read_text(encoding="utf-8").strip().split("\n\n")
    if len(chapters) < EVERY:
        raise ValueError(
            f"{text}: expected at least {EVERY} chapters with empty lines between, found {len(chapters)}"
        )
    numbers = [number for number in range(1, len(chapters) + 1) if number % EVERY == 0]
    learned = "\n\n".join(chapter for number, chapter in enumerate(chapters, 1) if number not in numbers)
    held_out = "\n\n".join(chapters[number - 1] for number in numbers)
    known = set(learned.splitlines())
    verses = [line for line in held_out.splitlines() if line]

    def measure(when: str, model: Any) -> Perplexity:
        model.eval()
        show = None if progress is None else lambda done, total: progress(when, done, total)
        return perplexity(model, tokenizer, held_out, progress=show)

    digest = frozen_digest(model)
    before, text_before = measure("before", model), _write(model, tokenizer, prompt)
    packed = tokenize([{"text": learned, "packed": True}], tokenizer, recipe.max_length).examples
    what = f"{Path(text).name}, all chapters but every {EVERY}th"
    outcome = finetune_model(
        model,
        tokenizer,
        overlapping(packed, recipe.max_length),
        [],
        recipe,
        output,
        origin=Origin(base, [what], Prompts(examples={"text": 1})) if base else None,
        callbacks=callbacks,
    )
    return DemoResult(
        before=before,
        after=measure("after", outcome.model),
        chapters=len(chapters),
        held_out=numbers,
        repeated=sum(verse in known for verse in verses),
        verses=len(verses),
        text_before=text_before,
        text_after=_write(outcome.model, tokenizer, prompt),
        frozen_unchanged=frozen_digest(outcome.model) == digest,
        outcome=outcome,
    )


def overlapping(packed: list[Example], length: int) -> list[Example]:
    """The pieces of a packed text, and those that begin half-way: each token twice, with other tokens before it."""
    stream = [token for example in packed for token in example["input_ids"]]
    starts = range(0, max(len(stream) - length // 2, 1), length // 2)
    pieces = [stream[start : start + length] for start in starts]
    return [{"input_ids": piece, "labels": list(piece)} for piece in pieces]


def frozen_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the stored bytes of all 8-bit weights, in the model's order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if isinstance(parameter, OctavoTensor):
            for suffix in SUFFIXES:
                digest.update(getattr(parameter, suffix).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(model: Any, tokenizer: Any, prompt: str, length: int = 40) -> str:
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids.pop("token_type_ids", None)
    with torch.no_grad():
        out = model.generate(
            **ids, max_new_tokens=length, do_sample=False, use_cache=True, repetition_penalty=1.2
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)
