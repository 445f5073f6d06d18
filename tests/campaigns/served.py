"""Campaign: hostile requests to `octavo serve`, on transformers' engine.

    python -m tests.campaigns.served --count 2000      # some ten minutes
    python -m tests.campaigns.served --count 50

Each case is one connection with one request that is wrong in one way: values of another kind in the JSON, JSON that is cut,
nested or in another encoding, bytes changed, headers that lie about the body, odd methods and paths, bodies that are too
large, clients that send slowly or leave; some other clients hang on all the time. Rule: whole HTTP gets within 10 s an answer
of the API, or an error in the API's form with a status of 400 to 499; what is no HTTP may get the HTTP server's own 400; and
what was not sent to its end may get nothing. After every 25 cases a right request is answered as at first, and at the end:
memory, open files and threads are about what they were, the log holds no traceback, and the server stops when it is told to."""

import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from octavo import demo

from ..serving.server import Server, serving
from . import runner
from .mutations import HUGE, ODD

SECONDS = 10.0
EVERY = 25
# Of the server, beyond what it had after its first answer.
MORE_BYTES, MORE_FILES, MORE_THREADS = 200 << 20, 30, 40
MOST_BODY = 100_000
SLOW = 5
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
RIGHT = {
    COMPLETE: {"prompt": "La luna brilla", "max_tokens": 4, "temperature": 0},
    CHAT: {"messages": [{"role": "user", "content": "Hola"}], "max_tokens": 2, "temperature": 0},
}
FIELDS = (
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"),
    *("stream", "n", "generation_config", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs"),
    *("response_format", "tool_choice", "tools", "echo", "best_of", "user", "stream_options", "unknown"),
)  # fmt: skip


@dataclass
class Case:
    """What is sent on one connection.

    Args:
        what: was done to the request.
        data: its bytes.
        http: whether they are HTTP; else the HTTP server may answer for itself.
        whole: whether the request is sent to its end; else there may be no answer.
        leave: whether the client goes away without reading.
    """

    what: str
    data: bytes
    http: bool = True
    whole: bool = True
    leave: bool = False


def request(body: bytes, path: str, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    lines = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    lines.update(headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape") + body


def _body(rng: random.Random) -> tuple[str, dict]:
    path = rng.choice(list(RIGHT))
    return path, json.loads(json.dumps(RIGHT[path]))


def _value(rng: random.Random) -> Case:
    """A value of another kind somewhere in the JSON."""
    path, body = _body(rng)
    holder = body
    if path == CHAT and rng.random() < 0.4:
        holder = body["messages"][0]
        key = rng.choice(["role", "content", "name", "tool_calls", "unknown"])
    else:
        key = rng.choice(FIELDS)
    if rng.random() < 0.1:
        holder.pop(key, None)
        return Case(f"{key} is missing", request(json.dumps(body).encode(), path))
    holder[key] = value = rng.choice(
        [*HUGE, *ODD, -1, 0.5, "stop", ["a"] * 100, [{"type": "text", "text": 1}]]
    )
    return Case(f"{key} = {str(value)[:60]!r}", request(json.dumps(body).encode(), path))


def _text(rng: random.Random) -> Case:
    """JSON that is another text."""
    path, body = _body(rng)
    raw = json.dumps(body)
    depth = rng.choice([50, 20_000])
    ways = {
        "nothing": b"",
        "a list": b"[]",
        "null": b"null",
        "a number": b"1e999",
        "cut": raw[: rng.randrange(1, len(raw))].encode(),
        "twice": (raw + raw).encode(),
        "NaN": (raw[:-1] + ', "temperature": NaN}').encode(),
        "infinity": (raw[:-1] + ', "top_p": -Infinity}').encode(),
        "a key twice": (raw[:-1] + ', "max_tokens": "x"}').encode(),
        "many digits": (raw[:-1] + ', "seed": ' + "9" * 5000 + "}").encode(),
        f"lists {depth} deep": (raw[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}").encode(),
        "a lone surrogate": raw.replace("Hola", "\\ud800").replace("La luna", "\\udfff").encode(),
        "null characters": raw.replace("Hola", "\\u0000").replace("La luna", "\\u0000").encode(),
        "a byte order mark": b"\xef\xbb\xbf" + raw.encode(),
        "UTF-16": raw.encode("utf-16"),
        "Latin-1": raw.replace("Hola", "ñ").replace("luna", "ñ").encode("latin-1"),
        "broken UTF-8": raw.replace("Hola", "X").replace("luna", "X").encode().replace(b"X", b"\xc3\x28\xff"),
    }
    what = rng.choice(list(ways))
    return Case(f"JSON: {what}", request(ways[what], path))


def _bytes(rng: random.Random) -> Case:
    """Bytes of the body changed."""
    path, body = _body(rng)
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([1, 1, 4])):
        data[rng.randrange(len(data))] = rng.choice([0, 9, 0x22, 0x5C, 0x7B, 0x7D, 0x80, 0xFF])
    return Case("bytes of the body changed", request(bytes(data), path))


def _headers(rng: random.Random) -> Case:
    """Headers that are odd, but HTTP."""
    path, body = _body(rng)
    raw = json.dumps(body).encode()
    name, value = rng.choice(
        [
            *(("Host", host) for host in ("evil.example", "", "127.0.0.1:99999", "[::1", "localhost", "é", "a" * 5000)),
            *(("Origin", origin) for origin in ("http://evil.example", "null", "http://[", "http://127.0.0.1")),
            *(("Content-Type", kind) for kind in ("text/plain", "", "multipart/form-data", "application/json; charset=utf-16")),
            *(("Authorization", key) for key in ("Bearer é", "Bearer", "Basic x", "a" * 5000)),
            ("Content-Encoding", "gzip"),
            ("Accept", "é"),
            ("X-Request-Id", "a" * 1000),
            ("x-request-id", "é"),
            ("Expect", "100-continue"),
            ("Upgrade", "websocket"),
            ("Cookie", "a" * 8000),
        ]
    )  # fmt: skip
    return Case(f"{name}: {value[:40]!r}", request(raw, path, {name: value}))


def _no_http(rng: random.Random) -> Case:
    """Headers that lie about the body, or bytes that are no HTTP."""
    path, body = _body(rng)
    raw = json.dumps(body).encode()
    right = request(raw, path)
    ways: dict[str, Callable[[], bytes]] = {
        **{
            f"Content-Length: {size}": lambda size=size: request(raw, path, {"Content-Length": size})
            for size in ("-1", "x", "1e3", "", "0x10", str(2**64), "5, 6")
        },
        "a length too small": lambda: request(raw, path, {"Content-Length": str(len(raw) - 7)}),
        "chunks of no size": lambda: request(b"zz\r\n" + raw, path, {"Transfer-Encoding": "chunked"}),
        "a chunk of 2^64 bytes": lambda: request(
            b"ffffffffffffffff1\r\n" + raw, path, {"Transfer-Encoding": "chunked"}
        ),
        "an encoding of transfer": lambda: request(raw, path, {"Transfer-Encoding": "gzip, identity"}),
        "a header of 200 kB": lambda: request(raw, path, {"X": "a" * 200_000}),
        "2000 headers": lambda: request(raw, path, {f"X-{n}": "a" for n in range(2000)}),
        "a header without a colon": lambda: right.replace(b"\r\n", b"\r\nnonsense\r\n", 1),
        "a null in a header": lambda: right.replace(b"Host: ", b"Host: \x00", 1),
        "HTTP/9.9": lambda: right.replace(b"HTTP/1.1", b"HTTP/9.9", 1),
        "HTTP/1.0": lambda: right.replace(b"HTTP/1.1", b"HTTP/1.0", 1),
        "no version": lambda: right.replace(b" HTTP/1.1", b"", 1),
        "another protocol": lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(100),
        "HTTP/2": lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(50),
        "noise": lambda: rng.randbytes(rng.choice([1, 100, 10_000])) + b"\r\n\r\n",
        "bytes of the head changed": lambda: _changed(right, len(right) - len(raw), rng),
    }
    what = rng.choice(list(ways))
    return Case(f"no HTTP: {what}", ways[what](), http=False, whole=False)


def _changed(data: bytes, until: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 4])):
        changed[rng.randrange(until)] = rng.randrange(256)
    return bytes(changed)


def _place(rng: random.Random) -> Case:
    """Methods and paths that are not there."""
    path, body = _body(rng)
    raw = json.dumps(body).encode()
    method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "POST", "FROB"])
    where = rng.choice(
        [
            *(path, path + "/", path + "?x=" + "a" * 3000, "//", "/../../etc/passwd", "/%00", "/%ff%fe", "/v1/models"),
            *("/v1/models/../x", "/docs", "/openapi.json", "/load_model", "/" + "a" * 5000, "/metrics", "/info", "*"),
        ]
    )  # fmt: skip
    return Case(f"{method} {where[:40]}", request(raw, where, method=method))


