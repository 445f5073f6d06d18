"""Campaign: the power fails.

    python -m tests.campaigns.powerloss --count 60       # moments of each command; an hour
    python -m tests.campaigns.powerloss --count 3

A command runs once with a library before the system's (`recorder.c`, compiled here) that writes down what it does to its
files. Then the power fails after some of these steps, at random: what was not synced by then is lost, in each of four ways:

    lost     files hold what they held when they were last synced, folders name what they named when they were
    names    folders are as they were at the moment, files hold what was synced: a new one is empty
    zeros    the same, but files are as long as they were, with zeros where nothing was synced
    some     a random part of the last changes of folders came through, in their order, and of the last writes to each file

A rename is whole or not at all; syncing a file does not sync its name, which POSIX does not promise. Afterwards: nothing
under the final name, or all of it; the inputs untouched; the same command ends well, with the same bytes as a run that
nothing disturbed."""

import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import runner
from .commands import COMMANDS, Command, digests, inputs_in
from .interrupted import Undisturbed, afterwards, clear

WAYS = ("lost", "names", "zeros", "some")
HEAD = struct.Struct("<4I2Q")


@dataclass
class File:
    """A file: what it holds, what it held when it was last synced, and what was written since."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    since: list[tuple[int, bytes | None]] = field(default_factory=list)

    def write(self, at: int, data: bytes | None) -> None:
        """Bytes at a place; None cuts the file there, or fills it up with zeros to there."""
        self.since.append((at, data))
        _write(self.data, at, data)

    def sync(self) -> None:
        self.synced, self.since = bytes(self.data), []

    def after(self, way: str, rng: random.Random) -> bytes:
        if way in ("lost", "names"):
            return self.synced
        if way == "zeros":
            return self.synced[: len(self.data)].ljust(len(self.data), b"\0")
        data, kept = bytearray(self.synced), rng.randrange(len(self.since) + 1)
        for number, (at, part) in enumerate(self.since[:kept]):
            # Of the last one only a beginning came through.
            torn = part is not None and number == kept - 1
            _write(data, at, part[: rng.randrange(len(part) + 1)] if torn else part)
        return bytes(data)


def _write(data: bytearray, at: int, part: bytes | None) -> None:
    if part is None:
        del data[at:]
    if len(data) < at:
        data.extend(bytes(at - len(data)))
    if part is not None:
        data[at : at + len(part)] = part


@dataclass
class Folder:
    entries: dict[str, Any] = field(default_factory=dict)


@dataclass
class Change:
    """Of names in folders: the node leaves one place and comes to another, or only one of both."""

    node: Any
    left: tuple[Folder, str] | None
    came: tuple[Folder, str] | None
    synced: bool = False


class Disk:
    """The files under a folder, as a process sees them, and what a power failure would leave."""

    def __init__(self, root: Path):
        self.root, self.top = root, Folder()
        self.changes: list[Change] = []

    def step(self, kind: str, first: str, second: str, offset: int, data: bytes) -> None:
        """Do what one record says."""
        if kind == "C":
            self._change(File(), None, self._place(first))
        elif kind == "M":
            self._change(Folder(), None, self._place(first))
        elif kind == "U":
            folder, name = self._place(first)
            if name not in folder.entries:
                return  # made past the C library, and never synced
            self._change(self._node(first), self._place(first), None)
        elif kind == "R":
            (there, old), (folder, name) = self._place(first), self._place(second)
            if old not in there.entries and name in folder.entries:
                return  # its folder was renamed
            self._change(self._node(first), self._place(first), self._place(second))
        elif kind in "WT":
            # A file that has no name any more is lost in any case.
            if not first.endswith(" (deleted)"):
                self._node(first).write(offset, data if kind == "W" else None)
        elif kind == "S":
            if not first.endswith(" (deleted)"):
                self._sync(self._node(first))
        else:
            raise NotImplementedError(f"{kind} {first} {second}")

    def _place(self, path: str) -> tuple[Folder, str]:
        path = Path(path)
        return self._node(str(path.parent)), path.name

    def _node(self, path: str) -> Any:
        node: Any = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.entries[part]
        return node

    def _change(self, node: Any, left, came) -> None:
        change = Change(node, left, came)
        self.changes.append(change)
        _apply(change, {id(place[0]): place[0].entries for place in (left, came) if place})

    def _sync(self, node: Any) -> None:
        if isinstance(node, File):
            node.sync()
            return
        for change in self.changes:
            change.synced |= any(
                place is not None and place[0] is node for place in (change.left, change.came)
            )

    def after(self, way: str, rng: random.Random) -> dict[str, bytes | None]:
        """What is there when the power comes back: path → bytes, or None for a folder."""
        unsynced = [change for change in self.changes if not change.synced]
        kept = {"lost": 0, "some": rng.randrange(len(unsynced) + 1)}.get(way, len(unsynced))
        through = {id(change) for change in unsynced[:kept]}
        tables: dict[int, dict[str, Any]] = {}
        for change in self.changes:
            if change.synced or id(change) in through:
                _apply(change, tables)
        found: dict[str, bytes | None] = {}

        def walk(folder: Folder, path: str) -> None:
            for name, node in sorted(tables.get(id(folder), {}).items()):
                found[path + name] = None if isinstance(node, Folder) else node.after(way, rng)
                if isinstance(node, Folder):
                    walk(node, f"{path}{name}/")

        walk(self.top, "")
        return found

    def now(self) -> dict[str, bytes]:
        """What the process sees."""
        found: dict[str, bytes] = {}

        def walk(folder: Folder, path: str) -> None:
            for name, node in folder.entries.items():
                if isinstance(node, Folder):
                    walk(node, f"{path}{name}/")
                else:
                    found[path + name] = bytes(node.data)

        walk(self.top, "")
        return found


def _apply(change: Change, tables: dict[int, dict[str, Any]]) -> None:
    """Do a change to the names of folders, by the folders' identity."""
    if change.left is not None:
        folder, name = change.left
        tables.setdefault(id(folder), {}).pop(name, None)
    if change.came is not None:
        folder, name = change.came
        tables.setdefault(id(folder), {})[name] = change.node


