"""Where a conversion reads and writes: checks of the output folder, the source's fingerprint, giving the folder its name.

`OUT` becomes what was written in one step, a rename, wherever that is possible:

    OUT is                                        the work is in             and then
    nothing, or a folder                          OUT.partial                is renamed to OUT
    a symbolic link, dangling or not              the same of its target     the link stays, its target is renamed
    a mount point, or in a read-only folder       OUT/.octavo-partial        its files move up one by one, config.json last

Example:
    >>> from octavo.checkpoint.writing.output_directory import choose_output_directory
    >>> choose_output_directory(Path("out"), source, overwrite=False).partial.name
    'out.partial'
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..reading.locate import Location
from .durable import sync, sync_all

if TYPE_CHECKING:
    from ..reading.source import Source

# Places of each file, evenly spread, that its fingerprint looks at, and bytes at each.
SAMPLES = 16
SAMPLE_BYTES = 4096
INSIDE = ".octavo-partial"
REPLACED = ".octavo-replaced"
FINISHED = ".octavo-finished"
CLEARED = "cleared"
# What a folder may hold and still be empty: our own unfinished work, and what a new file system begins with.
NOTHING = {INSIDE, REPLACED, FINISHED, "lost+found"}


@dataclass(frozen=True)
class OutputDirectory:
    """Where a checkpoint is written.

    Attributes:
        asked: the folder as the user named it.
        out: the folder itself: links are followed.
        inside: whether `out` stays where it is and its files are exchanged, because it cannot be renamed.
        overwrite: whether what is in `out` may be replaced.
    """

    asked: Path
    out: Path
    inside: bool = False
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        """The folder in which the work is done."""
        return self.out / INSIDE if self.inside else self.out.with_name(f"{self.out.name}.partial")

    @property
    def disk(self) -> Path:
        """A folder that is there, on the disk that is written to."""
        return _nearest(self.out if self.inside else self.out.parent)

    def publish(self) -> None:
        """Give finished work its final name; an old folder of that name goes only once the new one is there.

        Raises:
            CheckpointError: if what is in `out` now came while the work was done.
        """
        self.check_empty()
        sync_all(self.partial)
        if self.inside:
            self.partial.rename(self.out / FINISHED)
            self._exchange()
            return
        # A name that is ours, so that no folder of the user's is ever in its place.
        old = self.out.with_name(f".{self.out.name}{REPLACED}")
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.partial.rename(self.out)
        sync(self.out.absolute().parent)
        shutil.rmtree(old, ignore_errors=True)

    def check_empty(self) -> None:
        """Raise CheckpointError if there is something in `out` that may not be replaced."""
        if self.out.is_dir() and not self.overwrite and {path.name for path in self.out.iterdir()} - NOTHING:
            raise CheckpointError(
                f"{self.asked} is not empty; give another folder, or --overwrite to replace it"
            )

    def _exchange(self) -> None:
        """Put what is in OUT/.octavo-finished in place of what is in OUT. Begun again, it goes on."""
        finished, old = self.out / FINISHED, self.out / REPLACED
        if not (finished / CLEARED).exists():
            old.mkdir(exist_ok=True)
            for path in self.out.iterdir():
                if path.name not in NOTHING:
                    path.rename(old / path.name)
            (finished / CLEARED).touch()
        # Without config.json the folder is no model yet.
        for path in sorted(finished.iterdir(), key=lambda path: path.name == "config.json"):
            if path.name != CLEARED:
                path.rename(self.out / path.name)
        sync(self.out)
        for leftover in (old, finished):
            shutil.rmtree(leftover)


def choose_output_directory(out: Path, source: "Source | Location", overwrite: bool) -> OutputDirectory:
    """Decide where the work is done, and finish what an earlier run has left to be exchanged.

    Args:
        source: what is read, or only where it is: a command asks before torch is imported.

    Raises:
        CheckpointError: if `out` cannot be written: a file, the source itself or around it, in use without `overwrite`, or
            where this user may not write.
    """
    try:
        real = out.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{out}: its links lead in a circle ({error}); give another folder") from None
    if real.exists() and not real.is_dir():
        raise CheckpointError(f"{out} is a file; expected a folder to write")
    there = source.folder.resolve()
    if real == there or real in there.parents:
        raise CheckpointError(f"{out} holds the source itself; give another folder to write")
    fixed = real.is_dir() and (os.path.ismount(real) or not os.access(real.parent, os.W_OK))
    directory = OutputDirectory(out, real if out.is_symlink() or fixed else out, fixed, overwrite)
    check_writable(directory.disk, out)
    if fixed and (real / FINISHED).is_dir():
        directory._exchange()
    directory.check_empty()
    return directory


def check_writable(folder: Path, named: str | Path) -> None:
    """Check that a folder, or the nearest above it that is there, can be written: before the work, not after it.

    Args:
        named: what errors call it: what the user gave.

    Raises:
        CheckpointError: if it cannot.
    """
    there = _nearest(folder)
    if not there.is_dir():
        raise CheckpointError(f"{named}: {there} is no folder; give another name")
    if not os.access(there, os.W_OK):
        raise CheckpointError(f"{named}: this user may not write to {there}; give another folder")


def check_new_file(path: str | Path, named: str | Path, overwrite: bool = False) -> None:
    """Check that a file can be written, and is not there already.

    Raises:
        CheckpointError: if it cannot, or is there and may not be replaced.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{named} is a folder; expected a file to write")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{named} is there already; give another name, or --overwrite to replace it")
    check_writable(path.absolute().parent, named)


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def fingerprint(source: "Source") -> str:
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