def _large(rng: random.Random) -> Case:
    path, body = _body(rng)
    size = rng.choice([MOST_BODY - 200, MOST_BODY + 1, 3_000_000])
    if path == CHAT:
        body["messages"][0]["content"] = "a" * size
    else:
        body["prompt"] = "a " * (size // 2)
    raw = json.dumps(body).encode()
    if rng.random() < 0.3:
        chunks = (
            b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (raw[:1000], raw[1000:])) + b"0\r\n\r\n"
        )
        data = request(chunks, path, {"Transfer-Encoding": "chunked"})
        return Case(f"{len(raw)} bytes in chunks", data.replace(b"Content-Length: %d\r\n" % len(chunks), b""))
    return Case(f"{len(raw)} bytes", request(raw, path))


def _unfinished(rng: random.Random) -> Case:
    """A client that sends a part, or asks for a long answer and goes away."""
    path, body = _body(rng)
    if rng.random() < 0.5:
        body.update(max_tokens=400, stream=rng.random() < 0.5)
        return Case("left before the answer", request(json.dumps(body).encode(), path), leave=True)
    data = request(json.dumps(body).encode(), path)
    return Case("a part of a request", data[: rng.randrange(1, len(data))], whole=False, leave=True)


KINDS = [
    *[_value] * 8,
    *[_text] * 4,
    *[_bytes] * 2,
    *[_headers] * 2,
    *[_no_http] * 3,
    _place,
    _large,
    _unfinished,
]


