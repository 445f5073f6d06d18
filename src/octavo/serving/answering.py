"""One answer at a time on transformers' generation, as its server asks for it: with limits, seeds, stop strings and an end.

transformers' own manager (`GenerateManager`) keeps stop strings in the text, sets a seed before others have had their turn,
generates past the model's context, and goes on for clients that have left.

Example: `octavo.serving.transformers_engine` puts it into transformers' server.
"""

import asyncio
import weakref
from contextvars import ContextVar
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    _StreamError,
)

from .requests import Request

# The request at hand: transformers hands its managers only a part of it.
asked: ContextVar[Request] = ContextVar("asked")
# Until the last answer has ended, when the server stops.
STOPPING_SECONDS = 10
TOO_LONG = "this model's context is"


class StoppingStreamer(DirectStreamer):
    """transformers' streamer, which ends the text before a stop string and keeps the tokens.

    Attributes:
        ids: the tokens so far.
    """

    def __init__(self, *arguments: Any, stops: list[str], **options: Any):
        self.stops = stops
        self.held = ""
        self.ended = False
        self.ids: list[int] = []
        super().__init__(*arguments, **options)

    def put(self, value: torch.Tensor) -> None:
        if not self._first:
            self.ids += value.tolist()
        super().put(value)

    def _enqueue(self, item: Any) -> None:
        if self.ended:
            return
        # Reasoning and tool calls are of other types.
        if type(item) is str and self.stops:
            item = self._before_a_stop(item)
        elif item is None and self.held:
            rest, self.held = self.held, ""
            super()._enqueue(rest)
        if item is None:
            self.ended = True
        if item != "":
            super()._enqueue(item)
        if self.ended and item is not None:
            super()._enqueue(None)

    def _before_a_stop(self, text: str) -> str:
        """What may be shown of the text so far: nothing that could be the beginning of a stop string."""
        self.held += text
        places = [place for place in map(self.held.find, self.stops) if place >= 0]
        if places:
            self.ended = True
            self.cancel()
            return self.held[: min(places)]
        longest = max(map(len, self.stops)) - 1
        keep = next(
            (
                n
                for n in range(min(longest, len(self.held)), 0, -1)
                if any(s.startswith(self.held[-n:]) for s in self.stops)
            ),
            0,
        )
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


class OneAtATime(GenerateManager):
    """A line of requests before one model. A request whose client has gone leaves the line."""

    def __init__(self, context: int | None):
        super().__init__()
        self.context = context
        self.streamers: weakref.WeakSet[StoppingStreamer] = weakref.WeakSet()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """As transformers' own.

        Raises:
            HTTPException: 400 if the prompt alone fills the model's context.
        """
        request = asked.get()
        length = inputs["input_ids"].shape[-1]
        self._check_length(length)
        most = request.most_tokens
        if most is None and request.generation_config is not None:
            most = gen_config.max_new_tokens
        if self.context is not None:
            room = self.context - length
            most = room if most is None else min(most, room)
        # transformers' handlers read it again, to say whether the answer was cut.
        gen_config.max_new_tokens = most if most is not None else gen_config.max_new_tokens
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        streamer = StoppingStreamer(
            processor._tokenizer, loop, queue, response_parser=response_parser, stops=request.stops
        )
        self.streamers.add(streamer)

        def run() -> None:
            try:
                if request.seed is not None:
                    torch.manual_seed(request.seed)
                model.generate(**inputs, streamer=streamer, generation_config=gen_config, tokenizer=processor)
            except _GenerationCancelled:
                loop.call_soon_threadsafe(queue.put_nowait, None)
            except Exception as error:  # it belongs to the request: this thread serves the next one
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(str(error)))

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """As transformers' own: the text, the prompt's tokens, the answer's tokens."""
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces = []
        try:
            while (piece := await queue.get()) is not None:
                if isinstance(piece, _StreamError):
                    raise RuntimeError(piece.msg)
                pieces.append(piece)
        finally:
            streamer.cancel()
        return "".join(pieces), inputs["input_ids"].shape[-1], streamer.ids

    def _check_length(self, length: int) -> None:
        if length == 0:
            raise HTTPException(400, "the prompt is empty: give at least one word")
        if self.context is not None and length >= self.context:
            raise HTTPException(
                400, f"{TOO_LONG} {self.context} tokens, and the prompt alone has {length}: shorten it"
            )

    def stop(self) -> None:
        """End all answers, and wait for the thread: a process must not end within a product."""
        for streamer in self.streamers:
            streamer.cancel()
        self.submit(lambda: None).result(timeout=STOPPING_SECONDS)


class Line(GenerationState):
    """transformers' choice among ways to generate: here there is one."""

    def __init__(self, context: int | None):
        super().__init__()
        self.line = OneAtATime(context)

    def use_continuous_batching(self, model, modality) -> bool:
        return False

    def get_manager(self, model_id, use_cb=False) -> OneAtATime:
        return self.line

    def shutdown(self) -> None:
        self.line.stop()
