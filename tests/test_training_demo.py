"""What `octavo demo` shows of fine-tuning, on a tiny model."""

from dataclasses import replace

import pytest
import torch

from octavo.training import demo
from octavo.training.demo import DEMO_RECIPE, finetune_demo, frozen_digest
from octavo.training.finetune import Outcome

from .models import llama_tied, quantized
from .models.tokenizers import byte_tokenizer

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def book(path, chapters=10):
    """The chapters differ in their first line only."""
    lines = ["the cat sat on the mat", "and the dog sat on the log", "and the frog sat on the cat"]
    text = "\n\n".join("\n".join([f"chapter {n}", *lines]) for n in range(1, chapters + 1))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def tiny():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    return quantized(llama_tied), tokenizer


def test_perplexity_falls_on_chapters_held_out_and_the_frozen_bytes_stay(tmp_path):
    model, tokenizer = tiny()
    recipe = replace(
        DEMO_RECIPE,
        max_steps=10,
        max_length=32,
        learning_rate=1e-2,
        lora_r=8,
        lora_alpha=16,
        lora_targets="all-linear",
    )
    seen = []
    result = finetune_demo(
        model,
        tokenizer,
        book(tmp_path / "book.txt"),
        tmp_path / "out",
        prompt="the",
        recipe=recipe,
        progress=lambda *what: seen.append(what),
    )
    assert result.after.perplexity < 0.75 * result.before.perplexity
    assert result.before.tokens == result.after.tokens
    assert result.frozen_unchanged
    assert result.text_before.startswith("the") and result.text_after.startswith("the")
    assert result.outcome.steps == 10
    # Chapters 5 and 10; all but their first lines are in the others too.
    assert (result.chapters, result.held_out) == (10, [5, 10])
    assert (result.repeated, result.verses) == (6, 8)
    assert {when for when, *_ in seen} == {"before", "after"} and seen[-1][1] == seen[-1][2]


def test_no_held_out_chapter_is_learned(tmp_path, monkeypatch):
    model, tokenizer = tiny()
    learned = []

    def finetune_model(model, tokenizer, train, held_out, *rest, **options):
        learned.extend(tokenizer.decode(example["input_ids"]) for example in train)
        assert held_out == []
        return Outcome(model)

    monkeypatch.setattr(demo, "finetune_model", finetune_model)
    demo.finetune_demo(model, tokenizer, book(tmp_path / "book.txt", 6), tmp_path / "out", prompt="the")
    text = " ".join(learned)
    assert "chapter 4" in text and "chapter 6" in text and "chapter 5" not in text
    with pytest.raises(ValueError, match="expected at least 5 chapters"):
        demo.finetune_demo(model, tokenizer, book(tmp_path / "book.txt", 4), tmp_path / "out")


def test_pieces_overlap_by_half():
    packed = [{"input_ids": [1, 2, 3, 4], "labels": []}, {"input_ids": [5, 6], "labels": []}]
    pieces = [example["input_ids"] for example in demo.overlapping(packed, 4)]
    assert pieces == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert all(example["labels"] == example["input_ids"] for example in demo.overlapping(packed, 4))


def test_the_digest_notices_one_byte():
    model = quantized(llama_tied)
    before = frozen_digest(model)
    model.lm_head.weight.qdata[3, 5] ^= 1
    assert frozen_digest(model) != before
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
