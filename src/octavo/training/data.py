"""Training examples from files: text, prompts with completions, conversations.

    file                    what a record is
    .txt                    the whole file is one text, cut into pieces of `max_length` (packed)
    .jsonl, .json           one record a line: {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}]}
    .csv                    columns `text`, or `prompt` and `completion`
    anything else           a data set's id on the Hugging Face hub, its `train` split with columns as above

An example is {"input_ids", "labels"}; a label of -100 is not learned. The loss is taken on completions and on
the assistant's turns; the end-of-text token follows every text and completion.

Example:
    >>> from octavo.training.data import read_records
    >>> read_records(["poems.txt"])  # doctest: +SKIP
    [{'text': '...'}]
"""

import csv
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .loss import IGNORED

FORMS = "`text`, `prompt` and `completion`, or `messages`"
Example = dict[str, list[int]]


@dataclass
class Examples:
    """Tokenized examples.

    Attributes:
        examples: {"input_ids", "labels"}, lists of equal length.
        truncated: examples cut at `max_length`.
        dropped: examples without anything to learn (an empty text, or a prompt that fills `max_length`).
    """

    examples: list[Example] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are learned; the first of an example is predicted from nothing, so it is not."""
        return sum(sum(label != IGNORED for label in example["labels"][1:]) for example in self.examples)


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
        try:
            records += _read(source, f"{option} {source}")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{option} {source}: expected text in UTF-8, found byte {error.object[error.start]:#04x} at {error.start}; "
                f"convert it: iconv -f LATIN1 -t UTF-8 {source}"
            ) from error
    return records


def _read(source: str, named: str) -> list[dict[str, Any]]:
    path = Path(source)
    ending = path.suffix.lower()
    if not path.exists():
        if ending in (".txt", ".jsonl", ".json", ".csv"):
            raise FileNotFoundError(f"{named}: no such file")
        return _read_hub(source, named)
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{named}: the file is empty")
    if ending == ".txt":
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise ValueError(f"{named}: the file holds nothing but blank lines")
        return [{"text": text, "packed": True}]
    if ending in (".jsonl", ".json"):
        return [_checked(record, place) for place, record in _read_json(path)]
    if ending == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        return [_checked(row, f"{path}, row {number}") for number, row in enumerate(rows, 2)]
    raise ValueError(f"{named}: expected a .txt, .jsonl, .json or .csv file, found {ending or 'none'}")


def _read_json(path: Path) -> Iterable[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected a JSON array of records, found {error}") from error
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))
        return
    # Not `splitlines`: JSON's strings may hold other line separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object a line, found {error}"
                ) from error


def _read_hub(name: str, named: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{named}: no such file; for a data set of the Hugging Face hub, `pip install datasets`"
        ) from error
    try:
        table = load_dataset(name, split="train")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{named}: neither a file here nor a data set that the Hugging Face hub gives ({reason})"
        ) from error
    return [_checked(record, f"{name}, record {number}") for number, record in enumerate(table, 1)]


def _checked(record: Any, place: str) -> dict[str, Any]:
    """The fields of one record that are used. Raises ValueError naming the place."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a record with {FORMS}, found {type(record).__name__}")
    if isinstance(record.get("messages"), list):
        for number, message in enumerate(record["messages"], 1):
            turn = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not turn or not ("content" in message or "tool_calls" in message):
                raise ValueError(
                    f'{place}, message {number}: expected {{"role": "user" or "assistant", "content": "..."}}, found '
                    f"{json.dumps(message, ensure_ascii=False, default=str)[:80]}"
                )
        return {"messages": record["messages"]}
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return {"prompt": record["prompt"], "completion": record["completion"]}
    if isinstance(record.get("text"), str):
        return {"text": record["text"]}
    raise ValueError(f"{place}: expected {FORMS}, found {sorted(str(key) for key in record)}")


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


def tokenize(
    records: list[dict[str, Any]], tokenizer: Any, max_length: int, packing: bool | None = None
) -> Examples:
    """Turn records into examples of at most `max_length` tokens.

    Args:
        records: from `read_records`.
        tokenizer: a transformers tokenizer; its end-of-text token is appended.
        packing: put `text` records one after another and cut the whole into pieces of `max_length`. Default:
            for .txt.

    Raises:
        ValueError: if packing is asked for and a record is no plain text, or the tokenizer has no end-of-text
        token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token): set it in its tokenizer_config.json"
        )
    result, stream = Examples(), []
    for record in records:
        text = record.get("text")
        if packing and text is None:
            raise ValueError(
                "--packing: expected plain texts, found prompts or conversations, whose examples stay apart: "
                "leave --packing out"
            )
        if text is not None and (record.get("packed") if packing is None else packing):
            stream += _ids(tokenizer, text) + [tokenizer.eos_token_id]
        else:
            _add(result, *_example(record, tokenizer), max_length)
    for start in range(0, len(stream), max_length):
        piece = stream[start : start + max_length]
        _add(result, piece, list(piece), max_length)
    return result


def _ids(tokenizer: Any, text: str) -> list[int]:
    # Long texts are meant: the tokenizer's warning about the model's length would mislead.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _start(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts at a text's start, if it does."""
    start = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


def _example(record: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """input_ids and labels of one record."""
    if "messages" in record:
        return _conversation(record["messages"], tokenizer)
    start, end = _start(tokenizer), [tokenizer.eos_token_id]
    if "text" in record:
        ids = _ids(tokenizer, record["text"])
        return (start + ids + end, [IGNORED] * len(start) + ids + end) if ids else ([], [])
    prompt = start + _ids(tokenizer, record["prompt"])
    completion = _ids(tokenizer, record["completion"]) + end
    return prompt + completion, [IGNORED] * len(prompt) + completion


def _conversation(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """A conversation in the tokenizer's chat template; learned is what the assistant says, its end mark included."""
    if not tokenizer.chat_template:
        raise ValueError(
            "`messages` need a chat template, and this tokenizer has none: give `prompt` and `completion` instead, "
            "or a chat_template in its tokenizer_config.json"
        )
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not text.startswith(before) or not text.startswith(after):
            raise ValueError(
                "this chat template writes earlier turns differently once later ones follow, so that the assistant's "
                "part cannot be told apart: give `prompt` and `completion` instead"
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    labels = [
        # A token that reaches into the span from before, with a space of the template's, is the first of the answer.
        token if any(begin < last and end > first for first, last in spans) else IGNORED
        for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def _add(result: Examples, ids: list[int], labels: list[int], max_length: int) -> None:
    if len(ids) > max_length:
        result.truncated += 1
        ids, labels = ids[:max_length], labels[:max_length]
    # The first label is never predicted.
    if all(label == IGNORED for label in labels[1:]):
        result.dropped += 1
    else:
        result.examples.append({"input_ids": ids, "labels": labels})


def check_length(config: Any, length: int) -> None:
    """Raise ValueError if a model of this configuration reads fewer than `length` tokens."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most and length > most:
        raise ValueError(
            f"--max-length: this model reads at most {most} tokens (max_position_embeddings), an example has {length}"
        )


def collate(examples: list[Example], pad: int = 0) -> dict[str, torch.Tensor]:
    """A batch: input_ids and labels [batch, longest], and an attention mask where something was padded."""
    longest = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), IGNORED)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, :length] = torch.tensor(example["labels"])
        mask[row, :length] = 1
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool(mask.all()) else {**batch, "attention_mask": mask}
