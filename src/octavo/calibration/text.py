"""Text files as windows of tokens, for calibration.

Example:
    >>> windows = read_windows(["book.txt"], tokenizer, tokens=2048, longest=512)
    >>> len(windows), windows[0].shape
    (2, torch.Size([512]))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..text_files import read_text

# Fewer say too little of thousands of weights per row.
FEWEST_TOKENS = 1024
# Characters a token has at least and at most, on average, in any text worth calibrating on.
SHORTEST_TOKEN, LONGEST_TOKEN = 3, 16


def read_windows(
    sources: Sequence[str | Path], tokenizer: Any, tokens: int, longest: int
) -> list[torch.Tensor]:
    """Take windows from texts, evenly spread over each: the more a text varies, the better other text is served.

    Args:
        sources: text files; each gives an equal share of the tokens.
        tokenizer: the model's; it puts its start and end tokens around each window.
        tokens: tokens in all, about.
        longest: tokens that a window holds at most.

    Returns:
        int64 [at most `longest`] each.

    Raises:
        ValueError: if a file is no text in UTF-8 or UTF-16, or if the texts are shorter than FEWEST_TOKENS together.
        OSError: if a file cannot be read.
    """
    wanted = max(1, tokens // longest // len(sources))
    windows = []
    for source in sources:
        text = read_text(source, "--calibrate")
        count = max(1, min(wanted, len(text) // (SHORTEST_TOKEN * longest)))
        step = len(text) // count
        for index in range(count):
            part = text[index * step : (index + 1) * step][: LONGEST_TOKEN * longest]
            ids = tokenizer(part, truncation=True, max_length=longest)["input_ids"]
            windows.append(torch.as_tensor(ids, dtype=torch.int64).reshape(-1))
    found = sum(len(window) for window in windows)
    if found < FEWEST_TOKENS:
        names = ", ".join(map(str, sources))
        raise ValueError(
            f"--calibrate {names}: expected text of at least {FEWEST_TOKENS:,} tokens, found {found:,}; give a longer "
            "text, or a larger --calibrate-tokens"
        )
    return windows
