"""Records to learn from, read from files and checked: text, prompts with completions, conversations.

    file                    what a record is
    .txt                    the whole file is one text, cut into pieces of `max_length` (packed)
    .jsonl, .json           one record per line: {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}]}
    .csv                    columns `text`, or `prompt` and `completion`
    anything else           a data set's id on the Hugging Face hub, its `train` split with columns as above

Files are in UTF-8 or UTF-16 (`octavo.text_files`). Nothing here needs torch: a mistake in the data is told at once.

Example:
    >>> from octavo.training.records import read_records
    >>> read_records(["poems.txt"])
    [{'text': 'Verde que te quiero verde.', 'packed': True}]
"""

import csv
import io
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..hub_datasets import load_table
from ..text_files import check_whole, is_file, read_text

FORMS = "`text`, `prompt` and `completion`, or `messages`"
ENDINGS = (".txt", ".jsonl", ".json", ".csv")
# A C long on every system; a field of a text file may be as long as the file.
LONGEST_FIELD = 2**31 - 1


def read_records(sources: Iterable[str], option: str = "--data") -> list[dict[str, Any]]:
    """Read files or hub ids into records, each with exactly one of `text`, `prompt`+`completion`, `messages`.

    Args:
        option: what errors call the sources.

    Raises:
        ValueError: if a file holds something else, naming the file and the line.
        FileNotFoundError: if a name with a file's ending does not exist.
    """
    records: list[dict[str, Any]] = []
    for source in sources:
        records += _read(source, f"{option} {source}", option)
    return records


def _read(source: str, named: str, option: str) -> list[dict[str, Any]]:
    path = Path(source).expanduser()
    ending = path.suffix.lower()
    if not path.exists():
        if is_file(source, ENDINGS):
            raise FileNotFoundError(f"{named}: no such file")
        return _read_hub(source, named)
    if ending not in ENDINGS:
        raise ValueError(f"{named}: expected a .txt, .jsonl, .json or .csv file, found {ending or 'none'}")
    text = read_text(source, option)
    if ending == ".txt":
        # Line ends as Python reads them: Windows' would be learned as characters of their own.
        return [{"text": text.replace("\r\n", "\n").replace("\r", "\n"), "packed": True}]
    rows = _read_csv(text, path) if ending == ".csv" else _read_json(text, path)
    records = [_checked(record, place) for place, record in rows]
    if not records:
        raise ValueError(f"{named}: the file holds no records")
    return records


def _read_csv(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    # `newline=""`: the csv module splits rows itself, and a quoted field may hold line ends.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    with _long_fields():
        try:
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: expected rows of comma-separated values, found {error}"
            ) from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a field be longer than the csv module's 131,072 characters, and put the limit back."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_json(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected a JSON array of records, found {error}") from error
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))
        return
    # Not `splitlines`: JSON's strings may hold other line separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            # A number of thousands of digits is a ValueError too.
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object per line, found {error}"
                ) from error


def _read_hub(name: str, named: str) -> list[dict[str, Any]]:
    table = load_table(name, "", "train", named)
    return [_checked(record, f"{name}, record {number}") for number, record in enumerate(table, 1)]


def _checked(record: Any, place: str) -> dict[str, Any]:
    """The fields of one record that are used. Raises ValueError naming the place."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a record with {FORMS}, found {type(record).__name__}")
    if isinstance(record.get("messages"), list):
        if not record["messages"]:
            raise ValueError(f"{place}: `messages` is empty; expected at least one turn of each side")
        for number, message in enumerate(record["messages"], 1):
            turn = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not turn or not ("content" in message or "tool_calls" in message):
                raise ValueError(
                    f'{place}, message {number}: expected {{"role": "user" or "assistant", "content": "..."}}, found '
                    f"{json.dumps(message, ensure_ascii=False, default=str)[:80]}"
                )
            for part in _texts_of(message):
                check_whole(part, f"{place}, message {number}")
        return {"messages": record["messages"]}
    for names in (("prompt", "completion"), ("text",)):
        if all(isinstance(record.get(name), str) for name in names):
            for name in names:
                check_whole(record[name], f"{place}, {name}")
            return {name: record[name] for name in names}
    raise ValueError(f"{place}: expected {FORMS}, found {sorted(str(key) for key in record)}")


def _texts_of(value: Any) -> Iterator[str]:
    """Every string in a message: its content may be a list of parts, a tool's call has arguments of any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield str(key)
            yield from _texts_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts_of(each)


def split_records(records: list[dict[str, Any]], share: float, seed: int) -> tuple[list, list]:
    """Set a share of the records aside for validation, drawn by `seed`; of a packed text, its last lines.

    Raises:
        ValueError: if `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"--validation-split: expected a share from 0 to below 1, found {share}")
    train, held = [], []
    whole = [record for record in records if not record.get("packed")]
    for record in records:
        if record.get("packed") and share:
            lines = record["text"].splitlines(keepends=True)
            cut = min(len(lines) - 1, round(len(lines) * (1 - share)))
            train.append({**record, "text": "".join(lines[:cut])})
            held.append({**record, "text": "".join(lines[cut:])})
        elif record.get("packed"):
            train.append(record)
    order = list(range(len(whole)))
    random.Random(seed).shuffle(order)
    count = round(len(whole) * share) or (1 if share and len(whole) > 1 else 0)
    aside = set(order[:count])
    for number, record in enumerate(whole):
        (held if number in aside else train).append(record)
    return train, held
