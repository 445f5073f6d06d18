"""The texts a model is measured on: files, and data sets of the Hugging Face hub.

    what is given                                what it is
    book.txt, any other text file                the whole file is one text
    wikitext-2                                   the test split of WikiText-2, raw: what the model card measured
    ID[:CONFIGURATION[:SPLIT[:COLUMN]]]          a data set's rows as one text, an empty line between (SPLIT: test,
                                                 COLUMN: text)

Files are in UTF-8 or UTF-16 (`octavo.text_files`). Texts stay apart: no window reaches from one into the next.

Example:
    >>> texts = read_texts(["book.txt"])         # or a data set: "Salesforce/wikitext:wikitext-2-raw-v1:test"
    >>> tokenize(texts, tokenizer)[0].ids.shape
    torch.Size([1107])
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..hub_datasets import load_table
from ..text_files import is_file, read_text

if TYPE_CHECKING:
    import torch

# As transformers' page on perplexity, and after it most published figures, put the rows together.
ROW_SEPARATOR = "\n\n"
WIKITEXT_2 = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"
SHORT_NAMES = {"wikitext-2": WIKITEXT_2, "wikitext-2-raw": WIKITEXT_2, "wikitext-2-raw-v1": WIKITEXT_2}


@dataclass(frozen=True)
class Text:
    """A text and where it comes from."""

    name: str
    text: str


@dataclass(frozen=True)
class Tokens:
    """A text as tokens.

    Attributes:
        name: where it comes from.
        ids: int64 [tokens], a start token included where the tokenizer puts one.
        words: words of the text, by white space.
        bytes: bytes of the text in UTF-8.
    """

    name: str
    ids: "torch.Tensor"
    words: int
    bytes: int

    @property
    def scored(self) -> int:
        """Tokens that are scored: all but the first."""
        return len(self.ids) - 1

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens, so that two runs can tell whether they scored the same."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()


def read_texts(sources: Sequence[str]) -> list[Text]:
    """Read texts, in order.

    Raises:
        FileNotFoundError: if a name that looks like a file's does not exist.
        ValueError: if a file is no text in UTF-8 or UTF-16 or is empty, or the hub does not give the data set.
        ImportError: if a data set is asked for and `datasets` is not installed.
    """
    if not sources:
        raise ValueError("--text: expected a text file or a data set's id")
    return [_read(source) for source in sources]


def _read(source: str) -> Text:
    return Text(source, read_text(source, "--text")) if is_file(source) else _read_hub(source)


def _read_hub(source: str) -> Text:
    spec = SHORT_NAMES.get(source, source)
    name, configuration, split, column = (*spec.split(":"), "", "", "")[:4]
    split, column = split or "test", column or "text"
    table = load_table(name, configuration, split, f"--text {source}")
    if column not in table.column_names:
        raise ValueError(
            f"--text {source}: expected a column {column!r}, found {', '.join(table.column_names)}; name one: "
            f"{name}:{configuration}:{split}:COLUMN"
        )
    return Text(source, ROW_SEPARATOR.join(table[column]))


def tokenize(texts: Sequence[Text], tokenizer: Any, limit: int | None = None) -> list[Tokens]:
    """Tokenize texts, each by itself.

    Args:
        limit: keep only the first `limit` tokens in all; words and bytes are those of what is kept.

    Raises:
        ValueError: if a text has fewer than two tokens.
    """
    found: list[Tokens] = []
    left = limit
    for each in texts:
        if left is not None and left < 2:
            break
        tokens = _tokenize(each, tokenizer, left)
        found.append(tokens)
        left = None if left is None else left - len(tokens.ids)
    if not found:
        raise ValueError(f"limit: expected at least 2 tokens, found {limit}")
    return found


def _tokenize(each: Text, tokenizer: Any, limit: int | None) -> Tokens:
    import torch

    # A tokenizer warns of texts longer than its model's context; the windows take care of that.
    offsets = limit is not None and bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(each.text, verbose=False, **({"return_offsets_mapping": True} if offsets else {}))
    ids = torch.as_tensor(encoded["input_ids"], dtype=torch.int64).reshape(-1)
    if len(ids) < 2:
        raise ValueError(f"--text {each.name}: fewer than two tokens: there is nothing to predict")
    text = each.text
    if limit is not None and len(ids) > limit:
        ids = ids[:limit].clone()
        text = (
            text[: max(end for _, end in encoded["offset_mapping"][:limit])]
            if offsets
            else tokenizer.decode(ids, skip_special_tokens=True)
        )
    return Tokens(each.name, ids, len(text.split()), len(text.encode("utf-8")))
