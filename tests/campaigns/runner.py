"""What campaigns share: their command line, and cases in processes of their own that are warm, limited in time, and may die.

A case is a function that raises, returns, or kills its process. `run` says how it ended. Processes are forked from one that has
imported everything, so that a case costs what it does and no start.
"""

import argparse
import json
import os
import pickle
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a user may get instead of a result: an error of these types, on one line, that is not a sign of a fault of ours.
REFUSALS = (ValueError, OSError, ImportError)


@dataclass
class Ending:
    """How a case ended.

    Args:
        how: "returned", "refused", "error" (an exception that is no refusal), "died" (a signal, or an exit) or "hung".
        value: what it returned, or the message.
        seconds, peak_bytes: what it took; bytes beyond what the process had before.
    """

    how: str
    value: Any = None
    seconds: float = 0.0
    peak_bytes: int = 0
    trace: str = field(default="", repr=False)


def run(case: Callable[[], Any], seconds: float = 10.0) -> Ending:
    """Run `case` in a fork, for at most `seconds` of wall time."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reading)
        _answer(case, writing)
    os.close(writing)
    data = b""
    while True:
        left = start + seconds - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return Ending("hung", f"after {seconds:.0f} s", seconds)
        part = os.read(reading, 1 << 20)
        if not part:
            break
        data += part
    os.close(reading)
    _, status = os.waitpid(child, 0)
    took = time.monotonic() - start
    if os.WIFSIGNALED(status) or not data:
        return Ending("died", f"status {status}", took)
    how, value, peak, trace = pickle.loads(data)  # from our own child
    return Ending(how, value, took, peak, trace)


def _answer(case: Callable[[], Any], pipe: int) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trace = ""
    try:
        how, value = "returned", case()
    except REFUSALS as error:
        how, value = "refused", f"{type(error).__name__}: {error}"
        if "\n" in str(error).strip():
            how, trace = "error", traceback.format_exc()
    except BaseException as error:
        how, value, trace = "error", f"{type(error).__name__}: {error}", traceback.format_exc()
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    with os.fdopen(pipe, "wb") as answer:
        answer.write(pickle.dumps((how, value, peak, trace)))
    os._exit(0)


def parser(description: str, count: int, counted: str) -> argparse.ArgumentParser:
    """The options of a campaign: how many cases, from which seed on, and where the result goes."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--count", type=int, default=count, help=f"{counted}; default: %(default)s")
    options.add_argument("--seed", type=int, default=1, help="number of the first; default: %(default)s")
    options.add_argument("--json", type=Path, help="write the table and the faults here")
    return options


def finish(options: argparse.Namespace, table: dict, faults: list) -> int:
    """Write what was asked for. Returns the exit status."""
    if options.json:
        found = {**vars(options), "json": None, "table": table, "faults": faults}
        options.json.write_text(json.dumps(found, indent=1))
    return 1 if faults else 0


def say(text: object) -> None:
    print(text, flush=True)
