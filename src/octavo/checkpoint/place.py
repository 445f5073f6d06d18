"""Where a conversion reads and writes: checks of the output folder, the source's fingerprint, giving the folder its name.

Example:
    >>> from octavo.checkpoint.place import publish
    >>> publish(Path("out.partial"), Path("out"))  # doctest: +SKIP
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from .errors import CheckpointError
from .source import Source

# Places of each file, evenly spread, that its fingerprint looks at, and bytes at each.
SAMPLES = 16
SAMPLE_BYTES = 4096


def check_out(out: Path, source: Source, overwrite: bool) -> None:
    """Raise CheckpointError if `out` cannot be written: a file, the source itself, or in use without `overwrite`."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; expected a folder to write")
    here, there = out.resolve(), source.folder.resolve()
    if here == there or here in there.parents:
        raise CheckpointError(f"{out} holds the source itself; give another folder to write")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out} is not empty; give another folder, or --overwrite to replace it")


def fingerprint(source: Source) -> str:
    """A hash that tells sources apart, wherever they lie.

    Of config.json, the tensors' names, shapes and types, and of each file its size and samples of its bytes: reading it all
    would double the time of a conversion.
    """
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode())
    for info in source.tensors.values():
        digest.update(repr((info.name, info.shape, str(info.dtype), info.file)).encode())
    for path in source.files:
        size = path.stat().st_size
        digest.update(repr((path.name, size)).encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(sample * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def publish(partial: Path, out: Path) -> None:
    """Give a finished folder its final name; an old folder of that name goes only once the new one is there."""
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    old = None
    if out.exists():
        old = out.with_name(out.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    _sync(out.absolute().parent)
    if old is not None:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders, and needs no sync of them
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
