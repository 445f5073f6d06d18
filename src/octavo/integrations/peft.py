"""Adapters that published 8-bit checkpoints carry beside their weights, as PEFT's own LoRA layers.

Such an adapter adds `up(down(x))` to a layer's output, unscaled: a LoRA with A = down, B = up and alpha = rank.

Example:
    >>> add_published_adapters(model, {"transformer.h.0.attn.q_proj": (down, up)})  # doctest: +SKIP
"""

from collections import Counter
from typing import Any

import torch
from torch import nn

ADAPTER_NAME = "published"


def add_published_adapters(model: nn.Module, adapters: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put low-rank additions onto a model as an active PEFT adapter named "published".

    Args:
        model: a transformers model, its base weights frozen.
        adapters: module name → (down, up): [r, in] and [out, r] for a linear, [num, r] and [dim, r] for an embedding.

    Raises:
        ImportError: if PEFT is not installed, saying how to install it.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(
            "this checkpoint carries adapters, which PEFT applies: `pip install 'octavo[train]'`"
        ) from error

    ranks = {name: up.shape[1] for name, (_, up) in adapters.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=list(adapters),
        rank_pattern=others,
        alpha_pattern=others,
        lora_dropout=0.0,
    )
    model.add_adapter(config, ADAPTER_NAME)
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
