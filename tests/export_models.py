"""Small random models with tokenizers trained on the spot, and llama.cpp to run what is exported of them."""

from contextlib import contextmanager

import numpy as np
import torch

import octavo
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


def randomized(model):
    """Weights large enough that positions, norms and biases all matter to the result."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(
                    0.1 * noise + (1.0 if "norm" in name or "ln_" in name else 0.0) * ("weight" in name)
                )
            else:
                parameter.copy_(0.12 * noise)
    return model.eval()


def random_model(config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return randomized(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def quantized(config, folder, tokenizer, **options):
    """A random model quantized and saved with its tokenizer; returns it."""
    model = octavo.quantize_model(random_model(config), octavo.OctavoConfig(**options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def token_ids(count=40, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


def logits(model, ids):
    """float32 [tokens, vocabulary]"""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


@contextmanager
def llama(path, **options):
    """The file in llama.cpp, keys and values in float32."""
    import llama_cpp

    defaults = {
        "n_ctx": 64,
        "logits_all": True,
        "type_k": 0,
        "type_v": 0,
        "flash_attn": False,
        "n_threads": 1,
    }
    instance = llama_cpp.Llama(str(path), verbose=False, **{**defaults, **options})
    try:
        yield instance
    finally:
        instance.close()


def llama_logits(path, ids):
    with llama(path) as instance:
        instance.eval(ids)
        return np.array(instance.scores[: len(ids)])


def difference(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
