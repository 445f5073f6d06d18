"""New tensors made after the model of an `OctavoTensor`: `weight.new_zeros(...)`, `torch.empty_like(weight)`.

They are plain floats (a cache, a state, an adapter), except for FSDP2, which asks for room for its shard of the weight.

Example:
    >>> import torch, octavo
    >>> type(octavo.OctavoTensor.from_float(torch.randn(16, 64)).new_zeros(3)).__name__
    'Tensor'
"""

import torch

from .tensor import OctavoTensor
from .tensor_dispatch import aten, called_by_fsdp, handles, like


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
