"""An engine in a process of its own, so that its memory and its threads are its own: both ends of the pipe.

    python -m octavo.bench.process MODULE:NAME THREADS '{"argument": ...}'

makes `engine = MODULE.NAME(argument=...)` and then answers requests on standard input, one JSON object per line:
{"do": "decode", "with": {"tokens": 8}} → {"result": engine.decode(tokens=8)}; "peak_memory" and "page_kinds" are the process's.
Its first line is {"result": null} once the engine is ready. An error is {"error": type, "message": text}, and ends it.

Example:
    >>> from octavo.bench.process import Worker
    >>> with Worker("octavo.bench.models:Quantized", threads=1, source="model", device="cpu") as worker:
    ...     seconds = worker.ask("decode", tokens=8)
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

# Errors that are the user's to mend come back as what they were; see `octavo.cli`.
MENDABLE = {"ValueError": ValueError, "OSError": OSError, "FileNotFoundError": FileNotFoundError}


class WorkerError(RuntimeError):
    """An engine failed, or its process ended."""


class Worker:
    """Starts an engine and asks it.

    Args:
        factory: "module:name" of what makes the engine.
        threads: for torch.set_num_threads.
        arguments: the factory's keyword arguments, anything that JSON holds.

    Attributes:
        ready: seconds from starting the process until the engine was there.
        pid: the process.

    Raises:
        ValueError, OSError: what the factory raised.
        WorkerError: for any other failure.
    """

    def __init__(self, factory: str, threads: int, **arguments: Any):
        self.name = factory
        command = [sys.executable, "-m", __name__, factory, str(threads), json.dumps(arguments)]
        # To a file: a full pipe would stop the engine.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the worker)
        started = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.pid = self.process.pid
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self.ready = time.perf_counter() - started

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = self.errors.read().strip()[-500:]
            raise WorkerError(
                f"{self.name}: its process ended with status {self.process.returncode} (out of memory?) {last}".strip()
            )
        answer = json.loads(line)
        if "error" in answer:
            kind, message = answer["error"], answer["message"]
            if kind in MENDABLE:
                raise MENDABLE[kind](message)
            raise WorkerError(f"{self.name}: {kind}: {message}")
        return answer["result"]

    def ask(self, method: str, **arguments: Any) -> Any:
        """What the engine's method returns. Raises as the constructor does."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": method, "with": arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peak_memory() -> int:
    """Bytes: the most memory this process has held so far, files mapped into it included."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    with contextlib.suppress(ImportError):
        import resource

        # Kilobytes, but bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return getattr(memory, "peak_wset", memory.rss)


def page_kinds() -> dict[str, int]:
    """Bytes of memory this process holds now, on Linux: "all", and in huge pages "anonymous_huge" and "file_huge"."""
    rollup = Path("/proc/self/smaps_rollup")
    fields = {"Rss": "all", "AnonHugePages": "anonymous_huge", "FilePmdMapped": "file_huge"}
    if not rollup.exists():
        return {}
    found = {}
    for line in rollup.read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if name in fields:
            found[fields[name]] = int(value.split()[0]) * 1024
    return found


# Requests that the process answers itself.
OF_PROCESS = {"peak_memory": peak_memory, "page_kinds": page_kinds}


def _serve(factory: str, threads: int, arguments: dict) -> None:
    # Answers go to the original standard output; whatever the libraries print does not get between them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        import torch

        torch.set_num_threads(threads)
        module, _, name = factory.partition(":")
        engine = getattr(importlib.import_module(module), name)(**arguments)
        answer(result=None)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] in OF_PROCESS:
                answer(result=OF_PROCESS[request["do"]]())
            else:
                answer(result=getattr(engine, request["do"])(**request["with"]))
    except Exception as error:
        # Whatever it is, the other end raises it.
        kind = "OSError" if isinstance(error, OSError) else type(error).__name__
        kind = "ValueError" if isinstance(error, ValueError) else kind
        answer(error=kind, message=str(error))


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
