"""SmolLM2-135M in 8 bits, exported: llama.cpp's perplexity against ours, on the same tokens and windows.

Needs OCTAVO_TEST_GGUF=path/to/SmolLM2-135M-Instruct.Q4_1.gguf (`make test-all` fetches it) and llama-cpp-python.
"""

import math
import os

import numpy as np
import pytest
import torch

import octavo
from octavo.checkpoint import convert
from octavo.export import export_gguf

from .models.exported import llama
from .models.tokenizers import TEXTS

GGUF = os.environ.get("OCTAVO_TEST_GGUF")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not GGUF, reason="OCTAVO_TEST_GGUF names no file; `make test-all` fetches it"),
]
TOKENS, WINDOW = 4096, 512


def english() -> str:
    """Plain English that every Python has: the text of its language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[20_000:60_000]


def nlls(logits_of, ids):
    """Nats of every token but the first of each window: float64. `logits_of`: token ids → [tokens, vocabulary]."""
    found = []
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        scores = torch.as_tensor(logits_of(window))[:-1].double().log_softmax(-1)
        found.append(-scores.gather(1, torch.tensor(window[1:])[:, None])[:, 0].numpy())
    return np.concatenate(found)


def llama_nlls(path, ids):
    threads = max(1, len(os.sched_getaffinity(0)))
    with llama(path, n_ctx=WINDOW, n_batch=WINDOW, n_threads=threads) as instance:

        def logits_of(tokens):
            instance.reset()
            instance.eval(tokens)
            return np.array(instance.scores[: len(tokens)])

        return nlls(logits_of, ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "smollm2-8bit"
    convert(GGUF, out)
    return out


@pytest.fixture(scope="module")
def ids(model):
    return octavo.load_tokenizer(model)(english(), verbose=False)["input_ids"][:TOKENS]


@pytest.fixture(scope="module")
def ours(model, ids):
    """Nats of each token by our kernels, in float32."""
    loaded = octavo.load(model, dtype="float32", device="cpu")
    with torch.inference_mode():
        return nlls(lambda tokens: loaded(torch.tensor([tokens]), use_cache=False).logits[0], ids)


# By how much the mean of 4,088 tokens' nats may differ. Measured: 2e-5 and 7.5e-3; of the latter 4.5e-3 are the weights'
# second rounding (the file's weights, run in float32), the rest llama.cpp's rounding of activations to 8 bits.
@pytest.mark.parametrize(("to", "tolerance"), [("f16", 2e-4), ("q8_0", 1.2e-2)])
def test_perplexity_is_ours(to, tolerance, model, ids, ours, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'octavo[bench]'")
    result = export_gguf(model, tmp_path / "m.gguf", to)
    theirs = llama_nlls(result.out, ids)
    difference = theirs - ours
    print(
        f"{to}: {result.nbytes:,} bytes, {result.types}; perplexity {math.exp(theirs.mean()):.4f} in llama.cpp, "
        f"{math.exp(ours.mean()):.4f} in Octavo; nats a token: mean difference {difference.mean():+.2e} "
        f"± {difference.std() / len(ours) ** 0.5:.1e}, largest {np.abs(difference).max():.3f}"
    )
    assert abs(difference.mean()) < tolerance
    assert result.narrow == []


def test_tokens_are_the_same(model, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'octavo[bench]'")
    tokenizer = octavo.load_tokenizer(model)
    result = export_gguf(model, tmp_path / "m.gguf")
    with llama(result.out, vocab_only=True, logits_all=False) as instance:
        for text in (*TEXTS, english()):
            expected = tokenizer(text, verbose=False)["input_ids"]
            assert instance.tokenize(text.encode(), special=True) == expected, text


def test_a_gguf_keeps_its_own_pre_tokenizer(tmp_path):
    """transformers forgets that digits stand alone in this tokenizer; the file's own name for the rule is kept."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'octavo[bench]'")
    result = export_gguf(GGUF, tmp_path / "m.gguf")
    assert result.vocabulary.pre == "smollm"
    texts = (*TEXTS, english())
    found = []
    for path in (result.out, GGUF):
        with llama(path, vocab_only=True, logits_all=False) as instance:
            found.append([instance.tokenize(text.encode(), special=True) for text in texts])
    assert found[0] == found[1]
