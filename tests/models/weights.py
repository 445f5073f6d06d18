"""Random 8-bit weights, and what a view of one must be."""

import torch

from octavo import OctavoTensor


def make(*shape, device="cpu", **options) -> OctavoTensor:
    return OctavoTensor.from_float(torch.randn(*shape, device=device), **options)


def check_view(found, dense) -> None:
    """`found` is still an OctavoTensor, looks like `dense` and decodes to it bit for bit."""
    assert isinstance(found, OctavoTensor)
    assert found.shape == dense.shape and (found.transposed or found.stride() == dense.stride())
    assert torch.equal(found.dequantize(), dense)
