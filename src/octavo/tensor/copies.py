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
    return each(
        weight,
        lambda part: part.to(device=device, non_blocking=non_blocking, copy=True),
        dtype=dtype or weight.dtype,
    )


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


def _plain(weight: OctavoTensor, size, make: str, dtype, device, fill=None):
    arguments = (list(size),) if fill is None else (list(size), fill)
    return getattr(torch, make)(*arguments, dtype=dtype or weight.dtype, device=device or weight.device)


@handles(aten.new_zeros.default)
def new_zeros(weight, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    room = _room(weight, size, "zeros", device)
    return _plain(weight, size, "zeros", dtype, device) if room is NotImplemented else room


@handles(aten.new_empty.default)
def new_empty(weight, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    room = _room(weight, size, "empty", device)
    return _plain(weight, size, "empty", dtype, device) if room is NotImplemented else room


@handles(aten.empty_like.default)
def empty_like(weight, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    room = _room(weight, weight.shape, "empty", device)
    return _plain(weight, weight.shape, "empty", dtype, device) if room is NotImplemented else room


@handles(aten.zeros_like.default)
def zeros_like(weight, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return _plain(weight, weight.shape, "zeros", dtype, device)


@handles(aten.ones_like.default)
def ones_like(weight, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return _plain(weight, weight.shape, "ones", dtype, device)


@handles(aten.new_ones.default)
def new_ones(weight, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return _plain(weight, size, "ones", dtype, device)


@handles(aten.new_full.default)
def new_full(weight, size, fill_value, *, dtype=None, layout=None, device=None, pin_memory=None):
    return _plain(weight, size, "full", dtype, device, fill_value)


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
