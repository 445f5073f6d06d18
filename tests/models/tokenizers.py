"""Tokenizers made on the spot: of bytes, of words, and two kinds trained as llama.cpp knows them."""

from octavo import demo

VOCABULARY = 600
TEXTS = (
    "El sentido de la vida es 42, ¿no?",
    "  Two  spaces,\ttabs\n\n\nand lines \r\n end   ",
    "It's 12345 o'clock; WE'LL see: 3.14 + 2² = ?",
    "camelCaseWord path/to/file_name.py {'k': [1, 2]};\n//x",
    "日本語 한국어 русский हिन्दी ไทย 😀👩‍👩‍👧 🇪🇸 cafe\u0301 café \u00a0 ﬁ",
    "a",
    " ",
    "...!!! <|end|> <s> </s> <0x41>",
)


def training_text() -> list[str]:
    """English that every Python has, and the Spanish that ships with Octavo."""
    from pydoc_data.topics import topics

    english = "\n".join(topics[name] for name in sorted(topics))[:60_000]
    return [english, (demo.TEXT / "proverbios.txt").read_text(encoding="utf-8")[:60_000], *TEXTS[:5]]


def byte_level_tokenizer(rule="gpt-2", vocabulary=VOCABULARY, bos=False):
    """Byte-level BPE with one of llama.cpp's pre-tokenizers; an added token in it, and one to be found in texts."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    from octavo.export.pretokenizers import IGNORING_MERGES, pre_tokenizer

    tokenizer = Tokenizer(models.BPE(ignore_merges=rule in IGNORING_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 3,
        special_tokens=["<s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_tokens([AddedToken("<keep>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        chat_template="{{ messages[0]['content'] }}",
    )


def sentencepiece_tokenizer(vocabulary=VOCABULARY):
    """BPE as Llama 2's tokenizer.json has it: spaces as ▁, one put before a text, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        show_progress=False,
        limit_alphabet=80,
        max_token_length=12,
    )
    # SentencePiece's tokens do not cross words: it is trained on words.
    words = [word for text in training_text() for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    # Special to the trainer only: a byte written out in a text is text.
    import json

    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_tokenizer(chat_template=None):
    """One token per byte; token 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = chat_template
    return tokenizer


def word_tokenizer(words):
    """A fast tokenizer: one token per word, in their order."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=words[0], eos_token=words[0])