def send(server: Server, case: Case) -> tuple[bytes, str]:
    """Returns (the answer's bytes, what went wrong with the connection)."""
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
        try:
            connection.sendall(case.data)
            if case.leave:
                return b"", ""
            if not case.whole:
                # So that a server which waits for more learns that nothing comes.
                connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(1 << 16):
                parts.append(part)
            return b"".join(parts), ""
        except TimeoutError:
            return b"", f"no answer within {SECONDS:.0f} s"
        except OSError as error:
            # A refused body of some megabytes: the answer may be lost with the connection.
            return b"", "" if len(
                case.data
            ) > MOST_BODY or not case.http else f"{type(error).__name__}: {error}"


def judged(case: Case, answer: bytes) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if not answer:
        return "" if case.leave or not case.whole or len(case.data) > MOST_BODY else "no answer"
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    try:
        status = int(head.split(b" ", 2)[1])
    except (IndexError, ValueError):
        return f"an answer that is no HTTP: {answer[:80]!r}"
    if 200 <= status < 300:
        return ""
    if not 400 <= status < 500:
        return f"status {status}: {body[:300]!r}"
    if case.data.startswith(b"HEAD"):
        return ""
    try:
        error = json.loads(body)["error"]
        if isinstance(error["message"], str) and error["message"] and {"type", "param", "code"} <= set(error):
            return ""
    except (ValueError, KeyError, TypeError):
        if not case.http:
            return ""
    return f"status {status}, not in the API's form: {body[:300]!r}"


def greeting(server: Server) -> str:
    """The text that a right request gets."""
    answer, wrong = send(server, Case("", request(json.dumps(RIGHT[COMPLETE]).encode(), COMPLETE)))
    try:
        return json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"]
    except (ValueError, KeyError):
        return f"no right answer: {wrong or answer[-300:]!r}"


def campaign(
    count: int, seed: int, seconds: float | None = None, say=print
) -> tuple[dict[str, int], list[str]]:
    """Returns (kind of request → cases, faults)."""
    table: Counter = Counter()
    faults: list[str] = []

    def fault(text: str) -> None:
        faults.append(text)
        say(text)

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ("--engine", "transformers", "--max-body", f"{MOST_BODY // 1000}KB")
        with serving(demo.MODEL, *options, log=log, CUDA_VISIBLE_DEVICES="") as server:
            expected = greeting(server)
            process = psutil.Process(server.process.pid)
            before = (process.memory_info().rss, process.num_fds(), process.num_threads())
            slow: list[socket.socket] = []
            for number in runner.numbers(seed, count, seconds):
                rng = random.Random(f"request {number}")
                kind = rng.choice(KINDS)
                case = kind(rng)
                table[kind.__name__.strip("_")] += 1
                if number % EVERY == 0:
                    # Clients that have sent a beginning and hang on.
                    slow.append(socket.create_connection(("127.0.0.1", server.port)))
                    slow[-1].sendall(
                        request(b"{" * 10, COMPLETE, {"Content-Length": "100"})[: rng.choice([5, 60, 1000])]
                    )
                    if len(slow) > SLOW:
                        slow.pop(0).close()
                try:
                    answer, wrong = send(server, case)
                except OSError as error:
                    answer, wrong = b"", f"cannot connect: {error}"
                if wrong := wrong or judged(case, answer):
                    fault(f"--seed {number} --count 1: {case.what}: {wrong}")
                if server.process.poll() is not None:
                    fault(f"--seed {number}: the server ended: {server.said()[-1000:]}")
                    return dict(table), faults
                if (number - seed) % EVERY == EVERY - 1 and (found := greeting(server)) != expected:
                    fault(
                        f"--seed {number}: after this a right request gets {found!r}, at first {expected!r}"
                    )
            for each in slow:
                each.close()
            time.sleep(2)
            after = (process.memory_info().rss, process.num_fds(), process.num_threads())
            limits = (MORE_BYTES, MORE_FILES, MORE_THREADS)
            for what, old, new, more in zip(
                ("memory", "files", "threads"), before, after, limits, strict=True
            ):
                if new > old + more:
                    fault(f"{what}: {old} at first, {new} at the end")
            status = server.terminate()
            if status:
                fault(f"told to stop, the server ended with {status}")
            if "Traceback" in server.log.read_text(errors="replace"):
                fault(f"a traceback in the log: {server.log.read_text(errors='replace')[-3000:]}")
    return dict(table), faults


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = runner.parser(__doc__, 50, "requests").parse_args()
    table, faults = campaign(options.count, options.seed, options.seconds, runner.say)
    runner.say(table)
    return runner.finish(options, table, faults)


if __name__ == "__main__":
    sys.exit(main())