def compile_recorder(folder: Path) -> Path:
    """The library that writes down what a process does.

    Raises:
        FileNotFoundError: without a C compiler.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("a C compiler, `cc`, is needed to record what a command does to its files")
    library = folder / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl", "-lpthread"], check=True
    )
    return library


def record(command: Command, inputs: dict[str, Path], room: Path, library: Path) -> list[tuple]:
    """Run a command from beginning to end; returns its records."""
    log = library.with_name("log")
    log.unlink(missing_ok=True)
    words = [sys.executable, "-m", "octavo", *command.arguments(room / "out", inputs)]
    of_recorder = ["env", f"LD_PRELOAD={library}", f"RECORDER_LOG={log}", f"RECORDER_ROOT={room}"]
    done = subprocess.run([*of_recorder, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command.name}: {done.stderr[-2000:]}")
    data, at, records = log.read_bytes(), 0, []
    while at < len(data):
        kind, first, second, _, offset, length = HEAD.unpack_from(data, at)
        at += HEAD.size
        parts = []
        for size in (first, second, length):
            parts.append(data[at : at + size])
            at += size
        records.append((chr(kind), parts[0].decode(), parts[1].decode(), offset, parts[2]))
    return records


def replayed(records: list[tuple], room: Path) -> Disk:
    disk = Disk(room)
    for each in records:
        disk.step(*each)
    return disk


def put(found: dict[str, bytes | None], room: Path) -> None:
    clear(room)
    for name, data in found.items():
        path = room / name
        if data is None:
            path.mkdir()
        else:
            path.write_bytes(data)


def campaign(
    count: int, seed: int, only: str | None = None, seconds: float | None = None, say=print
) -> tuple[dict, list[str]]:
    """Returns (command → steps it takes, moments tried, states they left in each way, each once), the faults."""
    table, faults = {}, []
    with tempfile.TemporaryDirectory(dir=runner.SCRATCH) as folder:
        library = compile_recorder(Path(folder))
        inputs = inputs_in(Path(folder))
        room = Path(folder).resolve() / "room"
        room.mkdir()
        for command in COMMANDS:
            if only and only != command.name:
                continue
            clean = Undisturbed(command, inputs, room)
            before = {name: digests(path) for name, path in inputs.items()}
            records = record(command, inputs, room, library)
            seen = replayed(records, room).now()
            there = {str(p.relative_to(room)): p.read_bytes() for p in room.rglob("*") if p.is_file()}
            if unseen := [name for name in {*seen, *there} if seen.get(name) != there.get(name)]:
                raise RuntimeError(f"{command.name}: the records do not lead to {unseen[:5]}")
            cases: Counter = Counter()
            states, moments = set(), 0
            for number in runner.numbers(seed, count, seconds):
                rng = random.Random(f"{command.name} {number}")
                step = rng.randrange(len(records) + 1)
                moments += 1
                for way in WAYS:
                    left = replayed(records[:step], room).after(way, rng)
                    state = hash(tuple(left.items()))
                    if state in states:
                        continue
                    states.add(state)
                    cases[way] += 1
                    put(left, room)
                    what = f"a power failure after step {step} of {len(records)} ({way}; --seed {number})"
                    for fault in afterwards(command, clean, inputs, before, room, what):
                        faults.append(f"{command.name}: {fault}")
                        say(faults[-1])
            clear(room)
            table[command.name] = {"steps": len(records), "moments": moments, **cases}
            say(f"{command.name}: {table[command.name]}")
    return table, faults


def main() -> int:
    parser = runner.parser(__doc__, 3, "moments of each command, each in four ways")
    parser.add_argument("--only", choices=[command.name for command in COMMANDS], help="one command")
    options = parser.parse_args()
    return runner.finish(
        options, *campaign(options.count, options.seed, options.only, options.seconds, runner.say)
    )


if __name__ == "__main__":
    sys.exit(main())
