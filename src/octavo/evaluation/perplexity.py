"""Perplexity by sliding window; `octavo.evaluation.scoring` says which windows and what they score.

Example:
    >>> result = perplexity(model, tokenizer, text, window=512, stride=256)
    >>> print(f"{result.perplexity:.0f} over {result.tokens} tokens")
    21 over 1106 tokens
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .scoring import choose_window, scored, token_nll


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text and the protocol it was measured by.

    Attributes:
        nll: sum of negative log-likelihoods, in nats.
        tokens: tokens scored.
        words: words of the text, by white space.
        bytes: bytes of the text in UTF-8.
        window: tokens that a window holds at most.
        stride: tokens from one window to the next.
    """

    nll: float
    tokens: int
    words: int
    bytes: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(self.nll / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp of the negative log-likelihood per word; infinity where that is too large for a number."""
        return math.exp(self.nll / self.words) if self.nll / self.words < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes

    @property
    def protocol(self) -> str:
        return (
            f"sliding window of {self.window} tokens, stride {self.stride}; {self.tokens:,} tokens scored, "
            f"{self.words:,} words, {self.bytes:,} bytes"
        )


def token_nlls(
    model: Any,
    ids: torch.Tensor,
    window: int,
    stride: int,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each token of a text but the first.

    Args:
        model: a causal language model.
        ids: int [tokens].
        window, stride: see `octavo.evaluation.scoring`.
        batch_size: windows run at once; the result does not depend on it but for rounding.
        progress: called with the number of tokens scored so far.

    Returns:
        float64 [tokens - 1], in nats, on the CPU.
    """
    out = torch.empty(len(ids) - 1, dtype=torch.float64)
    for part in scored(model, ids, window, stride, batch_size):
        out[part.first - 1 : part.stop - 1] = token_nll(part.logits, ids[part.first : part.stop])
        if progress is not None:
            progress(part.stop - 1)
    return out


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a text.

    Args:
        window: tokens of context at most. Default: the model's longest, at most 2048.
        stride: Default: half the window.
        progress: called with tokens scored so far and in all.

    Raises:
        ValueError: if the text has fewer than two tokens, or the window is longer than the model's context.
    """
    window, stride = choose_window(model, window, stride)
    # A tokenizer warns of texts longer than its model's context; the windows take care of that.
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < 2:
        raise ValueError("the text has fewer than two tokens: there is nothing to predict")
    total = len(ids) - 1
    nll = token_nlls(model, ids, window, stride, batch_size, lambda done: progress and progress(done, total))
    return Perplexity(float(nll.sum()), total, len(text.split()), len(text.encode("utf-8")), window, stride)
