"""Which layers get adapters, and putting them on.

Example:
    >>> from octavo.training.recipe import Recipe
    >>> wrapped = add_adapters(octavo.prepare_for_training(octavo.load("model-8bit")), Recipe(lora_targets="all"))
"""

from typing import Any

import torch
from torch import nn

from ..tensor import OctavoTensor
from .recipe import Recipe


def leaf_names(model: nn.Module) -> set[str]:
    """The last components of the names of all linear layers, embeddings and the head: "q_proj", "wte", "lm_head"."""
    from transformers.pytorch_utils import Conv1D

    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
    }


def norm_names(model: nn.Module) -> list[str]:
    """The last components of the names of all norms: "ln_1", "input_layernorm"."""
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not list(module.children())
    }
    return sorted(found)


def targets(model: nn.Module, asked: str) -> str | list[str]:
    """What `--lora-targets` stands for: "all-linear" as PEFT has it, "all", or names separated by commas.

    Raises:
        ValueError: if a name is that of no layer, listing those there are.
    """
    if asked == "all-linear":
        return asked
    known = leaf_names(model)
    if asked == "all":
        return sorted(known)
    names = [name.strip() for name in asked.split(",") if name.strip()]
    modules = [name for name, _ in model.named_modules()]
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise ValueError(
                f"--lora-targets {name}: no layer of this model has that name; expected all-linear, all, or some of "
                f"{', '.join(sorted(known))}"
            )
    return names


def add_adapters(model: nn.Module, recipe: Recipe) -> Any:
    """Put LoRA adapters onto a prepared model; what is trained is held in float32.

    Returns:
        PEFT's model.

    Raises:
        ImportError: if PEFT is not installed, saying how to install it.
        ValueError: if the model carries adapters already.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("fine-tuning needs PEFT: `pip install 'octavo[train]'`") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "this model carries an adapter already, which a new one would train against. Merge it first: "
            "`octavo merge MODEL ADAPTER OUT`"
        )
    if recipe.lora_dropout and any(isinstance(p, OctavoTensor) and p.dim() == 3 for p in model.parameters()):
        raise ValueError(
            f"--lora-dropout: expected 0 for a model with fused experts, found {recipe.lora_dropout}: PEFT's adapters "
            "on them know no dropout"
        )
    names = [name.strip() for name in recipe.lora_parameters.split(",") if name.strip()]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets(model, recipe.lora_targets),
        target_parameters=names or None,
        use_dora=recipe.dora,
        use_rslora=recipe.rslora,
        bias="all" if recipe.train_biases else "none",
        modules_to_save=norm_names(model) if recipe.train_norms else None,
    )
    model = get_peft_model(model, config)
    # PEFT keeps a set, whose order is another one in each process, and writes it as it comes.
    used: Any = config.target_modules
    config.target_modules = sorted(used) if isinstance(used, set) else used
    for parameter in model.parameters():
        # A 16-bit parameter would lose the small steps of training.
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model
