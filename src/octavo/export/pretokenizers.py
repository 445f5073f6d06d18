"""Which of llama.cpp's pre-tokenizers cuts texts as a tokenizer of the tokenizers library does.

Before byte-pair merging a text is cut into pieces that no token crosses. llama.cpp has the rules compiled in, and a file names
one (`tokenizer.ggml.pre`). Here the name is found by what a tokenizer does: it is that of the rule which cuts a text full of
odd cases into the same pieces. So a new vocabulary trained with known rules is recognized, however its rules are written down.

Example:
    >>> import tokenizers
    >>> cutter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> find_pre_tokenizer(cutter, ignore_merges=False)
    'gpt-2'
"""

from functools import cache
from typing import Any

# What the rules differ in: case, contractions, digits, runs of white space, line ends, marks, scripts, emoji.
PROBE = (
    " Hello world's WORLD'S it'll IT'LL we've 'tis dON'T camelCaseWord HTTPServer iPhone don\u2019t\n"
    "1 12 123 1234 12345 3.14 a1b22c333 x²½ \u0663\u0664\u0665\u0666\n\n\n  indented\n\t\ttabs \t \r\n\r\nend   \n"
    "¿Qué tal? ¡Niño! café cafe\u0301 naïve — «citado» “quoted” ... !!! ?! #tag @name $5 50% a_b-c/d\\e\n"
    "path/to/file;\n{'key': [1, 2]}; //comment/\n==> <= && || ~` ^\n"
    "日本語 テキスト 中文123 한국어 русский ქართული हिन्दी ไทย عربى\n"
    "😀👩‍👩‍👧 🇪🇸 e\u0301\u0302 \u00a0nbsp \u3000wide  two   three    four "
)

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
CASED = (rf"{WORD}{UPPER}*{LOWER}+", rf"{WORD}{UPPER}+{LOWER}*")
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
# Rules as lists of patterns, each applied to the pieces of the one before; None is GPT-2's own, built into ByteLevel.
RULES: dict[str, list[str | None]] = {
    "gpt-2": [None],
    "smollm": [r"\p{N}", None],
    "llama-bpe": [rf"{CONTRACTIONS}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}|{PUNCTUATION}|{SPACES}"],
    "qwen2": [rf"{CONTRACTIONS}|{WORD}\p{{L}}+|\p{{N}}|{PUNCTUATION}|{SPACES}"],
    "qwen35": [
        rf"{CONTRACTIONS}|{WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
    ],
    "tekken": [rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"],
    "gpt-4o": [
        rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
    ],
}
# Rules under which llama.cpp takes a piece that is a token as it is, without merging its bytes.
IGNORING_MERGES = ("llama-bpe", "tekken")
# The same pieces as llama-bpe, with merges.
MERGING = {"llama-bpe": "smaug-bpe"}


def find_pre_tokenizer(cutter: Any, ignore_merges: bool) -> str | None:
    """llama.cpp's name for a pre-tokenizer; None if it has none that cuts the same pieces.

    Args:
        cutter: a pre-tokenizer of the tokenizers library, for byte-level BPE.
        ignore_merges: whether a piece that is itself a token is taken without merging.
    """
    pieces = [piece for piece, _ in cutter.pre_tokenize_str(PROBE)]
    for name in RULES:
        if pieces == _pieces(name):
            if ignore_merges == (name in IGNORING_MERGES):
                return name
            return None if ignore_merges else MERGING.get(name)
    return None


def pre_tokenizer(name: str) -> Any:
    """The rule that llama.cpp calls `name`, as a pre-tokenizer of the tokenizers library.

    Raises:
        KeyError: if `RULES` does not have it.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    steps: list[Any] = [Split(Regex(rule), "isolated") for rule in RULES[name] if rule is not None]
    steps.append(ByteLevel(add_prefix_space=False, use_regex=None in RULES[name]))
    return Sequence(steps)


@cache
def _pieces(name: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer(name).pre_tokenize_str(PROBE)]
