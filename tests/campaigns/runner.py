"""What campaigns share: their command line, and cases in processes of their own that are warm, limited in time, and may die.

A case is a function that raises, returns, or kills its process; `Worker` says how it ended. Workers are forked from a process
that has imported everything, so that a case costs what it does and no start, and they do many cases one after another. A
fault that a case leaves behind for the next one (a default changed, a lock held) shows as well."""

import argparse
import json
import os
import pickle
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# What a user may get instead of a result: an error of these types, on one line, that is not a sign of a fault of ours.
REFUSALS = (ValueError, OSError, ImportError)
# Address space that a case gets beyond what its process has.
MOST = 2 << 30
# In memory where there is a place for files: what is asked is what Octavo does, not what a disk does.
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass
class Ending:
    """How a case ended.

    Args:
        how: "returned", "refused", "error" (an exception that is no refusal), "died" (a signal, or an exit) or "hung".
        value: what it returned, or the message.
        seconds, peak_bytes: what it took; bytes beyond what the process had before its first case.
    """

    how: str
    value: Any = None
    seconds: float = 0.0
    peak_bytes: int = 0
    trace: str = field(default="", repr=False)


class Worker:
    """A process that does cases: forked when one is asked for, and anew after one that died or hung.

    Args:
        do: what a case is, of any arguments that can be pickled.
        seconds: of wall time that a case may take.
        lifetime: cases until the process is replaced.
    """

    def __init__(self, do: Callable[..., Any], seconds: float = 10.0, lifetime: int = 100):
        self.do, self.seconds, self.lifetime = do, seconds, lifetime
        self._child, self._pipe, self._done = 0, None, 0

    def run(self, *arguments: Any) -> Ending:
        """Do one case."""
        if not self._child or self._done == self.lifetime:
            self._fork()
        self._done += 1
        start = time.monotonic()
        self._pipe.send_bytes(pickle.dumps(arguments))
        try:
            if not self._pipe.poll(self.seconds):
                self.close()
                return Ending("hung", f"after {self.seconds:.0f} s", self.seconds)
            how, value, peak, trace = pickle.loads(self._pipe.recv_bytes())  # from our own child
        except EOFError:
            status = self.close()
            return Ending("died", f"status {status}", time.monotonic() - start)
        return Ending(how, value, time.monotonic() - start, peak, trace)

    def close(self) -> int:
        """End the process. Returns how it ended, as `os.waitpid` says it."""
        if not self._child:
            return 0
        self._pipe.close()
        os.kill(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        return status

    def _fork(self) -> None:
        self.close()
        self._pipe, theirs = Pipe()
        self._child, self._done = os.fork(), 0
        if not self._child:
            self._pipe.close()
            _work(self.do, theirs)
        theirs.close()


def _work(do: Callable[..., Any], pipe: Connection) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with open("/proc/self/statm") as sizes:
        mapped = int(sizes.read().split()[0]) * resource.getpagesize()
    # A case that asks for all there is gets an error, and does not disturb the machine.
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST, mapped + MOST))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while True:
        try:
            arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        trace = ""
        try:
            how, value = "returned", do(*arguments)
        except REFUSALS as error:
            how, value = "refused", f"{type(error).__name__}: {error}"
            if "\n" in str(error).strip():
                how, trace = "error", traceback.format_exc()
        except BaseException as error:
            how, value, trace = "error", f"{type(error).__name__}: {error}", traceback.format_exc()
        peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        pipe.send_bytes(pickle.dumps((how, value, peak, trace)))


def parser(description: str, count: int | None = None, counted: str = "") -> argparse.ArgumentParser:
    """The options of a campaign: how many cases, from which seed on (unless it counts none), and where the result goes."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if count is not None:
        options.add_argument("--count", type=int, default=count, help=f"{counted}; default: %(default)s")
        options.add_argument("--seed", type=int, default=1, help="number of the first; default: %(default)s")
        options.add_argument("--seconds", type=float, help="begin no further case after so long")
    options.add_argument("--json", type=Path, help="write the table and the faults here")
    return options


def numbers(seed: int, count: int, seconds: float | None = None) -> Iterator[int]:
    """The numbers of the cases, until they are done or the time is up."""
    start = time.monotonic()
    for number in range(seed, seed + count):
        if seconds is not None and time.monotonic() - start > seconds:
            return
        yield number


def finish(options: argparse.Namespace, table: dict, faults: list) -> int:
    """Write what was asked for. Returns the exit status."""
    if options.json:
        found = {**vars(options), "json": None, "table": table, "faults": faults}
        options.json.write_text(json.dumps(found, indent=1))
    return 1 if faults else 0


def say(text: object) -> None:
    print(text, flush=True)
