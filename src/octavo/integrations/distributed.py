"""Where torch.distributed meets 8-bit weights: FSDP2's gathering of shards, and DDP.

FSDP2 (`torch.distributed.fsdp.fully_shard`) cuts each parameter along its first dimension. A shard of an 8-bit weight is
an 8-bit weight: rows of qdata and absmax, or experts with their codebooks. Before a layer runs, its shards are gathered
as bytes and scales, and de-quantized, as always, only inside the kernels.

Example:
    >>> from torch.distributed.fsdp import fully_shard
    >>> for layer in model.model.layers:  # doctest: +SKIP
    ...     fully_shard(layer)
    >>> fully_shard(model)                # doctest: +SKIP

DDP broadcasts parameters when it starts, and cannot take a tensor subclass. The weights are frozen and the same in every
process: `ignore_frozen(model)` tells DDP to leave them alone.

    >>> ignore_frozen(model)                                        # doctest: +SKIP
    >>> model = torch.nn.parallel.DistributedDataParallel(model)    # doctest: +SKIP
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..tensor import OctavoTensor

# What DDP looks for on the module it wraps.
IGNORED = "_ddp_params_and_buffers_to_ignore"


class Gathering(NamedTuple):
    """What a process knows of a weight whose bytes are being gathered: its properties, and parts gathered already."""

    rows: int
    block_size: int
    dtype: torch.dtype
    transposed: bool
    codebook: str
    absmax: torch.Tensor | None
    code: torch.Tensor | None


def gather_inputs(shard: OctavoTensor, mesh, outer_size) -> tuple[tuple[torch.Tensor, ...], Gathering]:
    """What FSDP2 gathers of a shard, and what the gathered weight needs besides.

    A matrix's codebook is in every process; a stack's codebooks are sharded with it. Where the first dimension is no
    multiple of the number of processes, FSDP2 wants every gathered tensor padded to the shape of the parameter's shard,
    which scales do not have: those (3 % of the bytes) are gathered here, and stay.
    """
    stacked = shard.code.dim() > 1
    properties = (outer_size[0], shard.block_size, shard.dtype, shard.transposed, shard.codebook)
    if outer_size[0] % mesh.size() == 0:
        parts = (shard.qdata, shard.absmax, shard.code) if stacked else (shard.qdata, shard.absmax)
        return parts, Gathering(*properties, None, None if stacked else shard.code)
    rows = -(-outer_size[0] // mesh.size())
    absmax = _all_gather(_padded(shard.absmax, rows), mesh)[: outer_size[0]]
    code = _all_gather(_padded(shard.code, rows), mesh)[: outer_size[0]] if stacked else shard.code
    qdata = _padded(shard.qdata, rows)
    # FSDP2 compares shapes as the model sees them; its own view(-1) of this comes back in the same order of bytes.
    return (qdata.view(rows, *shard.shape[1:]),), Gathering(*properties, absmax, code)


def gathered_weight(outputs, known: Gathering, dtype: torch.dtype | None, out: OctavoTensor | None):
    """The whole weight from what FSDP2 has gathered; rows that padded the last shard are cut off.

    Args:
        outputs: qdata, and, unless `known` has them, absmax and code.
        known: from `gather_inputs`.
        dtype: the computing type that FSDP2's mixed precision asks for.
        out: the weight of the last time, whose storage FSDP2 has filled again.
    """
    if out is not None:
        # The bytes are in its storage already; parts gathered outside it are frozen as well, and have stayed.
        return None
    qdata, *others = outputs
    absmax = others.pop(0) if known.absmax is None else known.absmax
    code = others.pop(0) if known.code is None else known.code
    qdata = qdata[: known.rows]
    if known.absmax is not None and known.transposed:
        qdata = qdata.reshape(*qdata.shape[:-2], qdata.shape[-1], qdata.shape[-2])
    weight = OctavoTensor(
        qdata,
        absmax[: known.rows],
        code,
        known.block_size,
        dtype or known.dtype,
        known.transposed,
        known.codebook,
    )
    return weight, outputs


def _padded(part: torch.Tensor, rows: int) -> torch.Tensor:
    if part.shape[0] == rows:
        return part.contiguous()
    return torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])


def _all_gather(part: torch.Tensor, mesh) -> torch.Tensor:
    out = part.new_empty(part.shape[0] * mesh.size(), *part.shape[1:])
    # Its name since PyTorch 2.13; the older one warns there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, part, group=mesh.get_group())
    return out


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
