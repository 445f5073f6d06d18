"""Getting a quantized model ready for training, and stopping a run that would train nothing.

PEFT's `prepare_model_for_kbit_training` does not know Octavo: it would cast every 16-bit parameter to float32
and leave checkpointing as it is. `prepare_for_training` does what such a model needs. `GradientGuard` is a
callback for `transformers.Trainer` and TRL's `SFTTrainer`.

Example:
    >>> import octavo
    >>> from peft import LoraConfig, get_peft_model
    >>> model = octavo.prepare_for_training(octavo.load("model-8bit"))
    >>> model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
"""

import math
import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..tensor import OctavoTensor

NOTHING_TRAINABLE = (
    "nothing would be trained: no parameter requires a gradient. The 8-bit weights are frozen on purpose; "
    "put adapters on top of them with get_peft_model(model, LoraConfig(target_modules='all-linear')), and "
    "give them is_trainable=True when loading them with PeftModel.from_pretrained"
)
NO_GRADIENT_REACHES = (
    "nothing would be trained: no gradient flows back from the loss to the {count} trainable tensors "
    "(such as {first}). {cause}"
)
REENTRANT = (
    "The cause is reentrant gradient checkpointing, which loses the gradient if a layer's input is frozen: "
    "call octavo.prepare_for_training(model), or activation_checkpointing_enable({'use_reentrant': False})"
)
DISCONNECTED = (
    "Adapters that are not active, or that sit on layers which the loss does not depend on, cause this: look "
    "at model.active_adapters and at target_modules"
)
DATA_PARALLEL = (
    "this process sees {count} GPUs: the Trainer would wrap the model in torch.nn.DataParallel, which "
    "cannot copy 8-bit weights. Use one GPU (CUDA_VISIBLE_DEVICES=0), or one process for each GPU: "
    "accelerate launch --num_processes {count} ..."
)


def prepare_for_training(
    model: Any, *, gradient_checkpointing: bool = True, float32_norms: bool = False
) -> Any:
    """Make a quantized model ready for adapters and training, in place. Call it before `get_peft_model`.

    - Every parameter is frozen; adapters put on afterwards are trainable.
    - Input gradients are on, and gradient checkpointing is on in its non-reentrant form.
    - The cache of keys and values is off: training does not use it, and it holds memory.
    - The first training step raises RuntimeError, saying why, if no gradient can reach a trainable parameter.
    - Several GPUs in one process, which the Trainer would wrap in `torch.nn.DataParallel`, give a warning
      here and an error from `GradientGuard`.

    Args:
        model: a transformers model with 8-bit weights.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping what it computed:
            about a third more time for a fraction of the memory.
        float32_norms: hold the norms in float32. Train under autocast then (the Trainer's bf16=True or fp16=True).

    Returns:
        The same model.

    Raises:
        ValueError: if the model holds no 8-bit weight.
    """
    if not any(isinstance(parameter, OctavoTensor) for parameter in model.parameters()):
        raise ValueError(
            f"prepare_for_training: expected a model with 8-bit weights, found none in "
            f"{type(model).__name__}; quantize it first: octavo.load(...) or octavo.quantize_model(model)"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if float32_norms:
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module.float()
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    if gradient_checkpointing:
        # The newer name first: the older one warns.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if getattr(model, "config", None) is not None:
        model.config.use_cache = False
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        warnings.warn(DATA_PARALLEL.format(count=torch.cuda.device_count()), stacklevel=2)
    if not getattr(model, "_octavo_watched", False):
        model._octavo_watched = True
        model.register_forward_hook(_check_first_output)
    return model


def _check_first_output(module: nn.Module, inputs: Any, output: Any) -> None:
    if not module.training or not torch.is_grad_enabled():
        return
    tensors = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    )
    connected = any(isinstance(each, torch.Tensor) and each.requires_grad for each in tensors)
    check_trainable(module, connected)


def check_trainable(model: nn.Module, connected: bool = True) -> None:
    """Raise RuntimeError, saying why, if no parameter is trainable or the output is not connected to any.

    Args:
        model: the model, adapters included.
        connected: whether the output requires a gradient.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise RuntimeError(NOTHING_TRAINABLE)
    if not connected:
        cause = REENTRANT if _checkpoints_reentrantly(model) else DISCONNECTED
        raise RuntimeError(NO_GRADIENT_REACHES.format(count=len(trainable), first=trainable[0], cause=cause))


def check_gradients(model: nn.Module) -> None:
    """After a backward pass: raise RuntimeError, saying why, if no trainable parameter received a gradient.

    Under FSDP a process may hold an empty shard of a parameter; such a one counts as reached.
    """
    check_trainable(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.grad is not None and _reached(parameter.grad) for parameter in trainable):
        return
    check_trainable(model, connected=False)


def _reached(gradient: torch.Tensor) -> bool:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.numel() == 0 or bool(local.count_nonzero())


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether a layer of the model checkpoints in the reentrant form."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and function is not None:
            options = getattr(function, "keywords", {})
            return bool(options.get("use_reentrant", True))
    return False


class GradientGuard(TrainerCallback):
    """Stops a run before its first step, saying why, if its trainable parameters receive no gradient.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import Trainer
        >>> adapted = get_peft_model(octavo.load("model-8bit"), LoraConfig(target_modules="all-linear"))
        >>> trainer = Trainer(model=adapted, callbacks=[octavo.training.GradientGuard()])
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if getattr(args, "n_gpu", 1) > 1:
            raise RuntimeError(DATA_PARALLEL.format(count=args.n_gpu))
        check_trainable(model)
        self._checked = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self._checked:
            self._checked = True
            check_gradients(model)


class LossGuard(TrainerCallback):
    """Stops a run whose loss is no number any more, and says what helps. Needs `logging_nan_inf_filter=False`."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                which = "training" if name == "loss" else "validation"
                raise ValueError(
                    f"the {which} loss is {value} at step {state.global_step}: the run has diverged, and its end was not saved. "
                    f"Lower --learning-rate ({args.learning_rate:g}) or raise --warmup; checkpoints are in {args.output_dir}"
                )
