"""Campaign: several at once.

    python -m tests.campaigns.at_once --count 50        # of each kind
    python -m tests.campaigns.at_once --count 2

    conversions   two commands write into one folder, the second begun at any moment of the first, also with --overwrite
    writers       the same for one command of merge, export, evaluate --save-logits and finetune, begun twice; where it takes a
                  model, the second reads another one
    replaced      processes load a folder again and again while a conversion replaces it by another of its model
    loads         ten processes load one folder
    threads       threads generate on one model, each its own prompt
    forks         a process that has computed with several threads forks, and both compute

Rule: right or refused. Right is: the bytes of one of both conversions, whole; the logits or the tokens that one alone gives,
bit for bit (in a fork, within a rounding: fewer threads may sum in another order). Refused is one line. Nothing hangs."""

import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import runner
from .commands import COMMANDS, Command, digests, inputs_in, run, start, status_of
from .interrupted import Undisturbed, untold

# isort: split
import torch

import octavo
from octavo import demo

SECONDS = 60.0
READERS = 3


def apart(work: Callable[[], Any]) -> tuple[int, Connection]:
    """Run something in a fork. Returns (its process, where its answer comes: what it returned, or its error)."""
    ours, theirs = Pipe(duplex=False)
    child = os.fork()
    if child:
        theirs.close()
        return child, ours
    try:
        answer: Any = work()
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
    theirs.send_bytes(pickle.dumps(answer))
    os._exit(0)


def answer_of(process: tuple[int, Connection], seconds: float = SECONDS) -> Any:
    """What it answered; a text that says so if it hung or died."""
    child, pipe = process
    try:
        if not pipe.poll(seconds):
            os.kill(child, signal.SIGKILL)
            return f"hung: no answer after {seconds:.0f} s"
        return pickle.loads(pipe.recv_bytes())  # from our own child
    except EOFError:
        return "died"
    finally:
        pipe.close()
        os.waitpid(child, 0)


def logits(folder: Path) -> torch.Tensor:
    model = octavo.load(folder, device="cpu")
    with torch.no_grad():
        return model(torch.arange(1, 9)[None]).logits


class Folders:
    """A model converted in two ways, with the bytes and the logits of each."""

    def __init__(self, room: Path):
        self.inputs = inputs_in(room)
        self.alone: dict[str, list[tuple[dict[str, str], float]]] = {}
        self.ways = {"64": "--block-size 64", "32": "--block-size 32"}
        self.at = {name: room / f"alone{name}" for name in self.ways}
        for name, way in self.ways.items():
            status, errors, self.seconds = run(f"quantize {demo.MODEL} {self.at[name]} {way}".split())
            assert status == 0, errors
        self.digests = {name: digests(folder) for name, folder in self.at.items()}
        self.logits = {name: answer_of(apart(lambda f=folder: logits(f))) for name, folder in self.at.items()}


def conversions(made: Folders, room: Path, rng: random.Random) -> list[str]:
    out = room / "out"
    ways = rng.choice([("64", "64"), ("64", "32")])
    there = rng.random() < 0.4
    if there:
        run(f"quantize {demo.MODEL} {out}".split())
    option = " --overwrite" if there or rng.random() < 0.3 else ""
    lines = [f"quantize {demo.MODEL} {out} {made.ways[way]}{option}".split() for way in ways]
    first = start(lines[0])
    time.sleep(rng.uniform(0, 1.1 * made.seconds))
    second = start(lines[1])
    ended = [status_of(each, SECONDS) for each in (first, second)]
    faults = []
    for status, errors in ended:
        lines_of = errors.strip().splitlines()
        if status not in (0, 1) or (status == 1 and not (lines_of and lines_of[-1].startswith("error: "))):
            faults.append(f"status {status}: {errors.strip()[-400:]}")
    if not any(status == 0 for status, _ in ended):
        faults.append(f"both were refused: {[errors[-300:] for _, errors in ended]}")
    found = digests(out)
    right = [made.digests[way] for way, (status, _) in zip(ways, ended, strict=True) if status == 0]
    if found not in right:
        faults.append(
            f"the folder is none of both: {sorted(found)}, statuses {[status for status, _ in ended]}"
        )
    return faults


def writers(made: Folders, room: Path, rng: random.Random) -> list[str]:
    command = rng.choice(COMMANDS[2:])
    out = room / "out"
    # An adapter belongs to its model.
    other = {} if "{adapter}" in command.line else {"eight": made.at["32"]}
    inputs = [made.inputs, {**made.inputs, **other}]
    if command.name not in made.alone:
        made.alone[command.name] = [_alone(command, each, room) for each in inputs]
    clean = made.alone[command.name]
    first = start(command.arguments(out, inputs[0]))
    time.sleep(rng.uniform(0, 1.1 * clean[0][1]))
    second = start(command.arguments(out, inputs[1]))
    ended = [status_of(each, SECONDS) for each in (first, second)]
    faults = [f"{command.name}: {told}" for status, errors in ended if status and (told := untold(errors))]
    if not any(status == 0 for status, _ in ended):
        faults.append(f"{command.name}: both were refused: {[errors[-300:] for _, errors in ended]}")
    found = digests(command.final(out))
    if not any(
        status == 0 and same.items() <= found.items()
        for (same, _), (status, _) in zip(clean, ended, strict=True)
    ):
        statuses = [status for status, _ in ended]
        faults.append(
            f"{command.name}: what is written is none of both: {sorted(found)[:5]}, statuses {statuses}"
        )
    return faults


