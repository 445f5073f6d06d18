"""Where PEFT meets Octavo: adapters of published checkpoints, and adapters on the embedding or the head.

A published 8-bit checkpoint may carry adapters beside its weights. Such an adapter adds `up(down(x))` to a
layer's output, unscaled: a LoRA with A = down, B = up and alpha = rank, so it becomes PEFT's own layer.

PEFT needs no help to put its layers onto 8-bit weights. One thing stands in the way: it saves the whole
embedding and head beside an adapter that targets them. Those are frozen and have no float values to save, so
`keep_frozen_out_of_adapters` leaves them out.

Example:
    >>> model = octavo.load("model-8bit")
    >>> down, up = torch.randn(4, 256), torch.zeros(256, 4)
    >>> add_published_adapters(model, {"transformer.h.0.attn.q_proj": (down, up)})
    >>> model.active_adapters()
    ['published']
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.errors import CheckpointError, library_errors, out_of_memory
from ..checkpoint.reading.locate import locate_adapter
from ..checkpoint.reading.published_adapters import lora_options
from ..checkpoint.reading.safetensors_source import check_adapter_file, read_header
from ..json_files import read_object
from ..tensor import OctavoTensor
from ..wording import one_line

ADAPTER_NAME = "published"
# No rank, number of tokens or width of an adapter is larger than this.
LARGE = 1 << 20


def add_adapter(model: Any, adapter: str | Path, name: str = "default") -> None:
    """Put a PEFT adapter onto a transformers model, active, by PEFT's own loading.

    transformers' `load_adapter` leaves DoRA's magnitudes and parameters that were trained whole as they were initialized.

    Args:
        model: a transformers model; its layers are changed in place.
        adapter: a folder as `octavo finetune` and PEFT write it, or a hub id.

    Raises:
        ImportError: if PEFT is not installed, saying how to install it.
        ValueError: if there is no adapter there, or one of another model.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError("adapters need PEFT: `pip install 'octavo[train]'`") from error
    locate_adapter(adapter)
    check_adapter_file(Path(adapter))
    try:
        PeftConfig.from_pretrained(str(adapter))
    except library_errors() as error:
        raise CheckpointError(
            f"{adapter}: PEFT cannot read its adapter_config.json: {one_line(error)}"
        ) from error
    try:
        with warnings.catch_warnings():
            # Of thousands of names; `_not_of_this_model` says it in one line.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            wrapped: Any = PeftModel.from_pretrained(model, str(adapter), adapter_name=name)
            # PEFT loads what fits and keeps what did not to itself; asked again, it hands that over.
            loaded = wrapped.load_adapter(str(adapter), name)
    except KeyError as error:
        raise _not_of_this_model(adapter, f"it holds no {error.args[0]}") from error
    except (RuntimeError, ValueError) as error:
        if out_of_memory(error):
            _check_sizes(Path(adapter))
            raise
        # The first of PEFT's lines is a heading, each that follows names a tensor.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _not_of_this_model(adapter, (lines[1:] or lines or [type(error).__name__])[0]) from error
    except library_errors() as error:
        # PEFT uses its configuration's values before it checks them: as numbers of tokens, for one.
        raise CheckpointError(f"{adapter}: PEFT cannot make an adapter of this: {one_line(error)}") from error
    homeless = [key for key in loaded.unexpected_keys if _changes_what_is_not_there(key, wrapped)]
    if homeless or loaded.missing_keys:
        place = (homeless or loaded.missing_keys)[0].removeprefix("base_model.model.").partition(".lora_")[0]
        why = (
            f"it changes {place}, which this model does not have"
            if homeless
            else f"it holds nothing for {place}"
        )
        raise _not_of_this_model(adapter, why)
    # What transformers' own functions for adapters ask for.
    model.peft_config = {name: wrapped.peft_config[name]}
    model._hf_peft_config_loaded = True


