"""transformers' own server over one model of ours that is loaded before the first request.

transformers' parts are used as they are (`transformers.cli.serving`); what they lack is set right in classes of ours that
derive from them: `/v1/models` lists the model, requests are checked, errors have the form of OpenAI's API.

Example:
    >>> run(model, tokenizer, settings, listening_socket)  # doctest: +SKIP
"""

import asyncio
import inspect
import json
import signal
import time
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import get_response_template
from transformers.utils import logging

from .answering import TOO_LONG, Line, asked
from .door import Door, Settings, error_body
from .requests import ChatRequest, CompletionRequest, Request, explained

# Until answers that run are broken off, when the server is told to stop.
GRACE_SECONDS = 5


class OneModel(ModelManager):
    """transformers' manager of models, with one that is there and stays."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        super().__init__(model_timeout=-1)
        self.name = self.force_model = name
        self.model, self.tokenizer = model, tokenizer
        self.created = int(time.time())

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "created": self.created, "owned_by": "octavo"}]


class _Checked:
    """What both of transformers' handlers lack; stands before them in the order of methods."""

    request_class: type[Request]
    model_manager: Any

    async def handle_request(self, body: dict, request_id: str) -> Any:
        try:
            request = self.request_class.model_validate(body)
        except ValidationError as error:
            raise HTTPException(400, explained(error)) from error
        asked.set(request)
        self._resolve_model(body)
        if "messages" in body and not self.model_manager.tokenizer.chat_template:
            raise HTTPException(
                400, "this model has no chat template, it continues texts: ask at /v1/completions"
            )
        if isinstance(body.get("prompt"), list):
            body = {**body, "prompt": body["prompt"][0]}
        manager = self.model_manager
        if body.get("tools") and get_response_template(manager.tokenizer, manager.model) is None:
            raise HTTPException(
                400,
                "tools: this engine does not know how this model writes its calls; leave them out, or serve it with vLLM",
            )
        try:
            response = await super().handle_request(body, request_id)  # type: ignore[misc]
        except (ValueError, TypeError, TemplateError) as error:
            # Of a template: there is none, or these messages do not fit it.
            raise HTTPException(400, str(error).splitlines()[0]) from error
        if isinstance(response, StreamingResponse):
            response.body_iterator = _with_end(response.body_iterator)
        elif request.stops:
            response = _cut(response, request.stops)
        return response

    def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
        manager = self.model_manager
        if body.get("model") not in (None, manager.name):
            raise HTTPException(
                404, f"the model {body['model']!r} does not exist; this server has {manager.name!r}"
            )
        return manager.name, manager.model, manager.tokenizer

    def _build_generation_config(self, body: dict, model_generation_config: Any, use_cb: bool = False) -> Any:
        """OpenAI's meaning: without a temperature it is 1, and nothing but top_p cuts the distribution."""
        # `OneAtATime` sees to these.
        ours = {name: value for name, value in body.items() if name not in ("stop", "seed")}
        config = super()._build_generation_config(ours, model_generation_config, use_cb=use_cb)  # type: ignore[misc]
        if body.get("generation_config") is not None:
            return config
        config.do_sample = body.get("temperature") != 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        elif body.get("temperature") is None:
            config.temperature = model_generation_config.temperature or 1.0
        if config.do_sample and config.top_k is None:
            config.top_k = 0
        return config


class Chat(_Checked, ChatCompletionHandler):
    request_class = ChatRequest


class Completion(_Checked, CompletionHandler):
    request_class = CompletionRequest


async def _with_end(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The stream with OpenAI's last event, which transformers leaves out."""
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"


def _cut(response: JSONResponse, stops: list[str]) -> JSONResponse:
    """The answer before a stop string. (Where transformers parses a model's answer, it does so from the tokens.)"""
    content = json.loads(bytes(response.body))
    for choice in content["choices"]:
        holder, field = (choice["message"], "content") if "message" in choice else (choice, "text")
        text = holder.get(field) or ""
        holder[field] = text[
            : min((place for place in map(text.find, stops) if place >= 0), default=len(text))
        ]
    return JSONResponse(content)


def build_app(model: Any, tokenizer: Any, settings: Settings) -> FastAPI:
    """transformers' application over one model. Routes that no handler is given for are behind `Door`."""
    manager, state = OneModel(settings.model, model, tokenizer), Line(settings.context)
    parts: dict[str, Any] = {
        "model_manager": manager,
        "generation_state": state,
        "chat_handler": Chat(manager, state),
        "completion_handler": Completion(manager, state),
    }
    others = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    app = build_server(**{**dict.fromkeys(others), **parts})
    app.state.generation = state

    @app.exception_handler(StarletteHTTPException)
    async def _refused(_request: Any, error: StarletteHTTPException) -> JSONResponse:
        code = "model_not_found" if error.status_code == 404 else "invalid_request"
        if str(error.detail).startswith(TOO_LONG):
            code = "context_length_exceeded"
        return JSONResponse(error_body(str(error.detail), error.status_code, code), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def _malformed(_request: Any, error: RequestValidationError) -> JSONResponse:
        found = "; ".join(str(problem["msg"]) for problem in error.errors())
        return JSONResponse(error_body(f"expected a JSON object: {found}", 400, "invalid_json"), 400)

    @app.exception_handler(Exception)
    async def _failed(_request: Any, error: Exception) -> JSONResponse:
        return JSONResponse(
            error_body(f"the request failed: {type(error).__name__}", 500, "internal_error"), 500
        )

    return app


class _Server(uvicorn.Server):
    """uvicorn, which breaks connections off when its patience ends; the door ends the answers before that."""

    def __init__(self, config: uvicorn.Config, door: Door):
        super().__init__(config)
        self.door = door

    async def shutdown(self, sockets: list | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self.door.close)
        await super().shutdown(sockets)


def run(model: Any, tokenizer: Any, settings: Settings, listening: Any) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        model, tokenizer: as `octavo.load` and `octavo.load_tokenizer` give them.
        listening: a bound socket.
    """
    # It would log each request, and flags that we unset on purpose.
    logging.set_verbosity_error()
    app = build_app(model, tokenizer, settings)
    door = Door(app, settings)
    config = uvicorn.Config(
        door, log_level="warning", timeout_graceful_shutdown=2 * GRACE_SECONDS, timeout_keep_alive=30
    )
    # uvicorn ends cleanly, and then raises the signal once more, for handlers that were there before.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        _Server(config, door).run(sockets=[listening])
    finally:
        app.state.generation.shutdown()
