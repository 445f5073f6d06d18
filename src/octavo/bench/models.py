"""Whole models: prefill, decoding, what the model is made of; in 8 bits, and the same in float.

The classes at the end are engines for `octavo.bench.process`. `prefill` and `decode` take any transformers model, whatever
its weights are.

Example:
    >>> tokens_per_second = 8 / decode(model, 8)
"""

import inspect
import time
from collections import Counter
from functools import cache
from typing import Any

import torch

# Tokens before those that are decoded.
PROMPT = 8


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step(model: Any, ids: torch.Tensor, past: Any) -> Any:
    """One pass over `ids` [1, n], with the logits of the last where the model can leave the others out."""
    model_class: Any = type(model)
    options = {"logits_to_keep": 1} if _keeps_logits(model_class) else {}
    return model(ids, past_key_values=past, use_cache=True, **options)


@cache
def _keeps_logits(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def _random_ids(model: Any, tokens: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (1, tokens), device=model.device)


@torch.inference_mode()
def prefill(model: Any, tokens: int, past: Any = None, step: Any = step) -> float:
    """Seconds of one pass over `tokens` random tokens; `past` is an empty cache of the model's, where it wants one."""
    ids = _random_ids(model, tokens)
    _synchronize(model.device)
    start = time.perf_counter()
    step(model, ids, past)
    _synchronize(model.device)
    return time.perf_counter() - start


@torch.inference_mode()
def decode(model: Any, tokens: int, past: Any = None, step: Any = step) -> float:
    """Seconds of `tokens` tokens one by one, the likeliest each time, after a random prompt of PROMPT tokens."""
    out = step(model, _random_ids(model, PROMPT), past)
    _synchronize(model.device)
    start = time.perf_counter()
    for _ in range(tokens):
        out = step(model, out.logits[:, -1:].argmax(-1), out.past_key_values)
    _synchronize(model.device)
    return time.perf_counter() - start


class Engine:
    """A loaded model behind the requests of `octavo.bench.process`."""

    def __init__(self, model: Any):
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} does not continue text: `octavo bench` measures models that do; without MODEL "
                "it measures the one that ships with Octavo"
            )
        self.model = model

    def prefill(self, tokens: int) -> float:
        return prefill(self.model, tokens)

    def decode(self, tokens: int) -> float:
        return decode(self.model, tokens)

    def device_memory(self) -> int | None:
        """Bytes: the most that this process held on its GPU; None on a CPU."""
        if self.model.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.model.device)

    def describe(self) -> dict:
        """What the model is made of.

        Returns:
            class, device, dtype (compute dtype); parameters: numbers in all; bytes: they take; context: most tokens, or None;
            matrices: [rows, columns, block size, kind of codebook (`kernels.kind_of`), how many] of those in 8 bits, most weights
            first; fallbacks: operations so far that de-quantized a whole weight.
        """
        from ..tensor import OctavoTensor, fallbacks
        from .kernels import kind_of

        shapes: Counter[tuple[int, int, int, str]] = Counter()
        parameters = stored = 0
        for parameter in self.model.parameters():
            parameters += parameter.numel()
            if isinstance(parameter, OctavoTensor):
                stored += parameter.nbytes_stored
                rows, columns = parameter.qdata.shape[-2:]
                kind = kind_of(parameter.code)
                shapes[rows, columns, parameter.block_size, kind] += parameter.numel() // (rows * columns)
            else:
                stored += parameter.nbytes
        matrices = sorted(shapes.items(), key=lambda item: -item[0][0] * item[0][1] * item[1])
        return {
            "class": type(self.model).__name__,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "parameters": parameters,
            "bytes": stored,
            "context": getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
            "matrices": [[*shape, count] for shape, count in matrices],
            "fallbacks": fallbacks(),
        }


class Quantized(Engine):
    """`octavo.load(source)`; a source that is not quantized yet is quantized while it loads."""

    def __init__(self, source: str, device: str, dtype: str | None = None):
        from .. import load

        super().__init__(load(source, dtype=dtype, device=device))


class Dense(Engine):
    """The same model with plain weights of `dtype`: as transformers loads it, or de-quantized if there are only 8 bits."""

    def __init__(self, source: str, device: str, dtype: str):
        super().__init__(load_dense(source, torch.device(device), getattr(torch, dtype)))


def load_dense(source: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with plain weights: by transformers' `from_pretrained` where the source has such, else de-quantized."""
    from .. import load
    from ..checkpoint import open_source
    from ..loading import from_pretrained
    from ..model import dequantize_model

    with open_source(source) as opened:
        if opened.kind in ("safetensors", "bin"):
            return from_pretrained(opened, dtype, device).eval()
    model = load(source, dtype=dtype, device=device)
    return dequantize_model(model, dtype).to(dtype)
