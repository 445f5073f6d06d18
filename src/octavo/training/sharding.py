"""FSDP2 for fine-tuning: the frozen bytes are shared out over the processes, the adapters are whole in each.

`accelerate launch --use_fsdp --fsdp_version 2 -m octavo finetune ...` asks for it. accelerate itself shards on accelerators
only (on CPUs it silently runs DDP), and would shard the adapters too; so Octavo does it, in the same way on every device:

- `fully_shard` (torch) cuts the frozen parameters of each layer, and those outside the layers. A layer's bytes are gathered
  before it runs and freed after it (`octavo.tensor.gathering`).
- The adapters, less than a hundredth of the bytes, are left out of that: DDP averages their gradients. So the optimizer, the
  checkpoints, `--resume` and the saved adapter are those of a run without FSDP.

Example:
    >>> layers = layers_of(model)                   # what FSDP2 gathers, one at a time
    >>> len(layers), sharding_asked()
    (6, False)
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..integrations.distributed import IGNORED
from ..tensor import OctavoTensor

SHARDED = "_octavo_sharded"


def sharding_asked() -> bool:
    """Whether the launcher asked for FSDP, and there are several processes to share the bytes out over.

    Raises:
        ValueError: for the first version of FSDP, which flattens parameters and so cannot hold bytes, and for its
            offloading to the CPU, which is not supported.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"accelerate launch --fsdp_version: expected 2, found {version}: version 1 flattens a layer's parameters into one "
            "tensor, which 8-bit weights cannot be part of"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError(
            "accelerate launch --fsdp_offload_params: expected false, found true: sharded 8-bit weights stay on their device"
        )
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def keep_accelerate_from_sharding() -> None:
    """Tell accelerate, in this process, that it need not shard. Call it before TrainingArguments are made."""
    os.environ["ACCELERATE_USE_FSDP"] = "false"


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: the model's layers, as transformers names them."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Cut every frozen parameter of a model with adapters into one share per process, in place.

    Args:
        model: the same in every process; torch.distributed is initialized. It may be on the CPU: a layer is moved to
            `device` when it is cut, so that no device ever holds the whole model.
        device: what this process computes on.

    Raises:
        ValueError: if transformers does not say which modules are the model's layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f"FSDP: {type(model).__name__} does not say which of its modules are layers (_no_split_modules); use DDP: "
            "accelerate launch --multi_gpu"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
        not in ("false", "no_reshard", "shard_grad_op"),
        "ignored_params": trained,
    }
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    setattr(model, SHARDED, True)


def leave_together() -> None:
    """Close the connections between processes, if there are any, once all of them have come here.

    A process that ends while another still talks to it aborts that one.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_sharded(model: Any) -> bool:
    """Whether `shard_frozen` has cut this model."""
    return getattr(model, SHARDED, False)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the 8-bit weights that this process holds: all of them, or its share."""
    parts = (getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters())
    return sum(part.nbytes_stored for part in parts if isinstance(part, OctavoTensor))


def data_parallel(model: nn.Module) -> nn.Module:
    """DDP around a sharded model, for its adapters alone: it leaves what FSDP2 holds alone."""
    frozen = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    ]
    setattr(model, IGNORED, sorted(frozen))
    return nn.parallel.DistributedDataParallel(model)
