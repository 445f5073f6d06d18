"""Aliases and copies of an `OctavoTensor`, and new tensors made after its model: `.detach()`, `.to()`, `weight.new_zeros(...)`.

Aliases share storage; `.to()` moves bytes or changes the compute dtype and never requantizes. New tensors are plain floats
(a cache, a state, an adapter), except for FSDP2, which asks for room for its shard of the weight.

Example:
    >>> import torch, octavo
    >>> weight = octavo.OctavoTensor.from_float(torch.randn(16, 64))
    >>> weight.to(torch.bfloat16).dtype, type(weight.new_zeros(3)).__name__
    (torch.bfloat16, 'Tensor')
"""

from collections.abc import Callable

import torch

from ..ops.gpu import kinds
from .gathering import called_by_fsdp
from .octavo_tensor import OctavoTensor, aten, count_fallback, each, handles, like


@handles(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def alias(weight):
    return like(weight, weight.qdata, weight.absmax)


@handles(aten.clone.default)
def clone(weight, *, memory_format=None):
    return each(weight, torch.clone)


@handles(aten._to_copy.default)
def to_copy(
    weight, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None
):
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    # A device moves the bytes; a type only changes what is computed in. Scales and codes keep theirs.
    moved = each(
        weight,
        lambda part: part.to(device=device, non_blocking=non_blocking, copy=True),
        dtype=dtype or weight.dtype,
    )
    # Not of a tensor that only stands for one while something is traced.
    if moved.code.is_cuda and type(weight.code) is torch.Tensor and not weight.code.is_meta:
        kinds.carry(weight.code, moved.code)
    return moved


@handles(aten._pin_memory.default)
def pin_memory(weight, device=None):
    return each(weight, torch.Tensor.pin_memory)


@handles(aten.is_pinned.default)
def is_pinned(weight, device=None):
    return weight.qdata.is_pinned()


def _room(weight: OctavoTensor, size, make: str, device):
    """Zeroed or empty quantized rows for FSDP2; NotImplemented for anyone else, or for another row length."""
    shape = list(size)
    # The first dimension is what FSDP2 shards; of a transposed matrix it is the inside of rows.
    if (
        shape[1:] != list(weight.shape[1:])
        or (weight.transposed and weight.dim() < 3)
        or not called_by_fsdp()
    ):
        return NotImplemented
    create = getattr(torch, make)
    device = device or weight.device
    rows, lead = shape[0], weight.code.dim() - 1
    qdata = create((rows, *weight.qdata.shape[1:]), dtype=torch.uint8, device=device)
    absmax = create((rows, *weight.absmax.shape[1:]), dtype=weight.absmax.dtype, device=device)
    code = weight.code
    if lead:
        code = create((rows, *code.shape[1:]), dtype=code.dtype, device=device)
    return like(weight, qdata, absmax, code.to(device))


def _makes(make: str, *operations, shards: bool = False) -> None:
    """New tensors after the model of a weight, by the function of torch that `make` names; `shards`: FSDP2 asks for such ones."""

    @handles(*operations)
    def new(
        weight, size=None, *fill, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None
    ):
        size = weight.shape if size is None else size
        room = _room(weight, size, make, device) if shards else NotImplemented
        if room is not NotImplemented:
            return room
        return getattr(torch, make)(
            list(size), *fill, dtype=dtype or weight.dtype, device=device or weight.device
        )


_makes("zeros", aten.new_zeros.default, shards=True)
_makes("empty", aten.new_empty.default, aten.empty_like.default, shards=True)
_makes("zeros", aten.zeros_like.default)
_makes("ones", aten.new_ones.default, aten.ones_like.default)
_makes("full", aten.new_full.default)


@handles(torch.Tensor.share_memory_, with_history=True)
def share_memory_(weight):
    """Its parts go where other processes find them; the floats that it stands for have no memory to share."""
    for part in (weight.qdata, weight.absmax, weight.code):
        part.share_memory_()
    return weight


@handles(torch.Tensor.is_shared, with_history=True)
def is_shared(weight):
    return weight.qdata.is_shared()


@handles(torch.Tensor.storage, with_history=True)
def storage(weight):
    """What `safetensors.torch.save_file` and `save_model` ask for."""
    raise RuntimeError(
        "an 8-bit weight has no memory of floats that a file could hold under its name: save the model by "
        "`model.save_pretrained(folder)`, which writes its 8-bit parts, or first make it plain by "
        "`octavo.dequantize_model(model)`. `torch.save` keeps it as it is"
    )


def _on_floats(function: Callable) -> None:
    """PyTorch refuses `function` to every tensor subclass; on the float values it means what it says."""

    @handles(function, with_history=True)
    def run(weight, *args, **kwargs):
        if not isinstance(weight, OctavoTensor):
            return NotImplemented
        count_fallback(f"Tensor.{function.__name__}")
        return function(weight.dequantize(), *args, **kwargs)


for _function in (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__):
    _on_floats(_function)