def _check_sizes(adapter: Path) -> None:
    """Where there was no memory: that adapter_config.json asks for no more than its tensors have.

    Raises:
        CheckpointError: naming a setting beyond any dimension of any tensor.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.exists():
        return
    largest = max((size for entry in read_header(weights)[0].values() for size in entry.shape), default=0)
    settings = read_object(adapter / "adapter_config.json")
    for name, value in settings.items():
        for size in value.values() if isinstance(value, dict) else [value]:
            if isinstance(size, int) and size > max(largest, LARGE):
                raise CheckpointError(
                    f"{adapter / 'adapter_config.json'}: {name} = {size}: there is no memory for that, and no tensor in "
                    f"{weights.name} has more than {largest} rows or columns; the two are not of one adapter"
                )


def _changes_what_is_not_there(key: str, wrapped: Any) -> bool:
    """Whether a tensor that PEFT found no place for belongs to a layer that the model lacks.

    With `bias="all"` PEFT writes the biases of layers trained whole twice, also as `LAYER.modules_to_save.bias`, and reads one.
    """
    layer, trained_whole, _ = key.partition(".modules_to_save")
    if trained_whole:
        return layer not in dict(wrapped.named_modules())
    return "lora_" in key


def _not_of_this_model(adapter: str | Path, why: str) -> ValueError:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    trained = f"; it was trained on {base}" if base else ""
    # PEFT's own messages may list every layer.
    return ValueError(f"{adapter}: the adapter is not of this model: {one_line(why)}{trained}")


def add_published_adapters(model: Any, adapters: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put low-rank additions onto a model as an active PEFT adapter named "published".

    Args:
        model: a transformers model, its base weights frozen.
        adapters: module name → (down, up): [r, in] and [out, r] for a linear, [num, r] and [dim, r] for an embedding.

    Raises:
        ImportError: if PEFT is not installed, saying how to install it.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "this checkpoint carries adapters, which PEFT applies: `pip install 'octavo[train]'`"
        ) from error

    # By PEFT's own function: transformers' `add_adapter` refuses a PEFT older than the one it was written for.
    config = LoraConfig(**lora_options(adapters), base_model_name_or_path=model.name_or_path)
    inject_adapter_in_model(config, model, ADAPTER_NAME)
    model._hf_peft_config_loaded = True
    for name, (down, up) in adapters.items():
        _fill(model.get_submodule(name), down, up)


def _fill(layer: Any, down: torch.Tensor, up: torch.Tensor) -> None:
    """Copy one adapter into PEFT's layer. PEFT keeps an embedding's A as [r, num]."""
    with torch.no_grad():
        if ADAPTER_NAME in layer.lora_embedding_A:
            layer.lora_embedding_A[ADAPTER_NAME].copy_(down.T)
            layer.lora_embedding_B[ADAPTER_NAME].copy_(up)
        else:
            layer.lora_A[ADAPTER_NAME].weight.copy_(down)
            layer.lora_B[ADAPTER_NAME].weight.copy_(up)


def keep_frozen_out_of_adapters(model: Any) -> None:
    """Leave 8-bit embeddings and heads out of what PEFT saves as an adapter. Calling it twice is harmless.

    Args:
        model: a transformers model; PEFT may wrap it later.
    """
    for find in ("get_input_embeddings", "get_output_embeddings"):
        layer: Any = getattr(model, find, lambda: None)()
        # Perceiver's "embedding" is a bare parameter.
        if isinstance(layer, nn.Module) and not getattr(layer, "_octavo_frozen_left_out", False):
            layer._octavo_frozen_left_out = True  # type: ignore[assignment]  # a mark, neither tensor nor module
            layer.register_state_dict_post_hook(_drop_frozen_weight)


def _drop_frozen_weight(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    # PEFT calls the layer that it wraps `base_layer`; under any other name the weight is a part of the model.
    weight = getattr(module, "weight", None)
    # Under FSDP2 a weight is a DTensor around this process's share.
    if prefix.endswith("base_layer.") and isinstance(getattr(weight, "_local_tensor", weight), OctavoTensor):
        state.pop(f"{prefix}weight", None)
