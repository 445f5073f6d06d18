"""What an interrupted conversion has done: a file of JSON lines in the unfinished folder.

The first line says what is converted and how; each further line is one unit whose data is safely on the disk,
or one file that is whole. A line is written only after the data it speaks of is synced, so whatever the
journal says can be relied on after a crash, and a last line cut in half is ignored.

    {"octavo": 1, "source": "9f2c...", "options": {...}, "plan": "77ab..."}
    {"unit": 0, "shard": 0, "tensors": [["model.embed_tokens.weight_code", "F32", [256], 0, 1024], ...],
    "rows": [...]} {"shard": 0, "whole": true}

Example:
    >>> from octavo.checkpoint.writing.journal import Journal
    >>> head = {"source": "model", "options": {}, "plan": []}
    >>> Journal.create(Path("out.partial"), head).close()
    >>> Journal.resume(Path("out.partial"), head).units
    {}
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .durable import sync
from .in_use import Lock

NAME = "octavo-journal.jsonl"
VERSION = 1


@dataclass
class Journal:
    """The journal of one conversion.

    Attributes:
        lock: held as long as this object lives, so that no other process writes into the folder.
        units: number of a unit → its line.
        whole: numbers of the files that are whole.
    """

    path: Path
    lock: Lock
    units: dict[int, dict[str, Any]] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    _pending: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def create(cls, folder: Path, head: dict[str, Any]) -> "Journal":
        """Begin a journal in a new folder."""
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            # Another process was faster.
            return cls.resume(folder, head)
        return cls._begin(folder, head, Lock(folder / NAME))

    @classmethod
    def _begin(cls, folder: Path, head: dict[str, Any], lock: Lock) -> "Journal":
        journal = cls(folder / NAME, lock)
        journal._append([{"octavo": VERSION, **head}])
        # Its name, and the folder's.
        sync(folder)
        sync(folder.absolute().parent)
        return journal

    @classmethod
    def resume(cls, folder: Path, head: dict[str, Any]) -> "Journal":
        """Read the journal of an interrupted conversion.

        Raises:
            CheckpointError: if it was begun from another source or with other options, or cannot be read.
        """
        lock = Lock(folder / NAME)
        try:
            return cls._resume(folder, head, lock)
        except CheckpointError:
            lock.close()
            raise

    @classmethod
    def _resume(cls, folder: Path, head: dict[str, Any], lock: Lock) -> "Journal":
        lines, length = _read(folder / NAME)
        if not lines and {path.name for path in folder.iterdir()} <= {NAME}:
            # It had just been made when all ended.
            os.truncate(folder / NAME, 0)
            return cls._begin(folder, head, lock)
        again = "finish it with the same command, or start anew with --overwrite"
        if not lines or lines[0].get("octavo") != VERSION:
            raise CheckpointError(
                f"{folder}: left by an interrupted conversion whose journal cannot be read; {again}"
            )
        for key, what in (
            ("source", "from another source"),
            ("options", "with other options"),
            ("plan", "otherwise"),
        ):
            if lines[0].get(key) != head[key]:
                found = f" ({lines[0].get(key)}, now {head[key]})" if key == "options" else ""
                raise CheckpointError(
                    f"{folder}: an interrupted conversion was begun there {what}{found}; {again}"
                )
        # A line cut in half by a crash would spoil the next one.
        os.truncate(folder / NAME, length)
        journal = cls(folder / NAME, lock)
        for line in lines[1:]:
            if "unit" in line:
                journal.units[line["unit"]] = line
            else:
                journal.whole.add(line["shard"])
        return journal

    def add(self, line: dict[str, Any]) -> None:
        """Note a unit or a whole file; on the disk only after `commit`."""
        self._pending.append(line)
        if "unit" in line:
            self.units[line["unit"]] = line

    def commit(self) -> None:
        """Write the noted lines. Their data must have been synced before."""
        self._append(self._pending)
        self._pending = []

    def close(self) -> None:
        """Let other processes in."""
        self.lock.close()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        with self.path.open("ab") as file:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _is_line(line: Any, first: bool) -> bool:
    """Whether this is what a line of a journal is: anything else, and all after it, counts as not written."""
    if not isinstance(line, dict):
        return False
    return first or (isinstance(line.get("shard"), int) and isinstance(line.get("unit", 0), int))


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole lines of a journal, and the bytes they take."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines: list[dict[str, Any]] = []
    length = 0
    for raw in data.splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            break
        if not raw.endswith(b"\n") or not _is_line(line, first=not lines):
            break
        lines.append(line)
        length += len(raw)
    return lines, length
