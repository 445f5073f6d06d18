"""Files in the page cache: whether they are there, dropping them, and laying them out in huge pages.

Checkpoints are mapped, so how fast a model reads its weights depends on whether the cache holds the file in pages of 2 MB or of
4 KB: 42 against 37 GB/s on one core of a Zen 5. That is an accident of how the file got there; `in_huge_pages` makes it the
same for every engine. Linux only: elsewhere nothing is done, and `cached_share` raises OSError.

Example:
    >>> from benchmarks.page_cache import cached_share
    >>> cached_share([Path("model.safetensors")])  # doctest: +SKIP
    1.0
"""

import ctypes
import math
import mmap
import os
from pathlib import Path

# mincore gives a byte a page, of which the lowest bit counts.
LOW_BIT = bytes(value & 1 for value in range(256))


def cached_share(files: list[Path]) -> float:
    """Share of the files' pages that lie in the page cache.

    Raises:
        OSError: where the system does not tell.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        raise OSError("mincore: the state of the page cache is read on Linux only")
    resident = pages = 0
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            count = math.ceil(size / mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * count)()
            anchor = ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), flags)
            # The map cannot be closed while something points into it.
            del anchor
            if failed:
                raise OSError(ctypes.get_errno(), "mincore failed", str(path))
            resident += sum(bytes(flags).translate(LOW_BIT))
            pages += count
    return resident / max(pages, 1)


def drop(files: list[Path]) -> None:
    """Drop files from the page cache, except pages that a process has mapped."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> None:
    """Read files into the page cache."""
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 26):
                pass


def in_huge_pages(files: list[Path]) -> None:
    """Read files into the page cache anew, in huge pages where the file system has them (ext4 of Linux 6.16, xfs, btrfs)."""
    if not (hasattr(os, "posix_fadvise") and hasattr(mmap, "MADV_HUGEPAGE")):
        return
    drop(files)
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            mapped.madvise(mmap.MADV_HUGEPAGE)
            for position in range(0, size, mmap.PAGESIZE):
                mapped[position]
