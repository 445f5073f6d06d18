"""The door before an engine, before a small ASGI application that the test controls."""

import asyncio
import json

import httpx2 as httpx
import pytest

from octavo.serving.door import VARIABLE, Door, Settings, is_loopback

LOCAL = Settings(model="m", engine="e", url="http://127.0.0.1:8000", max_body=1000)


class Engine:
    """Answers a body's JSON with itself; streams and waits if the body says so."""

    def __init__(self):
        self.cancelled = 0
        self.running = 0
        self.release = asyncio.Event()

    async def __call__(self, scope, receive, send):
        body = (await receive()).get("body", b"{}")
        asked = json.loads(body or b"{}")
        self.running += 1
        try:
            kind = "text/event-stream" if asked.get("stream") else "application/json"
            start = {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", kind.encode())],
            }
            if asked.get("stream"):
                await send(start)
                await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            if asked.get("wait"):
                await self.release.wait()
            if not asked.get("stream"):
                await send(start)
            await send({"type": "http.response.body", "body": body})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


def client(engine, settings=LOCAL, host="127.0.0.1:8000"):
    return httpx.AsyncClient(transport=httpx.ASGITransport(Door(engine, settings)), base_url=f"http://{host}")


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/v1/models", 200),
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/reset", 404),
        ("POST", "/load_model", 200),
        ("GET", "/load_model", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_routes(method, path, status):
    async def ask():
        async with client(Engine()) as door:
            return await door.request(method, path, content=b"{}")

    answer = run(ask())
    assert answer.status_code == status
    if status >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_key():
    async def ask(**headers):
        settings = Settings(**{**LOCAL.__dict__, "api_key": "abc"})
        async with client(Engine(), settings, "example.org") as door:
            return (await door.get("/v1/models", headers=headers)).status_code, (
                await door.get("/")
            ).status_code

    assert run(ask()) == (401, 200)
    assert run(ask(authorization="Bearer abcd")) == (401, 200)
    assert run(ask(authorization="Bearer é".encode())) == (401, 200)
    assert run(ask(authorization="Bearer abc")) == (200, 200)


def test_without_a_key_other_sites_are_turned_away():
    async def ask(host, **headers):
        async with client(Engine(), host=host) as door:
            return (await door.post("/v1/completions", content=b"{}", headers=headers)).status_code

    assert run(ask("127.0.0.1:8000")) == 200
    assert run(ask("localhost:8000", origin="http://localhost:8000")) == 200
    assert run(ask("[::1]:8000")) == 200
    assert run(ask("rebound.example:8000")) == 403
    assert run(ask("127.0.0.1:8000", origin="http://evil.example")) == 403
    assert run(ask("127.0.0.1:8000", origin="null")) == 403


def test_too_large_and_too_many():
    async def ask():
        engine = Engine()
        async with client(engine, Settings(**{**LOCAL.__dict__, "max_requests": 2})) as door:
            large = await door.post("/v1/completions", content=b"x" * 1001)
            waiting = [
                asyncio.create_task(door.post("/v1/completions", content=b'{"wait": 1}')) for _ in range(2)
            ]
            while engine.running < 2:
                await asyncio.sleep(0.01)
            third = await door.post("/v1/completions", content=b"{}")
            engine.release.set()
            done = [answer.status_code for answer in await asyncio.gather(*waiting)]
            again = await door.post("/v1/completions", content=b"{}")
        return large, third, done, again

    large, third, done, again = run(ask())
    assert large.status_code == 413
    assert (third.status_code, third.headers["retry-after"]) == (429, "2")
    assert done == [200, 200]
    assert again.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up(stream):
    async def ask():
        engine = Engine()
        async with client(engine, Settings(**{**LOCAL.__dict__, "max_seconds": 0.2})) as door:
            answer = await door.post("/v1/completions", content=json.dumps({"wait": 1, "stream": stream}))
        return answer, engine

    answer, engine = run(ask())
    assert engine.cancelled == 1
    if stream:
        assert "longer than 0.2 s" in json.loads(answer.text.split("data: ")[-1])["error"]["message"]
    else:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_client_that_leaves_ends_its_request():
    async def ask():
        engine = Engine()
        door = Door(engine, LOCAL)
        left = asyncio.Event()
        messages = [{"type": "http.request", "body": b'{"wait": 1}'}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"host", b"localhost")],
        }
        running = asyncio.create_task(door(scope, receive, send))
        while not engine.running:
            await asyncio.sleep(0.01)
        assert door.requests == 1
        left.set()
        await running
        return engine.cancelled, door.requests

    assert run(ask()) == (1, 0)


def test_settings_travel_by_the_environment(monkeypatch):
    for name, value in LOCAL.to_environment().items():
        monkeypatch.setenv(name, value)
    assert Door(None).settings == LOCAL
    assert set(LOCAL.to_environment()) == {VARIABLE}


def test_loopback():
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["0.0.0.0", "192.168.1.2", "example.org", "", "localhost.evil.example"]))


def test_a_stopped_engine_ends_what_waits_for_it():
    """vLLM's state, as Starlette puts it into a request's scope; and the server's own end."""

    async def ask(stop):
        engine = Engine()
        door = Door(engine, LOCAL)
        client = type("Client", (), {"errored": False})()
        app = type("App", (), {"state": type("State", (), {"engine_client": client})()})()
        sent = []

        async def receive():
            if not sent:
                sent.append(None)
                return {"type": "http.request", "body": b'{"wait": 1, "stream": 1}'}
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"host", b"localhost")],
        }
        running = asyncio.create_task(door({**scope, "app": app} if stop == "vllm" else scope, receive, send))
        while not engine.running:
            await asyncio.sleep(0.01)
        if stop == "vllm":
            client.errored = True
        else:
            door.close()
        await running
        return sent[-1]

    for stop in ("vllm", "server"):
        last = run(ask(stop))
        assert b"the server is stopping" in last["body"]
        assert last["more_body"] is False


def asked_directly(headers: list[tuple[bytes, bytes]], body: bytes) -> list[dict]:
    """What the door sends for a whole request in one message, after which its client waits and sends nothing."""

    async def ask() -> list[dict]:
        sent: list[dict] = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop()
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        await asyncio.wait_for(Door(Engine(), LOCAL)(scope, receive, send), 5)
        return sent

    return run(ask())


def test_a_body_that_is_too_large_and_there_is_refused_at_once():
    """Nothing more comes of it: waiting for the rest took half a minute."""
    sent = asked_directly([(b"host", b"127.0.0.1")], b" " * (LOCAL.max_body + 1))
    assert sent[0]["status"] == 413 and json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    "headers",
    [
        [(b"host", b"[::1")],
        [(b"host", b"127.0.0.1:8000"), (b"origin", b"http://[")],
        [(b"host", b"\xe9\x00")],
        [(b"host", b"127.0.0.1"), (b"host", b"evil.example")],
    ],
)
def test_headers_that_are_no_addresses_are_not_let_in(headers):
    sent = asked_directly(headers, b"{}")
    assert sent[0]["status"] == 403 and json.loads(sent[1]["body"])["error"]["code"] == "not_local"
