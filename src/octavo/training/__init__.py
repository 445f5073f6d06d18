"""Fine-tuning 8-bit models: adapters on frozen weights, through PEFT, transformers' Trainer and bitsandbytes.

One job per file: `prepare` (a model ready for training), `recipe` (the options of a run), `data` (examples from
files), `prompts` (how an adapter wants to be asked), `loss` (cross-entropy in chunks), `finetune` (the training itself),
`folder`, `card` and `curves` (what lands in its folder).

Example:
    >>> from octavo.training import prepare_for_training, GradientGuard
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .prepare import GradientGuard, check_gradients, prepare_for_training

__all__ = ["GradientGuard", "check_gradients", "prepare_for_training"]


def __getattr__(name: str):
    # `octavo finetune` checks its options and its data before torch and transformers are imported.
    if name in __all__:
        return getattr(_import_module(".prepare", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
