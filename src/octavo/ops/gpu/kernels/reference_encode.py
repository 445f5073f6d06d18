"""Quantizing in plain PyTorch: where Triton is missing, or was found to disagree."""

from ... import reference
from ..kernel import Kernel

KERNEL = Kernel(
    name="reference_encode",
    operation="encode",
    summary="both in plain PyTorch, where nothing else runs",
    run=reference,
    unsupported_reason=lambda call: None,
    place=lambda call: 100,
)
