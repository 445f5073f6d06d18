"""Perplexity by sliding window.

Windows of `window` tokens start every `stride` tokens. The first scores all its tokens but the very first; each later one scores
only its last tokens, those that no window before it has scored, so that every token but the first is scored once, with at least
`window - stride` tokens of context (but for the first window).

Example:
    >>> result = perplexity(model, tokenizer, text, window=512, stride=256)  # doctest: +SKIP
    >>> print(f"{result.perplexity:.2f} over {result.tokens} tokens")        # doctest: +SKIP
    31.07 over 24186 tokens
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text and the protocol it was measured by.

    Attributes:
        nll: sum of negative log-likelihoods, in nats.
        tokens: tokens scored.
        words: words of the text, by white space.
        bytes: bytes of the text in UTF-8.
        window: tokens a window holds at most.
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
        return math.exp(self.nll / self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes

    @property
    def protocol(self) -> str:
        return (
            f"sliding window of {self.window} tokens, stride {self.stride}; {self.tokens:,} tokens scored, "
            f"{self.words:,} words, {self.bytes:,} bytes"
        )


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a text of `length` tokens: (start, stop, first token scored)."""
    if not 1 <= stride < window:
        raise ValueError(f"stride: expected 1 to window - 1 = {window - 1}, found {stride}")
    scored = 1
    for start in range(0, max(length - 1, 1), stride):
        stop = min(start + window, length)
        if stop > scored:
            yield start, stop, scored
        scored = stop
        if stop == length:
            return


def token_nlls(
    model: Any,
    ids: torch.Tensor,
    window: int,
    stride: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each token of a text but the first.

    Args:
        model: a causal language model.
        ids: int [tokens].
        window, stride: see the module.
        batch_size: windows run at once; the result does not depend on it but for rounding.
        progress: called with the number of tokens scored so far.

    Returns:
        float64 [tokens - 1], in nats, on the CPU.
    """
    out = torch.empty(len(ids) - 1, dtype=torch.float64)
    batch: list[tuple[int, int, int]] = []

    def flush() -> None:
        if not batch:
            return
        inputs = torch.stack([ids[start:stop] for start, stop, _ in batch]).to(model.device)
        logits = model(inputs, use_cache=False).logits
        for row, (start, stop, scored) in enumerate(batch):
            # The logits at a position are the next token's; only the rows that are scored are widened to float32.
            kept = logits[row, scored - 1 - start : stop - 1 - start].float()
            targets = ids[scored:stop].to(model.device)
            nll = torch.nn.functional.cross_entropy(kept, targets, reduction="none")
            out[scored - 1 : stop - 1] = nll.double().cpu()
        if progress is not None:
            progress(batch[-1][1] - 1)
        batch.clear()

    with torch.inference_mode():
        for each in windows(len(ids), window, stride):
            # Only windows of one length go together: padding would change what the model sees.
            if batch and (len(batch) == batch_size or each[1] - each[0] != batch[0][1] - batch[0][0]):
                flush()
            batch.append(each)
        flush()
    return out


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
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
    longest = getattr(model.config, "max_position_embeddings", None) or 2048
    window = window or min(longest, 2048)
    if window > longest:
        raise ValueError(f"window: this model's context is {longest} tokens, found {window}")
    stride = stride or window // 2
    # A tokenizer warns of texts longer than its model's context; the windows take care of that.
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < 2:
        raise ValueError("the text has fewer than two tokens: there is nothing to predict")
    total = len(ids) - 1
    nll = token_nlls(model, ids, window, stride, batch_size, lambda done: progress and progress(done, total))
    return Perplexity(float(nll.sum()), total, len(text.split()), len(text.encode("utf-8")), window, stride)
