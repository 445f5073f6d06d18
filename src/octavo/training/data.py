"""Training examples: records (`octavo.training.records`) as tokens, and batches of them.

An example is {"input_ids", "labels"}; a label of -100 is not learned. The loss is taken on completions and on
the assistant's turns; the end-of-text token follows every text and completion.

Example:
    >>> from octavo.training.data import tokenize
    >>> tokenize([{"text": "hola"}], tokenizer, 512).examples
    [{'input_ids': [...], 'labels': [...]}]
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .loss import IGNORED

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


def tokenize(
    records: list[dict[str, Any]], tokenizer: Any, max_length: int, packing: bool | None = None
) -> Examples:
    """Turn records into examples of at most `max_length` tokens.

    Args:
        records: from `octavo.training.records.read_records`.
        tokenizer: a transformers tokenizer; its end-of-text token is appended.
        packing: put `text` records one after another and cut the whole into pieces of `max_length`. Default: for .txt.

    Raises:
        ValueError: if packing is asked for and a record is no plain text, or the tokenizer has no end-of-text token.
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
