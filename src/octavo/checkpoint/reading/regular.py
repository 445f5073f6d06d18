"""A checkpoint consists of plain files. A pipe or a device in the place of one would be waited for, or give what it likes.

Example:
    >>> from octavo.checkpoint.reading.regular import require_regular
    >>> require_regular(Path("model/config.json"))
"""

import stat
from pathlib import Path

from ..errors import CheckpointError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: Path) -> None:
    """Check that a path is a file, or a link to one, or nothing at all (which is for others to say).

    Raises:
        CheckpointError: if it is something else, naming what, or a link that leads nowhere.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which is missing; download it again"
            ) from None
        return
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{path}: expected a file, found {_KINDS.get(stat.S_IFMT(mode), 'something else')}"
        )
