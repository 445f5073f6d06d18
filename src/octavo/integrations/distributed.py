"""DistributedDataParallel over 8-bit weights. (FSDP2 needs no help: `octavo.tensor.gathering`.)

DDP broadcasts parameters when it starts, and cannot take a tensor subclass. The weights are frozen and the same in every
process: `ignore_frozen(model)` tells DDP to leave them alone.

Example:
    >>> ignore_frozen(model) is model                 # then: torch.nn.parallel.DistributedDataParallel(model)
    True
"""

from torch import nn

from ..tensor import OctavoTensor

# What DDP looks for on the module it wraps.
IGNORED = "_ddp_params_and_buffers_to_ignore"


def frozen_names(model: nn.Module) -> list[str]:
    """Names of all 8-bit weights of a model, under every name that a tied weight has."""
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if isinstance(parameter, OctavoTensor)
    ]


def ignore_frozen(model: nn.Module) -> nn.Module:
    """Make DistributedDataParallel leave a model's 8-bit weights alone. Call it on the module that DDP will wrap.

    Every process must have loaded the same weights: DDP then no longer broadcasts them.
    """
    ignored = set(getattr(model, IGNORED, ()))
    setattr(model, IGNORED, sorted(ignored | set(frozen_names(model))))
    return model
