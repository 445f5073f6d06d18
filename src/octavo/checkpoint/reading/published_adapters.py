"""Low-rank adapters found inside published checkpoints, as PEFT reads them.

A published fine-tuned layer adds `adapter.2(adapter.0(x))` to its output: LoRA with scaling 1. PEFT calls the two `lora_A` [r,
in] and `lora_B` [out, r], for embeddings `lora_embedding_A` [r, num] and `lora_embedding_B` [dim, r].

Example:
    >>> from octavo.checkpoint.reading.published_adapters import save_peft_adapter
    >>> adapters = {"transformer.h.0.attn.q_proj": (torch.randn(4, 256), torch.zeros(256, 4))}
    >>> Path("adapter").mkdir()
    >>> save_peft_adapter(adapters, Path("adapter"), base="model")
"""

from pathlib import Path
from typing import Any

import torch

from ..writing.durable import write_json

Adapters = dict[str, tuple[torch.Tensor, torch.Tensor]]


def is_embedding_adapter(down: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether (A, B) as stored is a table [num, r] and a linear [dim, r], not two linears [r, in] and [out, r]."""
    return down.shape[1] == up.shape[1] and down.shape[0] != up.shape[1]


def lora_options(adapters: Adapters) -> dict[str, Any]:
    """What PEFT's LoraConfig has to be told of adapters given as module name → (adapter.0.weight, adapter.2.weight)."""
    ranks = {module: up.shape[1] for module, (_, up) in adapters.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    # alpha = r everywhere: the published layers add the product as it is.
    others = {module: r for module, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": sorted(ranks),
    }


def peft_adapter(adapters: Adapters, base: str = "") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """PEFT's adapter_config.json and tensors for adapters given as module name → (adapter.0.weight,
    adapter.2.weight).

    Returns:
        The config as a dictionary, and the tensors by PEFT's names.
    """
    tensors = {}
    for module, (down, up) in adapters.items():
        names = ("lora_A.weight", "lora_B.weight")
        if is_embedding_adapter(down, up):
            names = ("lora_embedding_A", "lora_embedding_B")
            down = down.T
        for name, tensor in zip(names, (down, up), strict=True):
            tensors[f"base_model.model.{module}.{name}"] = tensor.contiguous().clone()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **lora_options(adapters),
        "bias": "none",
        "inference_mode": True,
    }
    return config, tensors


def save_peft_adapter(adapters: Adapters, folder: Path, base: str = "") -> None:
    """Write adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    config, tensors = peft_adapter(adapters, base)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config, sort_keys=True)
