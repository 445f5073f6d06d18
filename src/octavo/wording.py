"""How errors and commands put what is too long to show: a library's reason in a line, a few of many names, a number of bytes.

Example:
    >>> few(["a", "b", "c", "d"]), size(7_447_360)
    ('a, b, c, ...', '7.4 MB')
"""

from collections.abc import Sequence

LONGEST_REASON = 300


def one_line(error: BaseException | str) -> str:
    """What another library's error says, on one line of at most some LONGEST_REASON characters."""
    text = " ".join(str(error).split())
    return f"{text[:LONGEST_REASON]} ..." if len(text) > LONGEST_REASON else text or type(error).__name__


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and three dots where there are more."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def size(nbytes: int) -> str:
    """A number of bytes in MB or GB, the units in which disks are sold."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
