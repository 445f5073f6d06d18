"""What `octavo demo` shows of fine-tuning, on a tiny model."""

from dataclasses import replace

import pytest
import torch

from octavo.training.demo import DEMO_RECIPE, finetune_demo, frozen_digest

from .test_training_data import byte_tokenizer
from .training_models import llama_tied, quantized

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def test_perplexity_falls_and_the_frozen_bytes_stay(tmp_path):
    text = tmp_path / "poem.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log.\n" * 40, encoding="utf-8")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    model = quantized(llama_tied)
    recipe = replace(DEMO_RECIPE, max_steps=10, max_length=32, learning_rate=5e-3, lora_targets="all-linear")
    result = finetune_demo(model, tokenizer, text, tmp_path / "out", prompt="the", recipe=recipe)
    assert result.perplexity_after < 0.75 * result.perplexity_before
    assert result.frozen_unchanged
    assert result.text_before.startswith("the") and result.text_after.startswith("the")
    assert result.outcome.steps == 10


def test_the_digest_notices_one_byte():
    model = quantized(llama_tied)
    before = frozen_digest(model)
    model.lm_head.weight.qdata[3, 5] ^= 1
    assert frozen_digest(model) != before
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
