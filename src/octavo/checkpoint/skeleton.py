"""A model without weights: its modules and the names and shapes of its parameters, on the meta device.

Example:
    >>> from octavo.checkpoint.skeleton import build_skeleton
    >>> from transformers import GPT2Config
    >>> next(build_skeleton(GPT2Config(n_layer=1)).parameters()).device
    device(type='meta')
"""

from typing import Any

import torch

from ..wording import one_line
from .errors import CheckpointError, library_errors


def model_class_of(config: Any) -> Any:
    """The transformers class named in `config.architectures`, else the causal language model of that type.

    Raises:
        CheckpointError: if transformers has no such class.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list):
        raise CheckpointError(f"config.json: architectures: expected a list of names, found {names!r:.60}")
    model_class = getattr(transformers, str(names[0]), None) if names else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        model_class = None
    if model_class is None and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class is None:
        raise CheckpointError(
            f"config.json: architectures {names}: this transformers ({transformers.__version__}) has no such model; "
            "`pip install -U transformers`"
        )
    return model_class


def build_skeleton(config: Any) -> Any:
    """The model that a transformers configuration describes, on the meta device, tied weights tied.

    Raises:
        CheckpointError: if transformers has no such class, or cannot build it.
    """
    from transformers import initialization

    model_class = model_class_of(config)
    try:
        with torch.device("meta"), initialization.no_init_weights():
            model = model_class(config)
    except library_errors() as error:
        raise CheckpointError(
            f"config.json describes a {model_class.__name__} that cannot be built: {one_line(error)}"
        ) from error
    model.tie_weights()
    return model.eval()


def check_tables(config: Any) -> None:
    """That the tables which a model computes from its configuration, such as rotary angles, fit into this machine's memory.

    Raises:
        CheckpointError: naming one that does not.
    """
    import psutil

    memory = psutil.virtual_memory().total
    for name, table in build_skeleton(config).named_buffers():
        if table.nbytes > memory:
            raise CheckpointError(
                f"config.json asks for a table {name} of {' x '.join(map(str, table.shape))} numbers, more than this "
                "machine's memory; download it again"
            )
