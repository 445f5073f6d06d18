"""Files and names that are still there when the power fails: synced, in the right order.

A system writes what a program wrote when it finds time for it, names and bytes in any order. So a file's bytes are synced
before it gets its final name, and the folder that holds the name after it.

Example:
    >>> Path("figures.json.partial").write_text("{}")
    2
    >>> put_in_place(Path("figures.json.partial"), Path("figures.json"))
"""

import errno
import os
from pathlib import Path


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


def write_in_place(path: Path, text: str) -> None:
    """Write a small file whole, or leave what was there."""
    # Of the processes of one run each writes it.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)
