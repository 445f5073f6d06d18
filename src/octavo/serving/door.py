"""The door before an engine: which parts of its API are open, to whom, how much of it at a time; and the chat page.

Both engines are ASGI applications with OpenAI's API (transformers' server, vLLM), and `Door` is a middleware around either:

    request → known path? → key, or a page of this machine → a free place → a body that is not too large → engine
            → the answer, until it ends, the client goes away, or its time is up

Errors have the form of OpenAI's API: {"error": {"message": ..., "type": ..., "param": null, "code": ...}}.

Example:
    >>> settings = Settings(model="my-model", engine="vLLM 0.32", url="http://127.0.0.1:8000")
    >>> app = Door(lambda scope, receive, send: None, settings)       # an ASGI application around another
"""

import asyncio
import hmac
import ipaddress
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from .page import HEADERS, PAGE

Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]

# The variable through which settings reach a process of vLLM.
VARIABLE = "OCTAVO_SERVE"
OPEN = {("GET", "/"), ("GET", "/health")}
WITH_KEY = {
    ("GET", "/info"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    # What `transformers chat` asks first.
    ("POST", "/load_model"),
}
# Seconds for a body to arrive, and for an engine to end a request by itself once its client has gone.
BODY_SECONDS, LEAVING_SECONDS = 30, 0.5
# Between two looks at whether vLLM's engine still runs.
STOPPED_SECONDS = 0.5
# Of a body that is too large so much is read and dropped: who still sends does not read the answer.
DROPPED_BYTES = 2**28


@dataclass(frozen=True)
class Settings:
    """What the door knows of the model, and what it lets through.

    Attributes:
        model: name under which the model is served.
        engine: the engine and its version, for people.
        url: where the page is.
        chat: whether the model takes turns; otherwise the page lets it continue a text.
        context: tokens of prompt and answer together; None: unknown.
        api_key: what a request must bring; None: only requests from pages and programs of this machine are let in.
        max_requests: requests at a time, running and waiting.
        max_body: bytes of a request.
        max_seconds: of a request, from its arrival to the end of its answer.
    """

    model: str
    engine: str
    url: str
    chat: bool = True
    context: int | None = None
    api_key: str | None = None
    max_requests: int = 64
    max_body: int = 8 * 10**6
    max_seconds: float = 600

    def to_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


class Door:
    """ASGI middleware; without settings it takes them from the environment, as vLLM's `--middleware` needs it."""

    def __init__(self, app, settings: Settings | None = None):
        self.app = app
        self.settings = settings or Settings(**json.loads(os.environ[VARIABLE]))
        self.requests = 0
        self.closing = asyncio.Event()

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._announcing(send))
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(scope, receive, send)

    def _announcing(self, send: Send) -> Send:
        async def announce(message: dict) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                print(f"{self.settings.model} is ready: {self.settings.url} (Ctrl-C stops)", flush=True)

        return announce

    def close(self) -> None:
        """End all requests, each in a way that its client can read."""
        self.closing.set()

    async def _stopped(self, scope: dict) -> None:
        """Wait until the server stops. vLLM stops its engine first, and leaves who waits for an answer waiting."""
        state = getattr(scope.get("app"), "state", None)
        engine = getattr(state, "engine_client", None)
        while engine is not None and not engine.errored and not self.closing.is_set():
            await asyncio.sleep(STOPPED_SECONDS)
        if engine is None:
            await self.closing.wait()

    async def _http(self, scope: dict, receive: Receive, send: Send) -> None:
        path = scope["path"]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        if (method, path) not in OPEN | WITH_KEY:
            known = any(path == other for _, other in OPEN | WITH_KEY)
            message = f"{method} is not answered at {path}" if known else f"there is nothing at {path}"
            await refuse(send, 405 if known else 404, message, "not_found")
        elif path == "/":
            await respond(send, 200, PAGE, HEADERS)
        elif path == "/health":
            await self.app(scope, receive, send)
        elif not self._admits(headers):
            await self._turn_away(headers, send)
        elif path in ("/metrics", "/v1/models"):
            await self.app(scope, receive, send)
        elif path == "/info":
            shown = {name: getattr(self.settings, name) for name in ("model", "engine", "chat", "context")}
            await respond(send, 200, json.dumps(shown).encode(), {"content-type": "application/json"})
        elif path == "/load_model":
            ready = json.dumps({"status": "ready", "model": self.settings.model, "cached": True})
            await respond(send, 200, f"data: {ready}\n\n".encode(), {"content-type": "text/event-stream"})
        elif self.requests >= self.settings.max_requests:
            await _drop(receive, BODY_SECONDS)
            message = f"{self.requests} requests are running or waiting already; try again in a while"
            await refuse(send, 429, message, "rate_limit_exceeded", {"retry-after": "2"})
        else:
            self.requests += 1
            try:
                await self._generate(scope, headers, receive, send)
            finally:
                self.requests -= 1

    def _admits(self, headers: dict[str, str]) -> bool:
        if self.settings.api_key is not None:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            return hmac.compare_digest(given.encode(), self.settings.api_key.encode())
        # A page of another site may send requests to this machine, also under a name of its own for it.
        origin = headers.get("origin")
        try:
            own = is_loopback(urlsplit(f"//{headers.get('host', '')}").hostname or "")
            return own and (origin is None or urlsplit(origin).netloc == headers.get("host"))
        except ValueError:  # brackets that do not match
            return False

    async def _turn_away(self, headers: dict[str, str], send: Send) -> None:
        if self.settings.api_key is None:
            message = (
                "without a key only this machine's own programs and pages are answered, under 127.0.0.1 or localhost; "
                "start `octavo serve` with --api-key to be asked under other names"
            )
            await refuse(send, 403, message, "not_local")
        else:
            found = "another key" if "authorization" in headers else "no key"
            message = f"expected the server's key as `Authorization: Bearer KEY`, found {found}"
            await refuse(send, 401, message, "invalid_api_key", {"www-authenticate": "Bearer"})

    async def _generate(self, scope: dict, headers: dict[str, str], receive: Receive, send: Send) -> None:
        limit = self.settings.max_body
        try:
            body, more = await asyncio.wait_for(_read(receive, limit), BODY_SECONDS)
        except asyncio.TimeoutError:
            await refuse(send, 408, f"the request was not complete after {BODY_SECONDS} s", "request_timeout")
            return
        if body is None:
            if more:
                await _drop(receive, BODY_SECONDS)
            message = f"a request has at most {limit:,} bytes here (octavo serve --max-body)"
            await refuse(send, 413, message, "request_too_large", {"connection": "close"})
            return
        await self._run(scope, body, receive, send)

    async def _run(self, scope: dict, body: bytes, receive: Receive, send: Send) -> None:
        """Run the engine; end it when the client goes away or time is up."""
        gone, given = asyncio.Event(), False
        answer = _Answer(send)

        async def replay() -> dict:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        engine = asyncio.ensure_future(self.app(scope, replay, answer.send))
        watcher, closing = asyncio.ensure_future(watch()), asyncio.ensure_future(self._stopped(scope))
        try:
            await asyncio.wait(
                (engine, watcher, closing),
                timeout=self.settings.max_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if engine.done():
                await engine
                return
            left = watcher.done()
            gone.set()
            if left:
                await asyncio.wait((engine,), timeout=LEAVING_SECONDS)
            await _cancelled(engine)
            if closing.done():
                await answer.end("the server is stopping")
            elif not left:
                await answer.end(f"the answer took longer than {self.settings.max_seconds:g} s")
        finally:
            for task in (engine, watcher, closing):
                await _cancelled(task)


class _Answer:
    """What has been sent of an answer, so that one that is broken off ends as its client can read."""

    def __init__(self, send: Send):
        self._send = send
        self.started = self.finished = self.events = False

    async def send(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = dict(message.get("headers", ()))
            self.events = b"text/event-stream" in headers.get(b"content-type", b"")
        elif message["type"] == "http.response.body":
            self.finished = not message.get("more_body", False)
        await self._send(message)

    async def end(self, reason: str) -> None:
        if self.finished:
            return
        if not self.started:
            await refuse(self._send, 503, reason, "unavailable", {"retry-after": "5"})
            return
        last = f"data: {json.dumps(error_body(reason, 503, 'unavailable'))}\n\n" if self.events else ""
        await self._send({"type": "http.response.body", "body": last.encode(), "more_body": False})


async def _cancelled(task: asyncio.Future) -> None:
    """Cancel a task and wait until it has ended; what it raises no longer matters to anyone."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _read(receive: Receive, limit: int) -> tuple[bytes | None, bool]:
    """A request's body, or None as soon as it is longer than `limit` bytes; and whether more of it is to come."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts), False
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > limit:
            return None, more
        if not more:
            return b"".join(parts), False


async def _drop(receive: Receive, seconds: float) -> None:
    """Read a body to its end and keep nothing."""

    async def drop() -> None:
        size = 0
        while size < DROPPED_BYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(drop(), seconds)
    except asyncio.TimeoutError:
        return


def error_body(message: str, status: int, code: str) -> dict:
    """An error in the form of OpenAI's API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def refuse(
    send: Send, status: int, message: str, code: str, headers: dict[str, str] | None = None
) -> None:
    """Send an error in the form of OpenAI's API."""
    body = json.dumps(error_body(message, status, code)).encode()
    await respond(send, status, body, {"content-type": "application/json", **(headers or {})})


async def respond(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, out of reach for others."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
