"""Fine-tuning 8-bit models: adapters on frozen weights, through PEFT, transformers' Trainer and bitsandbytes.

One job a file: `prepare` (a model ready for training), `recipe` (the options of a run), `data` (examples from
files), `loss` (cross-entropy in chunks), `run` (the training itself), `report` (curve and table).

Example:
    >>> from octavo.training import prepare_for_training, GradientGuard  # doctest: +SKIP
"""

from .prepare import GradientGuard, check_gradients, prepare_for_training

__all__ = ["GradientGuard", "check_gradients", "prepare_for_training"]
