"""A running `octavo serve` for tests: any engine, on a free port."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server's process.

    Attributes:
        url: where it listens.
        folder: the model's.
        log: a file of what it printed.
    """

    def __init__(self, arguments: list, log: Path, environment: dict[str, str]):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(arguments[0])
        self.log = log
        command = [sys.executable, "-m", "octavo", "serve", *map(str, arguments), "--port", str(self.port)]
        # vLLM's options stand behind those of the command.
        if "--" in command:
            behind = command.index("--")
            command = [*command[:behind], *command[-2:], *command[behind:-2]]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env={"OMP_NUM_THREADS": "1", **os.environ, **environment}
            )

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.said()
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.3)
        raise AssertionError(f"not ready after {seconds} s: {self.said()}")

    def chat(self, *texts: str, **options) -> httpx.Response:
        """The answer to messages of a user."""
        body = {"messages": [{"role": "user", "content": text} for text in texts], **options}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def terminate(self, seconds: float = 40) -> int:
        """Send SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def serving(*arguments, log: Path, seconds: float = 120, **environment: str):
    server = Server(list(arguments), log, environment)
    try:
        server.wait(seconds)
        yield server
    finally:
        server.terminate()
