"""Files and names that are still there when the power fails: synced, in the right order.

A system writes what a program wrote when it finds time for it, names and bytes in any order. So a file's bytes are synced
before it gets its final name, and the folder that holds the name after it.

Example:
    >>> write_json(Path("found.json"), {"perplexity": 20.5})
    >>> Path("found.json").read_text()
    '{\\n  "perplexity": 20.5\\n}\\n'
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    # Windows syncs a file only through a handle for writing, and no folders.
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no such thing for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Wait until a folder is on the disk with everything in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a finished file its final name, in place of what has that name."""
    sync(partial)
    os.replace(partial, path)
    sync(path.absolute().parent)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` once it is whole; an error leaves nothing, and what was there before."""
    # Of the processes of one run each writes it.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any, **options: Any) -> None:
    """A value as indented JSON, written whole, or not at all; `options` are those of `json.dumps`."""
    with written_aside(path) as partial:
        partial.write_text(json.dumps(value, **{"indent": 2, **options}) + "\n", encoding="utf-8")
