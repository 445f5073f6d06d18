"""Sliding-window perplexity against a brute-force computation."""

import math

import pytest
import torch

from octavo.evaluation.divergence import divergence
from octavo.evaluation.perplexity import Perplexity, perplexity, token_nlls
from octavo.evaluation.scoring import windows

from .models.published import tiny_gptj


@pytest.fixture(autouse=True)
def _one_thread(_reproducible):
    # Models so small that a second thread is only waited for.
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (40, 8, 3), (41, 16, 15)]
)
def test_every_token_but_the_first_is_scored_once_with_enough_context(length, window, stride):
    scored = []
    for start, stop, first in windows(length, window, stride):
        assert stop - start <= window and start < first
        if start:
            assert first - start >= window - stride
        scored.extend(range(first, stop))
    assert scored == list(range(1, length))


def test_nll_equals_brute_force_whatever_the_batch():
    model = tiny_gptj()
    ids = torch.randint(0, 300, (53,), generator=torch.Generator().manual_seed(1))
    expected = torch.empty(52, dtype=torch.float64)
    for start, stop, first in windows(53, 16, 5):
        with torch.no_grad():
            logits = model(ids[None, start:stop]).logits[0].double().log_softmax(-1)
        for position in range(first, stop):
            expected[position - 1] = -logits[position - 1 - start, ids[position]]
    for batch_size in (1, 3, 64):
        torch.testing.assert_close(token_nlls(model, ids, 16, 5, batch_size), expected, rtol=1e-5, atol=1e-5)


def test_figures_follow_from_the_likelihoods():
    result = Perplexity(nll=120.0, tokens=60, words=40, bytes=240, window=16, stride=8)
    assert result.perplexity == pytest.approx(math.exp(2))
    assert result.word_perplexity == pytest.approx(math.exp(3))
    assert result.bits_per_byte == pytest.approx(0.5 / math.log(2))


class Characters:
    """A tokenizer of characters."""

    def __call__(self, text, **options):
        return {"input_ids": torch.tensor([[ord(letter) % 300 for letter in text]])}


def test_text_and_window_are_checked():
    model = tiny_gptj()
    measured = perplexity(model, Characters(), "una vida entera " * 10, window=32)
    assert (measured.tokens, measured.words, measured.bytes, measured.stride) == (159, 30, 160, 16)
    with pytest.raises(ValueError, match="context is 64"):
        perplexity(model, Characters(), "una vida", window=65)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        perplexity(model, Characters(), "u")
    with pytest.raises(ValueError, match="stride"):
        perplexity(model, Characters(), "una vida", window=32, stride=32)


def test_divergence_of_a_model_from_itself_is_zero_and_from_another_is_not():
    model, other = tiny_gptj(), tiny_gptj()
    with torch.no_grad():
        other.lm_head.bias.add_(torch.linspace(0, 1, 300))
    ids = torch.arange(50) % 300
    same, different = divergence(model, model, ids, 16), divergence(other, model, ids, 16)
    assert (same.kl_max, same.top1_agreement, same.tokens) == (0.0, 1.0, 50)
    with torch.no_grad():
        base, ours = (m(ids[None, :16]).logits[0].double().softmax(-1) for m in (model, other))
    expected = (base * (base / ours).log()).sum(-1)
    assert divergence(other, model, ids[:16], 16).kl_mean == pytest.approx(expected.mean().item(), rel=1e-6)
    assert 0 < different.kl_mean < different.kl_p99 <= different.kl_max
