"""A tokenizer, as llama.cpp reads it from a GGUF file.

llama.cpp knows two kinds that transformers' causal models use: byte-level byte-pair encoding ("gpt2": tokens and merges, and
the name of a pre-tokenizer) and SentencePiece's ("llama": tokens with scores; pairs are merged by the score of what they
become). Whether a text gets tokens before and after it is taken from what the tokenizer does, not from how it is described.

Example:
    >>> import gguf
    >>> writer = gguf.GGUFWriter("demo.gguf", "gptj")
    >>> add_vocabulary(writer, octavo.load_tokenizer("model-8bit"), model.config.to_dict(), rows=4096)
    Vocabulary(kind='gpt2', pre='gpt-2', tokens=4096)
"""

import json
import logging
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from .pretokenizers import find_pre_tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"
# Below every score of a token that merging makes.
NEVER_MADE = -1e9


@dataclass(frozen=True)
class Vocabulary:
    """What was written of a tokenizer: llama.cpp's kind ("gpt2", "llama"), its pre-tokenizer, the number of tokens."""

    kind: str
    pre: str
    tokens: int


def add_vocabulary(
    writer: GGUFWriter,
    tokenizer: Any,
    config: dict[str, Any],
    rows: int,
    *,
    sentencepiece: Path | None = None,
    pre: str | None = None,
) -> Vocabulary:
    """Write a tokenizer's keys.

    Args:
        tokenizer: a transformers tokenizer.
        config: the model's config.json, for the ids of special tokens that the tokenizer does not name.
        rows: of the embedding. Tokens are filled up to that number; those beyond it are left out with a warning.
        sentencepiece: its tokenizer.model, whose scores are taken; without, they follow from the order of merges.
        pre: llama.cpp's name for its pre-tokenizer, where it is known; else it is found.

    Raises:
        ValueError: if llama.cpp has no such kind of tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    model = description["model"]
    byte_level = _mentions(description.get("pre_tokenizer"), "ByteLevel")
    if model.get("type") != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise ValueError(
            f"{type(tokenizer).__name__}: expected byte-pair encoding, byte-level or SentencePiece's with byte tokens, "
            f"found {model.get('type')}: llama.cpp has no counterpart for this tokenizer"
        )
    kind = "gpt2" if byte_level else "llama"
    tokens, types = _tokens(tokenizer, model, rows)
    pre = (pre or _pre_tokenizer(tokenizer, model)) if byte_level else "default"
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if not byte_level:
        scores = _scores(tokens, model)
        if sentencepiece is not None:
            _take_pieces(sentencepiece, tokens, scores, types)
        writer.add_token_scores(scores)
    writer.add_token_types(types)
    _add_special(writer, tokenizer, config, rows, byte_level)
    return Vocabulary(kind, pre, len(tokens))


def _mentions(step: Any, kind: str) -> bool:
    """Whether a step of a tokenizer.json, or one of its parts, is of a type."""
    if not isinstance(step, dict):
        return False
    parts = [part for value in step.values() if isinstance(value, list) for part in value]
    return step.get("type") == kind or any(_mentions(part, kind) for part in parts)


def _tokens(tokenizer: Any, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The texts and types of tokens 0 ... rows - 1. Numbers without a token get one that no text gives."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
            # These are found in the text itself, where a space is a space.
            token = token if kind == TokenType.CONTROL else token.replace(SPACE, " ")
        elif BYTE.fullmatch(token) and model.get("byte_fallback"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        if token == model.get("unk_token") and model.get("byte_fallback"):
            kind = TokenType.UNKNOWN
        tokens.append(token)
        types.append(int(kind))
    beyond = sorted(number for number in by_id if number >= rows)
    if beyond:
        warnings.warn(
            f"{len(beyond)} of the tokenizer's tokens ({by_id[beyond[0]]!r}, ...) are beyond the {rows} rows of the model's "
            "embedding; they are left out",
            stacklevel=4,
        )
    trimmed = [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]
    if trimmed:
        warnings.warn(
            f"added tokens that take the spaces beside them, or only match whole words ({trimmed[0]!r}, ...), do not in "
            "llama.cpp",
            stacklevel=4,
        )
    if len(set(tokens)) != len(tokens):
        repeated = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"the tokenizer has several tokens with the text {repeated!r}; llama.cpp wants one")
    return tokens, types


def _pre_tokenizer(tokenizer: Any, model: dict[str, Any]) -> str:
    backend = tokenizer.backend_tokenizer
    normalizer = type(backend.normalizer).__name__
    if normalizer not in ("NoneType", "NFC"):
        warnings.warn(
            f"the tokenizer changes texts before it cuts them ({normalizer}); llama.cpp does not",
            stacklevel=4,
        )
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a")]
    if pieces != ["a"]:
        warnings.warn(
            "the tokenizer puts a space before every text; llama.cpp does not: begin texts with one",
            stacklevel=4,
        )
    found = find_pre_tokenizer(backend.pre_tokenizer, bool(model.get("ignore_merges")))
    if found is None:
        warnings.warn(
            "none of llama.cpp's pre-tokenizers cuts texts as this tokenizer does: the file names 'default', and some "
            "texts will get other tokens",
            stacklevel=4,
        )
    return found or "default"


def _scores(tokens: list[str], model: dict[str, Any]) -> list[float]:
    """Minus the rank of the first merge that makes a token: the pair with the highest score is merged first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges") or []):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    return [float(-ranks[token]) if token in ranks else NEVER_MADE for token in tokens]


