"""The engines that `benchmarks.cpu` compares: Octavo and its peers, each behind the same two calls.

An engine is made from the files `prepare` wrote, and then answers `prefill(n)`, one pass over n tokens with the logits of the
last, and `decode(n)`, n tokens one at a time after a prompt of PROMPT tokens. Both return seconds. All but llama.cpp run the same
transformers model through the same loop, that of `octavo bench` (`octavo.bench.models`).

Example:
    >>> from benchmarks.cpu_engines import ENGINES
    >>> sorted(ENGINES)[:3]
    ['bnb-int8', 'bnb-published', 'llama.cpp']
"""

import time
from pathlib import Path
from typing import Any

import torch

from octavo.bench import models
from octavo.bench.models import PROMPT

# Decoder shapes; "1b" has 1.17 billion weights, the others are for small machines and for trying the benchmark itself.
SHAPES = {
    "1b": dict(
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=49152,
        tie_word_embeddings=False,
    ),
    "smollm2-135m": dict(
        hidden_size=576,
        num_hidden_layers=30,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
        tie_word_embeddings=False,
    ),
}


def make_model(shape: str):
    """A Llama of random bfloat16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def prepare(shape: str, folder: Path) -> None:
    """Write what the engines load: `dense` (bfloat16), `octavo` (8 bits), `model.gguf` (Q8_0)."""
    import octavo

    model = make_model(shape)
    model.save_pretrained(folder / "dense")
    octavo.quantize_model(model)
    model.save_pretrained(folder / "octavo")


class Transformers:
    """A transformers model, and the loop all of them run."""

    def __init__(self, folder: Path):
        self.model = self.load(folder).eval()

    def load(self, folder: Path) -> Any:
        raise NotImplementedError

    def cache(self) -> Any:
        """An empty cache, where the model is to be given one."""
        return None

    def step(self, model: Any, ids: torch.Tensor, past: Any) -> Any:
        return models.step(model, ids, past)

    def prefill(self, tokens: int) -> float:
        return models.prefill(self.model, tokens, self.cache(), self.step)

    def decode(self, tokens: int) -> float:
        return models.decode(self.model, tokens, self.cache(), self.step)


def _load_dense(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "dense", **options)


class Octavo(Transformers):
    def load(self, folder):
        import octavo

        return octavo.load(folder / "octavo", dtype=torch.bfloat16)


class OctavoFloat32(Transformers):
    def load(self, folder):
        import octavo

        return octavo.load(folder / "octavo", dtype=torch.float32)


class Float32(Transformers):
    def load(self, folder):
        return _load_dense(folder, dtype=torch.float32)


class BFloat16(Transformers):
    def load(self, folder):
        return _load_dense(folder, dtype=torch.bfloat16)


class BitsAndBytesInt8(Transformers):
    def load(self, folder):
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_8bit=True)
        return _load_dense(folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu")


class PublishedLinear(torch.nn.Module):
    """The published way: 8-bit blocks of 4096, de-quantized whole by bitsandbytes before each product."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        from bitsandbytes import functional

        self.functional = functional
        self.shape, self.bias = linear.weight.shape, linear.bias
        flat = linear.weight.detach().float().reshape(-1)
        self.packed, self.state = functional.quantize_blockwise(flat, blocksize=4096)

    def forward(self, x):
        weight = self.functional.dequantize_blockwise(self.packed, self.state).to(x.dtype)
        return torch.nn.functional.linear(x, weight.view(self.shape), self.bias)


class BitsAndBytesPublished(Transformers):
    def load(self, folder):
        model = _load_dense(folder, dtype=torch.bfloat16)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, PublishedLinear(child))
        return model


class Quanto(Transformers):
    def load(self, folder):
        from optimum.quanto import freeze, qint8, quantize

        model = _load_dense(folder, dtype=torch.bfloat16)
        quantize(model, weights=qint8)
        freeze(model)
        return model


class TorchAo(Transformers):
    """Int8 weight-only, compiled, with the static cache that compiling wants."""

    def load(self, folder):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = _load_dense(folder, dtype=torch.bfloat16)
        quantize_(model, Int8WeightOnlyConfig())
        self.compiled = torch.compile(model)
        return model

    def cache(self):
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=1024)

    def step(self, model, ids, past):
        return self.compiled(ids, past_key_values=past, use_cache=True, logits_to_keep=1)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a Q8_0 file of the same shape."""

    def __init__(self, folder: Path):
        import llama_cpp

        self.api = llama_cpp
        threads = torch.get_num_threads()
        self.llama = llama_cpp.Llama(
            str(folder / "model.gguf"),
            n_ctx=1024,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.vocabulary = self.llama.n_vocab()

    def _eval(self, tokens: int) -> None:
        self.llama.eval(torch.randint(0, self.vocabulary, (tokens,)).tolist())

    def prefill(self, tokens: int) -> float:
        self.llama.reset()
        start = time.perf_counter()
        self._eval(tokens)
        return time.perf_counter() - start

    def decode(self, tokens: int) -> float:
        self.llama.reset()
        self._eval(PROMPT)
        start = time.perf_counter()
        for _ in range(tokens):
            self._eval(1)
        return time.perf_counter() - start


ENGINES = {
    "octavo": Octavo,
    "octavo-f32": OctavoFloat32,
    "transformers-bf16": BFloat16,
    "transformers-f32": Float32,
    "llama.cpp": LlamaCpp,
    "torchao": TorchAo,
    "quanto": Quanto,
    "bnb-int8": BitsAndBytesInt8,
    "bnb-published": BitsAndBytesPublished,
}


def make(name: str, folder: str) -> Transformers | LlamaCpp:
    """The engine of that name, for `octavo.bench.process.Worker`."""
    return ENGINES[name](Path(folder))
