"""Text files as users have them: UTF-8, or UTF-16 as Windows writes it; anything else is told apart and named.

Every reader of texts (to learn from, to measure on, to calibrate on, a prompt on standard input) comes here, so that all of them
read the same files and say the same.

    what the bytes are                                  what comes of it
    UTF-8, with or without a byte order mark            text
    UTF-16 or UTF-32 with a mark; UTF-16 without one    text
    another 8-bit encoding                              ValueError with the command that converts it
    no text (NUL bytes that are not UTF-16's)           ValueError
    UTF-8 that was read as Latin-1 and encoded again    text, and a warning ("niÃ±o" in place of "niño")

Example:
    >>> decode("niño".encode("utf-16"), "--data a.txt")
    'niño'
"""

import codecs
import re
import shlex
import warnings
from pathlib import Path

# The marks of UTF-32 first: that of UTF-16 is the beginning of one.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# The marks of UTF-16, taken for ISO 8859-1 and encoded in UTF-8.
CONVERTED_MARKS = ("ÿþ".encode(), "þÿ".encode())
SURROGATE = re.compile("[\ud800-\udfff]")
# Bytes that Windows-1252 has characters for, and ISO 8859-1 has none.
WINDOWS_ONLY = re.compile(b"[\x80-\x9f]")


def is_file(source: str, endings: tuple[str, ...] = (".txt", ".md", ".rst")) -> bool:
    """Whether what a user named is a file, found or not: a file that is there, or a name that is no data set's on the hub."""
    path = Path(source).expanduser()
    return path.exists() or path.suffix.lower() in endings or path.is_absolute() or source.count("/") > 1


def read_text(path: str | Path, option: str) -> str:
    """The contents of a text file.

    Args:
        option: what errors call the file's option: "--text".

    Raises:
        ValueError: if it is a folder, empty, blank, or no text in an encoding known here.
        FileNotFoundError: if there is none.
    """
    source, path = path, Path(path).expanduser()
    named = f"{option} {source}"
    if path.is_dir():
        raise ValueError(f"{named}: expected a text file, found a folder")
    if not path.exists():
        raise FileNotFoundError(f"{named}: no such file")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{named}: the file is empty")
    text = decode(data, named, path)
    if not text.strip():
        raise ValueError(f"{named}: the file holds nothing but blank lines")
    return text


def decode(data: bytes, named: str, path: str | Path | None = None) -> str:
    """Text of bytes.

    Args:
        named: what errors call them.
        path: the file that they are from, for the command that converts it.

    Raises:
        ValueError: if they are no text in an encoding known here.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], encoding, named, path)
    if data.startswith(CONVERTED_MARKS):
        raise ValueError(
            f"{named}: expected text, found UTF-16 that was converted as if it were another encoding; give the file it was "
            "made from: UTF-16 is read as it is"
        )
    if 0 in data:
        return _decoded(data, _utf16_of(data, named), named, path)
    text = _decoded(data, "utf-8", named, path)
    if _is_mojibake(text):
        warnings.warn(
            f'{named}: its accented letters look like "niÃ±o" for "niño": UTF-8 that was read as another encoding and encoded '
            f"again. If so, undo it: iconv -f UTF-8 -t WINDOWS-1252 {_quoted(path)} > mended.txt",
            stacklevel=3,
        )
    return text


def check_whole(text: str, named: str) -> None:
    """Raise ValueError if a text holds a half of a character (a lone surrogate), which no tokenizer takes."""
    found = SURROGATE.search(text)
    if found:
        before = text[max(0, found.start() - 20) : found.start()]
        raise ValueError(
            f"{named}: holds half of a character (U+{ord(found[0]):04X}, a lone surrogate) after {before!r}: a text that was cut "
            "inside an emoji, or bytes that are no UTF-8; remove it"
        )


def _decoded(data: bytes, encoding: str, named: str, path: str | Path | None) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"found byte {data[error.start]:#04x} at {error.start:,}"
        if encoding != "utf-8":
            raise ValueError(
                f"{named}: expected text in {encoding.upper()}, {where}: the file is damaged"
            ) from error
        # ISO 8859-1 has no characters in that range, Windows-1252 has its quotes and dashes there.
        likely = "WINDOWS-1252" if WINDOWS_ONLY.search(data) else "ISO-8859-1"
        raise ValueError(
            f"{named}: expected text in UTF-8, {where}; if it is {likely}, convert it: iconv -f {likely} -t UTF-8 "
            f"{_quoted(path)} > converted.txt"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{named}: expected text, found NUL characters: it is no text, or UTF-16 that was converted as if it were another "
            "encoding; give the file it was made from"
        )
    return text


def _utf16_of(data: bytes, named: str) -> str:
    """Which UTF-16 bytes without a mark are in, by their spaces and line ends; no other text has NUL bytes."""
    pairs = [data[at : at + 2] for at in range(0, min(len(data), 1 << 16), 2)]
    spaces = {"utf-16-le": sum(pair in (b" \0", b"\n\0") for pair in pairs)}
    spaces["utf-16-be"] = sum(pair in (b"\0 ", b"\0\n") for pair in pairs)
    found = max(spaces, key=lambda name: spaces[name])
    if len(data) % 2 or not spaces[found]:
        # One word without a space: by the zero halves of its letters.
        zeros = data[1::2].count(0), data[0::2].count(0)
        if len(data) % 2 or 4 * max(zeros) < len(data):
            raise ValueError(
                f"{named}: expected text, found NUL bytes: a program, an archive, or a damaged file"
            )
        found = "utf-16-le" if zeros[0] >= zeros[1] else "utf-16-be"
    return found


def _is_mojibake(text: str) -> bool:
    """Whether every letter beyond ASCII is a byte of UTF-8 that was taken for a character of Windows-1252."""
    if text.isascii():
        return False
    try:
        # What Windows-1252 leaves open, such readers keep as it is.
        data = b"".join(_byte(character) for character in text)
        return data.decode("utf-8") != text
    except (UnicodeEncodeError, UnicodeDecodeError):
        return False


def _byte(character: str) -> bytes:
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")


def _quoted(path: str | Path | None) -> str:
    return shlex.quote(str(path)) if path is not None else "FILE"