def _alone(command: Command, inputs: dict[str, Path], room: Path) -> tuple[dict[str, str], float]:
    """(file → digest, seconds) of a command that nothing disturbs."""
    clean = Undisturbed(command, inputs, room)
    return clean.same, clean.seconds


def replaced(made: Folders, room: Path, rng: random.Random) -> list[str]:
    out = room / "out"
    run(f"quantize {demo.MODEL} {out}".split())
    stop = time.monotonic() + 1.5 * made.seconds + 1

    def read() -> list[str]:
        faults = []
        while time.monotonic() < stop:
            try:
                found = logits(out)
            except (ValueError, OSError) as error:
                if "\n" in str(error).strip():
                    faults.append(f"a refusal of several lines: {error}")
                continue
            if not any(torch.equal(found, right) for right in made.logits.values()):
                faults.append("other numbers")
        return faults

    readers = [apart(read) for _ in range(READERS)]
    time.sleep(rng.uniform(0, 0.5))
    status, errors, _ = run(f"quantize {demo.MODEL} {out} {made.ways['32']} --overwrite".split())
    found = [answer_of(reader) for reader in readers]
    faults = [f"a reader: {each}" for each in found if each]
    if status or digests(out) != made.digests["32"]:
        faults.append(f"the conversion ended with {status}: {errors[-300:]}")
    return faults


def loads(made: Folders, room: Path, rng: random.Random) -> list[str]:
    name = rng.choice(list(made.at))
    processes = [apart(lambda: logits(made.at[name])) for _ in range(10)]
    found = [answer_of(each) for each in processes]
    return [
        f"{each}" if isinstance(each, str) else "other numbers"
        for each in found
        if isinstance(each, str) or not torch.equal(each, made.logits[name])
    ]


def threads(made: Folders, room: Path, rng: random.Random) -> list[str]:
    def work() -> list[str]:
        torch.set_num_threads(rng.choice([1, 2]))
        model = octavo.load(made.at["64"], device="cpu")
        prompts = [torch.randint(1, 200, (1, rng.randrange(1, 20))) for _ in range(rng.choice([2, 4, 8]))]

        def generate(ids: torch.Tensor) -> torch.Tensor:
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )

        alone = [generate(ids) for ids in prompts]
        found: list[Any] = [None] * len(prompts)

        def one(at: int) -> None:
            try:
                found[at] = generate(prompts[at])
            except Exception as error:  # whatever it is, it is a find
                found[at] = f"{type(error).__name__}: {error}"

        running = [threading.Thread(target=one, args=(at,)) for at in range(len(prompts))]
        for each in running:
            each.start()
        for each in running:
            each.join()
        return [
            each if isinstance(each, str) else "other tokens"
            for each, right in zip(found, alone, strict=True)
            if isinstance(each, str) or not torch.equal(each, right)
        ]

    found = answer_of(apart(work))
    return [found] if isinstance(found, str) else found


def forks(made: Folders, room: Path, rng: random.Random) -> list[str]:
    rows = rng.choice([1, 8, 64])

    def work() -> list[str]:
        torch.set_num_threads(2)
        model = octavo.load(made.at["64"], device="cpu")
        weight = octavo.quantize_model(torch.nn.Sequential(torch.nn.Linear(512, 2048))).requires_grad_(False)
        x = torch.randn(rows, 512)
        ids = torch.arange(1, 65)[None]
        with torch.no_grad():
            right = weight(x), model(ids).logits

        def again() -> list[str]:
            with torch.no_grad():
                found = weight(x), model(ids).logits
            return [
                f"{name}: off by {(a - b).abs().max():.1e}"
                for name, a, b in zip(("a product", "a model"), found, right, strict=True)
                if not torch.allclose(a, b, rtol=1e-4, atol=1e-4)
            ]

        children = [apart(again) for _ in range(rng.choice([1, 3]))]
        faults = again()
        for each in children:
            found = answer_of(each, 20)
            faults += [f"in a fork: {found}"] if isinstance(found, str) else found
        return faults

    found = answer_of(apart(work))
    return [found] if isinstance(found, str) else found


KINDS = {each.__name__: each for each in (conversions, writers, replaced, loads, threads, forks)}


def campaign(
    count: int, seed: int, only: str | None = None, seconds: float | None = None, say=print
) -> tuple[dict[str, int], list[str]]:
    """Returns (kind → cases, faults)."""
    table: Counter = Counter()
    faults = []
    with tempfile.TemporaryDirectory(dir=runner.SCRATCH) as folder:
        made = Folders(Path(folder))
        for name, kind in KINDS.items():
            if only and only != name:
                continue
            for number in runner.numbers(seed, count, seconds):
                # The same name each time: it is written into some files.
                room = Path(folder) / "room"
                shutil.rmtree(room, ignore_errors=True)
                room.mkdir()
                found = kind(made, room, random.Random(f"{name} {number}"))
                table[name] += 1
                for fault in found:
                    faults.append(f"{name} --seed {number} --count 1: {fault}")
                    say(faults[-1])
            say(f"{name}: {table[name]}")
    return dict(table), faults


def main() -> int:
    parser = runner.parser(__doc__, 2, "cases of each kind")
    parser.add_argument("--only", choices=list(KINDS), help="one kind")
    options = parser.parse_args()
    return runner.finish(
        options, *campaign(options.count, options.seed, options.only, options.seconds, runner.say)
    )


if __name__ == "__main__":
    sys.exit(main())
