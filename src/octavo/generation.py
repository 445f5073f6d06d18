"""Text from a prompt, handed on piece by piece, with its speed measured.

Example:
    >>> result = stream(model, tokenizer, "El sentido de la vida es", write=lambda text: None)
    >>> result.tokens_per_second > 0
    True
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from .integrations.cuda_graph import decoding_by_graph
from .training.prompts import Encoded, encode


@dataclass(frozen=True)
class Generated:
    """What a generation gave.

    Attributes:
        text: the continuation.
        tokens: number of new tokens.
        first_token_seconds: time to the first token, the reading of the prompt included.
        tokens_per_second: of the tokens after the first; of the one where there is only one.
        replayed: number of those that a CUDA graph decoded (`octavo.integrations.cuda_graph`).
        eager: why the others were not, on a GPU.
    """

    text: str
    tokens: int
    first_token_seconds: float
    tokens_per_second: float
    replayed: int = 0
    eager: str = ""


class _TimedStreamer(TextStreamer):
    """transformers' streamer, which also keeps the time of each token and hands text to a function."""

    def __init__(self, tokenizer, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.pieces: list[str] = []
        self.times: list[float] = []

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.pieces.append(text)
        if text:
            self.write(text)


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str | Encoded,
    write: Callable[[str], None],
    *,
    cuda_graph: bool = True,
    **options: Any,
) -> Generated:
    """Generate from a prompt, calling `write` with each piece of text as it is there.

    Args:
        model, tokenizer: as `octavo.load` and `octavo.load_tokenizer` give them.
        prompt: a text, which goes into the chat template if there is one; or what `octavo.training.prompts.encode` made of it,
            in the way that an adapter was trained.
        cuda_graph: on a GPU, decode by a CUDA graph, if the model can.
        options: passed to transformers' `generate` (max_new_tokens, do_sample, temperature, ...).
    """
    encoded = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
    inputs = {name: value.to(model.device) for name, value in encoded.inputs.items()}
    inputs.pop("token_type_ids", None)
    if getattr(tokenizer, "pad_token_id", None) is None:
        options.setdefault("pad_token_id", tokenizer.eos_token_id)
    streamer = _TimedStreamer(tokenizer, write)
    started = time.perf_counter()
    with torch.inference_mode(), decoding_by_graph(model, wanted=cuda_graph) as graphs:
        model.generate(**inputs, streamer=streamer, **{**graphs.options, **options})
    times = streamer.times or [time.perf_counter()]
    count = len(streamer.times)
    first = times[0] - started
    rest = times[-1] - times[0]
    speed = (count - 1) / rest if count > 1 and rest > 0 else count / max(first, 1e-9)
    return Generated("".join(streamer.pieces), count, first, speed, graphs.replayed, graphs.eager)
