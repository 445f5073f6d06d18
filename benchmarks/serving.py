"""A server under load: many clients at a time for minutes, each answer compared with the one computed alone.

    python -m benchmarks.serving --engine transformers --clients 32 --seconds 300
    .venv-vllm/bin/python -m benchmarks.serving --engine vllm --clients 32 --seconds 300 --out benchmarks/results/serving.json
    .venv-vllm/bin/python -m benchmarks.serving --engine vllm --weights float32 --clients 1 8 32 --seconds 60

The server is `octavo serve` on the model that ships with the project, or on --model; with --weights float32 or bfloat16 it is
vLLM on the model as it is, to compare with. Clients ask greedily, by streams. One request in ten is left in its middle. In the
end the server gets SIGTERM while four answers come in.

What is counted: answers that differ from the one computed alone, failures (429 and 503 with Retry-After are waited for, and are
none), seconds to the first token and tokens per second of each answer (p50, p99), tokens per second of all together, memory of
the server's processes (a fifth into the time, and at its end), and how long a request takes once all clients have gone.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

from octavo.cli.doctor import processor_name

BEGINNINGS = (
    "El sentido de la vida es",
    "Había una vez un rey que",
    "En el principio",
    "La ciudad de Madrid",
    "El agua del río",
    "Cuando llegó la noche,",
    "Los hombres de aquel tiempo",
    "Una tarde de verano",
    "Dijo el maestro:",
    "La guerra",
    "El programa lee",
    "En la casa de mi padre",
    "El viento del norte y el sol",
    "No hay mal que",
    "La reina miró",
    "Tres días después",
)
LEAVING = 0.1
STARTING_SECONDS, ENDING_SECONDS = 600, 60


@dataclass
class Counts:
    """What clients saw."""

    answers: int = 0
    different: int = 0
    left: int = 0
    waited: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    tokens: int = 0

    def failed(self, how: str) -> None:
        self.failures[how] = self.failures.get(how, 0) + 1


class Running:
    """A server and what it was started as."""

    def __init__(self, options: argparse.Namespace, model: Path, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        if options.weights == "octavo":
            command = ["-m", "octavo", "serve", str(model), "--port", port, "--engine", options.engine]
            command += ["--max-requests", str(options.max_requests), "--name", "model"]
            command += ["--", *options.vllm] if options.vllm else []
        else:
            command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", port]
            command += ["--dtype", options.weights, "--served-model-name", "model"]
            command += ["--shutdown-timeout", "5", *options.vllm]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("wb") as file:
            self.process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file)
        started = time.monotonic()
        while time.monotonic() - started < STARTING_SECONDS:
            if self.process.poll() is not None:
                break
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    self.loading = time.monotonic() - started
                    return
            time.sleep(0.5)
        self.kill()
        raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")

    def memory(self) -> float:
        """MB of the server's processes; what they share counts once."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += process.memory_full_info().pss
        return total / 1e6

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


async def answer(
    client: httpx.AsyncClient,
    url: str,
    prompt: str,
    tokens: int,
    counts: Counts,
    leave_after: int | None = None,
) -> str | None:
    """One answer, streamed; None if it failed, was refused for a while, or was left after so many pieces."""
    body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    started, first, last, pieces, used = time.monotonic(), 0.0, 0.0, [], 0
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code in (429, 503) and "retry-after" in response.headers:
                counts.waited += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
                return None
            if response.status_code != 200:
                counts.failed(f"status {response.status_code}")
                return None
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    counts.failed(f"error event: {str(event['error'])[:80]}")
                    return None
                used = (event.get("usage") or {}).get("completion_tokens", used)
                piece = event["choices"][0]["text"] if event["choices"] else ""
                if piece:
                    last = time.monotonic()
                    first = first or last
                    pieces.append(piece)
                if leave_after is not None and len(pieces) >= leave_after:
                    counts.left += 1
                    return None
    except httpx.HTTPError as error:
        counts.failed(type(error).__name__)
        return None
    counts.answers += 1
    counts.tokens += used
    counts.first.append((first or time.monotonic()) - started)
    if used > 1 and last > first:
        counts.speeds.append((used - 1) / (last - first))
    return "".join(pieces)