def _take_pieces(path: Path, tokens: list[str], scores: list[float], types: list[int]) -> None:
    """Scores and types from a SentencePiece model, for those of its pieces that are still what they were."""
    try:
        from transformers.convert_slow_tokenizer import import_protobuf

        parsed = import_protobuf().ModelProto.FromString(path.read_bytes())
    except Exception as error:  # protobuf is missing, or the file is none of its: its classes share no base
        warnings.warn(
            f"{path} cannot be read ({type(error).__name__}: {error}); scores follow from the order of merges",
            stacklevel=5,
        )
        return
    kept = (int(TokenType.CONTROL), int(TokenType.USER_DEFINED))
    for number, piece in enumerate(parsed.pieces[: len(tokens)]):
        if piece.piece == tokens[number]:
            scores[number] = piece.score
            # Both count kinds alike: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
            types[number] = types[number] if types[number] in kept else piece.type


def _add_special(
    writer: GGUFWriter, tokenizer: Any, config: dict[str, Any], rows: int, byte_level: bool
) -> None:
    """Merges, ids of special tokens, the chat template, and what is put around a text."""
    with tempfile.TemporaryDirectory() as folder:
        # The library reads files, and transformers writes them in one form, whatever form they had.
        tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        # What it warns of, what is put around a text, is not taken from it.
        logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
        special = SpecialVocab(folder, load_merges=byte_level, n_vocab=rows)
    for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None and number < rows:
            special.special_token_ids[kind] = number
    if "eos" not in special.special_token_ids:
        warnings.warn("the tokenizer names no token that ends a text: llama.cpp will not stop", stacklevel=4)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, after = whole[:at], whole[at + len(bare) :]
    ids = special.special_token_ids
    special.add_special_token = {"bos": bool(before), "eos": bool(after)}
    if before not in ([], [ids.get("bos")]) or after not in ([], [ids.get("eos")]):
        warnings.warn(
            f"the tokenizer puts {before} before and {after} after a text; llama.cpp can put its one first and its one "
            "last token there",
            stacklevel=4,
        )
        special.add_special_token = {"bos": ids.get("bos") in before, "eos": ids.get("eos") in after}
    special.add_to_gguf(writer, quiet=True)
    if not byte_level:
        first = tokenizer.convert_ids_to_tokens(bare)[0]
        writer.add_add_space_prefix(first.startswith(SPACE))
