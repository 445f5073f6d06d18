"""A model's predictions over a text, window by window, as they come.

Windows of `window` tokens start every `stride` tokens. The first scores all its tokens but the very first; each later one scores
only its last tokens, those that no window before it has scored, so that every token but the first is scored once, with at least
`window - stride` tokens of context (but for the first window). This is the protocol of transformers' page "Perplexity of
fixed-length models". No window is padded.

Example:
    >>> total = 0.0
    >>> for part in scored(model, ids, window=256, stride=128):
    ...     total += token_nll(part.logits, ids[part.first : part.stop]).sum()
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Entries of logits widened to float32 or float64 at once: 16 or 32 MiB.
CHUNK = 1 << 22
# Entries of the logits that a batch chosen by us holds at most: 512 MiB in float32.
BATCH_ENTRIES = 1 << 27
LARGEST_BATCH = 8


@dataclass(frozen=True)
class Scored:
    """The predictions that one window scores.

    Attributes:
        first, stop: the tokens predicted are those of the text from `first` to before `stop`.
        logits: [stop - first, vocabulary], in the model's type, on its device.
        hidden_states: [stop - first, width], what the output head was given; None unless asked for, or where the
            model has no head module.
    """

    first: int
    stop: int
    logits: torch.Tensor
    hidden_states: torch.Tensor | None = None


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


def window_sizes(length: int, window: int, stride: int) -> list[int]:
    """Tokens that each window over a text of `length` tokens scores."""
    return [stop - first for _, stop, first in windows(length, window, stride)]


def choose_window(model: Any, window: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """Window and stride, checked against the model.

    Args:
        window: Default: the model's longest context, at most 2048.
        stride: Default: half the window.

    Raises:
        ValueError: if the window is longer than the model's context, or the stride does not fit into it.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = window or min(longest or 2048, 2048)
    if longest and window > longest:
        raise ValueError(f"window: this model's context is {longest} tokens, found {window}")
    stride = stride or max(window // 2, 1)
    if not 1 <= stride < window:
        raise ValueError(f"stride: expected 1 to window - 1 = {window - 1}, found {stride}")
    return window, stride


def check_causal(model: Any) -> None:
    """Raise ValueError if the model does not predict the next token from those before it."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} is no causal language model: perplexity is not defined for it; give a model that "
            "predicts the next token"
        )


def scored(
    model: Any,
    ids: torch.Tensor,
    window: int,
    stride: int,
    batch_size: int | None = None,
    hidden_states: bool = False,
) -> Iterator[Scored]:
    """Run a model over a text and yield what each window scores, in order.

    Args:
        model: a causal language model.
        ids: int [tokens].
        window, stride: see the module.
        batch_size: windows run at once. Default: as many as fit into 512 MiB of logits, at most 8. What is
            yielded does not depend on it but for rounding.
        hidden_states: also give the input of the output head.
    """
    head = model.get_output_embeddings() if hidden_states else None
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    if batch_size is None:
        entries = stride * (model.config.get_text_config().vocab_size or 1)
        batch_size = min(max(BATCH_ENTRIES // entries, 1), LARGEST_BATCH)
    with torch.inference_mode():
        for batch in _batches(windows(len(ids), window, stride), batch_size):
            # A window's last token is predicted, never read.
            inputs = torch.stack([ids[start : stop - 1] for start, stop, _ in batch]).to(model.device)
            count = batch[0][1] - batch[0][2]
            logits, captured = _forward(model, inputs, head, {"logits_to_keep": count} if keeps else {})
            for row, (_, stop, first) in enumerate(batch):
                kept = captured[row, -count:] if captured is not None else None
                yield Scored(first, stop, logits[row, -count:], kept)


def _batches(each: Iterator[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Windows of one length, with as many tokens scored, go together: padding would change what the model sees."""
    batch: list[tuple[int, int, int]] = []
    shape = (0, 0)
    for start, stop, first in each:
        if batch and (len(batch) == size or shape != (stop - start, stop - first)):
            yield batch
            batch = []
        shape = (stop - start, stop - first)
        batch.append((start, stop, first))
    if batch:
        yield batch


def _forward(
    model: Any, inputs: torch.Tensor, head: Any, options: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits, and what the head was given, if it was called once with one [batch, tokens, width]."""
    captured: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _, given, made: captured.append(given[0])) if head else None
    try:
        logits = model(input_ids=inputs, use_cache=False, **options).logits
    finally:
        if hook is not None:
            hook.remove()
    fits = len(captured) == 1 and captured[0].dim() == 3 and captured[0].shape[:2] == logits.shape[:2]
    return logits, captured[0] if fits else None


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of `rows` rows, each of at most CHUNK entries (but one row at least)."""
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods of `targets` [n] under `logits` [n, vocabulary], float64 [n], in nats, on the CPU."""
    targets = targets.to(logits.device)
    found = [
        torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="none")
        .double()
        .cpu()
        for part in row_chunks(*logits.shape)
    ]
    return torch.cat(found)