async def load(
    server: Running, alone: dict[str, str], clients: int, options: argparse.Namespace
) -> dict[str, Any]:
    """So many clients for so long."""
    counts, memory = Counts(), []
    end = time.monotonic() + options.seconds

    async def one(number: int) -> None:
        choice = random.Random(number)
        async with httpx.AsyncClient(timeout=600) as client:
            while time.monotonic() < end:
                prompt = choice.choice(BEGINNINGS)
                leave = choice.randrange(1, options.tokens) if choice.random() < LEAVING else None
                text = await answer(client, server.url, prompt, options.tokens, counts, leave)
                if text is not None and text != alone[prompt]:
                    counts.different += 1

    async def watch() -> None:
        while True:
            memory.append(await asyncio.to_thread(server.memory))
            await asyncio.sleep(1)

    watching = asyncio.ensure_future(watch())
    started = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(clients)))
    seconds = time.monotonic() - started
    watching.cancel()
    # A client that left must not hold a place: the next answer comes as fast as on a server at rest.
    after = Counts()
    async with httpx.AsyncClient(timeout=600) as client:
        await answer(client, server.url, BEGINNINGS[0], options.tokens, after)
    settled = memory[len(memory) // 5 :]
    return {
        "clients": clients,
        "seconds": round(seconds, 1),
        "answers": counts.answers,
        "different": counts.different,
        "left": counts.left,
        "told to wait": counts.waited,
        "failures": counts.failures,
        "first token s": quantiles(counts.first),
        "tokens/s of one": quantiles(counts.speeds, low=True),
        "tokens/s of all": round(counts.tokens / seconds, 1),
        "memory MB": [round(settled[0]), round(settled[-1])],
        "first token after, s": round(after.first[0], 3) if after.first else None,
    }


def quantiles(values: list[float], low: bool = False) -> list[float] | None:
    """The median, and what 99 of 100 are better than."""
    if not values:
        return None
    ordered = sorted(values, reverse=low)
    return [round(ordered[min(len(ordered) - 1, int(len(ordered) * part))], 3) for part in (0.5, 0.99)]


async def end_in_mid_stream(server: Running, tokens: int) -> dict[str, Any]:
    """SIGTERM while answers come in: whether they end as a client can read, and the exit status."""

    async def read(client: httpx.AsyncClient) -> str:
        body = {
            "model": "model",
            "prompt": BEGINNINGS[0],
            "max_tokens": tokens,
            "temperature": 1,
            "stream": True,
        }
        try:
            async with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                text = "".join([part async for part in response.aiter_text()])
        except httpx.HTTPError as error:
            return f"broken off: {type(error).__name__}"
        if text.rstrip().endswith("[DONE]"):
            return "complete"
        return "error event" if '"error"' in text[-500:] else "cut"

    async with httpx.AsyncClient(timeout=120) as client:
        streams = [asyncio.ensure_future(read(client)) for _ in range(4)]
        await asyncio.sleep(0.5)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        ends = await asyncio.gather(*streams)
    status = await asyncio.to_thread(server.process.wait, ENDING_SECONDS)
    return {"status": status, "seconds": round(time.monotonic() - started, 1), "streams": sorted(ends)}


def table(results: list[dict[str, Any]]) -> str:
    names = [name for name in results[0] if name not in ("seconds",)]
    rows = [names, ["---"] * len(names)]
    for result in results:
        rows.append([_cell(result[name]) for name in names])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(str, value))
    return str(value) if value not in (None, {}) else "none"


async def measure(options: argparse.Namespace, model: Path, log: Path) -> dict[str, Any]:
    server = Running(options, model, log)
    try:
        alone: dict[str, str] = {}
        async with httpx.AsyncClient(timeout=600) as client:
            for prompt in BEGINNINGS:
                text = await answer(client, server.url, prompt, options.tokens, Counts())
                if text is None:
                    raise SystemExit(f"no answer to {prompt!r}; see {log}")
                alone[prompt] = text
        results = []
        for clients in options.clients:
            results.append(await load(server, alone, clients, options))
            print(json.dumps(results[-1], ensure_ascii=False), flush=True)
        ended = await end_in_mid_stream(server, options.context - 20)
        print(json.dumps(ended), flush=True)
    finally:
        server.kill()
    return {"loading s": round(server.loading, 1), "results": results, "SIGTERM in mid-stream": ended}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--weights", choices=["octavo", "float32", "bfloat16"], default="octavo")
    parser.add_argument(
        "--model", type=Path, help="a folder; default: the shipped model, quantized for octavo"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[32])
    parser.add_argument("--seconds", type=float, default=300, help="for each number of clients")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--context", type=int, default=512, help="of the model, in tokens")
    parser.add_argument("--max-requests", type=int, default=64)
    parser.add_argument(
        "--vllm", nargs="*", default=[], help="further options of vLLM's, without their dashes: a=1 b"
    )
    parser.add_argument("--out", type=Path, help="JSON with all results")
    options = parser.parse_args()
    options.vllm = [f"--{option}" for option in options.vllm]
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            from octavo import demo
            from octavo.checkpoint import convert

            model = demo.MODEL
            if options.weights == "octavo":
                model = Path(folder) / "model"
                convert(demo.MODEL, model)
        found = asyncio.run(measure(options, model, Path(folder) / "server.log"))
    found = {
        "engine": options.engine,
        "weights": options.weights,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        **found,
    }
    print(table(found["results"]))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
