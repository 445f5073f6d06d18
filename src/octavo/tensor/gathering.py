"""What FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers of an 8-bit weight's shards, and what it puts together.

FSDP2 cuts each parameter along its first dimension. A shard of an 8-bit weight is an 8-bit weight: rows of qdata and absmax, or
experts with their codebooks. Before a layer runs, its shards are gathered as bytes and scales, and de-quantized, as always,
only inside the kernels.

Example:
    >>> import torch.distributed as dist
    >>> from torch.distributed.fsdp import fully_shard
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())     # torchrun does this
    >>> model = octavo.load("model-8bit", device="cpu")
    >>> for layer in model.transformer.h:
    ...     _ = fully_shard(layer)
    >>> _ = fully_shard(model)
    >>> dist.destroy_process_group()
"""

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Gathering(NamedTuple):
    """What a process knows of a weight whose bytes are being gathered: its properties, and parts gathered already."""

    rows: int
    block_size: int
    dtype: torch.dtype
    transposed: bool
    codebook: str
    absmax: torch.Tensor | None
    code: torch.Tensor | None


class Gathers:
    """The two hooks that FSDP2 looks for on a shard, for `OctavoTensor` to inherit."""

    def fsdp_pre_all_gather(self: Any, mesh, outer_size, outer_stride, module, mp_policy):
        """What FSDP2 gathers of this shard, and what the gathered weight needs besides.

        A matrix's codebook is in every process; a stack's codebooks are sharded with it. Where the first dimension is no
        multiple of the number of processes, FSDP2 wants every gathered tensor padded to the shape of the parameter's shard,
        which scales do not have: those (3 % of the bytes) are gathered here, and stay.
        """
        stacked = self.code.dim() > 1
        properties = (outer_size[0], self.block_size, self.dtype, self.transposed, self.codebook)
        if outer_size[0] % mesh.size() == 0:
            parts = (self.qdata, self.absmax, self.code) if stacked else (self.qdata, self.absmax)
            return parts, Gathering(*properties, None, None if stacked else self.code)
        rows = -(-outer_size[0] // mesh.size())
        absmax = _all_gather(_padded(self.absmax, rows), mesh)[: outer_size[0]]
        code = _all_gather(_padded(self.code, rows), mesh)[: outer_size[0]] if stacked else self.code
        qdata = _padded(self.qdata, rows)
        # FSDP2 compares shapes as the model sees them; its own view(-1) of this comes back in the same order of bytes.
        return (qdata.view(rows, *self.shape[1:]),), Gathering(*properties, absmax, code)

    def fsdp_post_all_gather(self: Any, outputs, metadata: Gathering, param_dtype, *, out=None):
        """The whole weight from what FSDP2 has gathered; rows that padded the last shard are cut off.

        Args:
            outputs: qdata, and, unless `metadata` has them, absmax and code.
            metadata: from `fsdp_pre_all_gather`.
            param_dtype: the compute dtype that FSDP2's mixed precision asks for.
            out: the weight of the last time, whose storage FSDP2 has filled again.
        """
        if out is not None:
            # The bytes are in its storage already; parts gathered outside it are frozen as well, and have stayed.
            return None
        qdata, *others = outputs
        absmax = others.pop(0) if metadata.absmax is None else metadata.absmax
        code = others.pop(0) if metadata.code is None else metadata.code
        rows, block_size, dtype, transposed, codebook, gathered, _ = metadata
        qdata = qdata[:rows]
        if gathered is not None and transposed:
            qdata = qdata.reshape(*qdata.shape[:-2], qdata.shape[-1], qdata.shape[-2])
        weight = type(self)(
            qdata, absmax[:rows], code, block_size, param_dtype or dtype, transposed, codebook
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


def called_by_fsdp() -> bool:
    """Whether FSDP2 asks. It wants room for its shard as the parameter's own kind of tensor; everybody else who says
    `weight.new_zeros(...)` wants floats (a cache, a state) that must not be rounded to 8 bits."""
    frame = sys._getframe(1).f_back
    for _ in range(24):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.fsdp"):
            return True
        frame = frame.f_back
    return False
