"""One process at a time writes a file or a folder: a lock that the system takes back when the process ends, however it ends.

Example:
    >>> with Lock(Path("model.gguf.partial")):               # another process that comes now gets an InUseError
    ...     Path("model.gguf.partial").write_text("all of it")
    9
"""

import errno
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


class InUseError(CheckpointError):
    """Another process writes there."""


class Lock:
    """Keeps other processes out until it is closed, or nobody refers to it any more. Does nothing where the system, or the file
    system, has no such locks.

    Args:
        path: a folder, or a file, which is made if it is not there.

    Raises:
        InUseError: if another process holds it.
    """

    def __init__(self, path: Path):
        self._handle: int | None = None
        try:
            import fcntl
        except ImportError:
            return
        while True:
            self._handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise InUseError(f"{path}: another process is writing it; wait for it to end") from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
                # A file system without locks, as some of many machines are.
                self.close()
                return
            # Meanwhile the file may have got another name, from whoever held it.
            if path.exists() and os.path.samestat(os.fstat(self._handle), path.stat()):
                return
            self.close()

    def close(self) -> None:
        """Let other processes in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    __del__ = close
