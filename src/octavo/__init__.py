"""Octavo: run and fine-tune large language models in 8 bits, on the hardware you own.

    import octavo
    model = octavo.load("some/model")

Weights are stored in 8 bits through block-wise codebooks and computed in 16 or 32 bits. `import octavo` imports neither torch nor
transformers; once transformers is imported, by whomever, its `from_pretrained` and `save_pretrained` know Octavo.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from .integrations.registration import register_when_needed as _register_when_needed

if TYPE_CHECKING:
    from .config import OctavoConfig
    from .loading import load, load_tokenizer
    from .model import CoverageError, dequantize_model, plan_model
    from .quantization import quantize_model
    from .tensor import OctavoTensor, fallbacks, reset_fallbacks
    from .training.prepare import prepare_for_training

__version__ = "0.1.0"

_HOMES = {
    "CoverageError": "model",
    "OctavoConfig": "config",
    "OctavoTensor": "tensor",
    "dequantize_model": "model",
    "fallbacks": "tensor",
    "load": "loading",
    "load_tokenizer": "loading",
    "plan_model": "model",
    "prepare_for_training": "training.prepare",
    "quantize_model": "quantization",
    "reset_fallbacks": "tensor",
}
__all__ = [
    "CoverageError",
    "OctavoConfig",
    "OctavoTensor",
    "dequantize_model",
    "fallbacks",
    "load",
    "load_tokenizer",
    "plan_model",
    "prepare_for_training",
    "quantize_model",
    "reset_fallbacks",
]


def __getattr__(name: str):
    # Each public name is imported when it is first asked for, so that `octavo --help` does not wait for torch.
    if name in _HOMES:
        # Again: torch may have imported us while transformers' table of quantizers was half made.
        _register_when_needed()
        value = getattr(_import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in {
        "ops",
        "codebook",
        "tensor",
        "model",
        "config",
        "quantizer",
        "checkpoint",
        "compat",
        "training",
    }:
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_register_when_needed()
