"""Whether a parameter that a checkpoint holds no weights for is new, as a head put on a model is, or missing from the files.

transformers initializes what it finds no weights for, and says so. That is right for what is new. Of a checkpoint that should
hold those weights it makes a wrong model.

Example:
    >>> from octavo.integrations.completeness import is_missing
    >>> is_missing(model, "lm_head.weight", ["model/model.safetensors"])
    True
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.errors import CheckpointError
from ..checkpoint.skeleton import build_skeleton


def is_missing(model: Any, name: str, files: Sequence[str]) -> bool:
    """Whether the model that `files` were saved from has this parameter, in this shape.

    Args:
        model: a transformers model.
        name: a parameter of it.
        files: the checkpoint's files, beside which config.json says what was saved.
    """
    stored = _stored_shapes(files)
    if stored is None:
        return True
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # One of the two may be the base of the other.
    names = (name, f"{prefix}{name}", name.removeprefix(prefix))
    shape = model.get_parameter(name).shape
    return any(stored.get(each) == shape for each in names)


def _stored_shapes(files: Sequence[str]) -> dict[str, torch.Size] | None:
    """Parameters of the model that was saved; None if it cannot be built (its code is not transformers')."""
    from transformers import AutoConfig

    if not files:
        return None
    try:
        skeleton = build_skeleton(AutoConfig.from_pretrained(Path(files[0]).parent))
    except (OSError, ValueError, KeyError, CheckpointError):
        return None
    return {name: p.shape for name, p in skeleton.named_parameters(remove_duplicate=False)}
