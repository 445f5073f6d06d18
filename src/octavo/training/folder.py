"""The folder of a run: what is in it already, whether it can be written, and what is said when it cannot. No torch here.

Example:
    >>> refuse_to_overwrite("poems")
    Traceback (most recent call last):
    ValueError: ...
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.writing.durable import sync, sync_all, write_json
from ..checkpoint.writing.output_directory import check_writable
from ..json_files import read_object
from .recipe import Recipe

if TYPE_CHECKING:
    from .data import Example

ADAPTER = "adapter_model.safetensors"
# What a run was started with; and that its checkpoints are marked once they are on the disk.
OPTIONS_FILE = "recipe.json"
MARKED = "checkpoints_are_marked"
MARK = "octavo-whole"
# Words of safetensors, and of torch's zip writer wherever in a file the disk became full.
FULL_DISK = ("No space left", "PytorchStreamWriter failed", "iostream error", "inline_container")


def newest_checkpoint(folder: str | Path) -> Path:
    """The newest complete checkpoint of a run. A kill in the middle of saving, or a power failure after it, leaves an incomplete
    one, passed over.

    Raises:
        FileNotFoundError: if there is none.
    """
    found, marked = [], marks(folder)
    for path in Path(folder).glob("checkpoint-*"):
        if marked and not (path / MARK).exists():
            continue
        try:
            # The Trainer writes its state last.
            step = int(read_object(path / "trainer_state.json")["global_step"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if (path / "adapter_config.json").exists() or (path / "pytorch_model_fsdp_0").exists():
            found.append((step, path))
    if not found:
        raise FileNotFoundError(
            f"--resume: {folder} holds no complete checkpoint-N folder; start without --resume"
        )
    return max(found)[1]


def marks(folder: str | Path) -> bool:
    """Whether a run marks its checkpoints: others' runs do not."""
    try:
        return bool(read_object(Path(folder) / OPTIONS_FILE).get(MARKED))
    except (OSError, ValueError):
        return False


def mark(checkpoint: Path) -> None:
    """Say that a checkpoint is whole, once it is on the disk."""
    sync_all(checkpoint)
    (checkpoint / MARK).touch()
    sync(checkpoint)
    sync(checkpoint.parent)


def _digest(examples: "list[Example]") -> str:
    """Stands for the examples, in their order."""
    return hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()


def keep_options(
    recipe: Recipe, train: "list[Example]", held_out: "list[Example]", output: Path, resume: bool
) -> None:
    """Keep the options and a digest of the data beside the checkpoints; on resuming, refuse others: the losses would not be the
    same run's."""
    path = output / OPTIONS_FILE
    # A run that was begun without marks goes on without.
    marked = marks(output) if resume else True
    options = {**recipe.to_dict(), "data": _digest(train), "validation": _digest(held_out)}
    if resume and path.exists():
        before = read_object(path)
        other = {
            name: (before[name], value) for name, value in options.items() if before.get(name, value) != value
        }
        if other:
            listed = ", ".join(
                f"--{n.replace('_', '-')} was {old}, is {new}"
                if n in recipe.to_dict()
                else f"--{n} gives other examples"
                for n, (old, new) in other.items()
            )
            raise ValueError(
                f"--resume: expected the options and the data that the run was started with, found others: {listed}"
            )
    write_json(path, {**options, MARKED: marked})


def refuse_to_overwrite(output: str | Path) -> None:
    """Keep a new run out of another's folder.

    Raises:
        ValueError: if `output` holds an adapter or checkpoints, or cannot be made.
    """
    output = Path(output)
    check_writable(output, f"--output {output}")
    # What a run was killed in before its first checkpoint was whole holds nothing to go on with.
    begun = list(output.glob("checkpoint-*")) and not (marks(output) and not _has_whole(output))
    if (output / ADAPTER).exists() or begun:
        raise ValueError(
            f"--output {output} holds a run already: --resume goes on with it; for a new one give another folder, or remove this"
        )


def _has_whole(output: Path) -> bool:
    try:
        newest_checkpoint(output)
    except FileNotFoundError:
        return False
    return True


def move_into(partial: Path, output: Path) -> None:
    """Give what was written aside its names in `output`; the file that makes a run a finished one comes last."""
    sync_all(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == ADAPTER):
        path.replace(output / path.name)
    sync(output)
    partial.rmdir()


def check_space(output: Path, needed: int) -> None:
    """Raise OSError, before a run, if its folder's disk has less free than one checkpoint and the adapter take.

    Args:
        needed: bytes.
    """
    free = shutil.disk_usage(output).free
    if free < needed:
        raise OSError(
            f"--output {output}: its disk has {free / 1e6:,.1f} MB free, and a checkpoint with the adapter takes "
            f"{needed / 1e6:,.1f} MB; free some space, or give another folder"
        )


@contextmanager
def told_of_a_full_disk(output: Path) -> Iterator[None]:
    """Turn what libraries raise when a disk is full, each its own, into one OSError that says what is left and what to do."""
    try:
        yield
    except Exception as error:
        if not _says_full(error):
            raise
        try:
            kept = f"the same command with --resume goes on from {newest_checkpoint(output).name}"
        except FileNotFoundError:
            kept = "no checkpoint was complete yet: start again"
        raise OSError(
            f"--output {output}: the disk is full ({shutil.disk_usage(output).free / 1e6:,.1f} MB free) and what was being saved "
            f"is not whole; free some space, then {kept}"
        ) from error


def _says_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that of a full disk: by its number, else by the words of safetensors (written
    in Rust) and of torch's zip writer."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False
